"""`bitops` against a count by hand, and against the multiplications that really happen."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.core.problem import usage_of
from mpsearch.resources import BitOps
from mpsearch.resources.bitops import count_macs
from mpsearch.sensitivity import KLDivergence

OPTIONS = mps.precisions("w2 w4a8 w8a4 wfp6_e2m3amxfp4 w16")
PRODUCTS = [2 * 16, 4 * 8, 8 * 4, 6 * 4, 16 * 16]


def count(model, example):
    layers = mps.layers(model, example)
    return layers, BitOps()(model, layers, OPTIONS)


def multiplications(module, shape):
    """With weights and inputs of 1 and nothing else, the outputs add up to the number of products."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(1 if parameter.ndim > 1 else 0)
        return int(module(torch.ones(shape)).sum())


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Linear(5, 3), (1, 5), 15),
        (nn.Linear(5, 3), (1, 7, 5), 105),
        (nn.Conv1d(4, 6, 3), (1, 4, 10), 6 * 8 * 4 * 3),
        (nn.Conv2d(3, 8, 3, stride=2), (1, 3, 9, 7), 8 * 4 * 3 * 27),
        (nn.Conv2d(4, 6, 3, groups=2), (1, 4, 5, 5), 6 * 9 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (1, 4, 5, 6), 4 * 12 * 9),
        (nn.Conv2d(4, 8, (1, 3), groups=4, dilation=2), (1, 4, 5, 6), 8 * 5 * 2 * 3),
        (nn.Conv3d(2, 3, 2), (1, 2, 3, 3, 3), 3 * 8 * 16),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (1, 4, 10), 40 * 18),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), (1, 4, 5, 5), 100 * 54),
        (nn.ConvTranspose2d(4, 6, 2, groups=2), (1, 4, 5, 5), 100 * 12),
        (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3), 54 * 24),
    ],
)
def test_one_layer_by_hand_and_by_its_multiplications(module, shape, macs):
    layers, found = count(nn.Sequential(module), torch.randn(shape))
    assert multiplications(module, shape) == macs == layers[0].macs == count_macs(module, torch.randn(shape))
    assert found.usage.tolist() == [[macs * product for product in PRODUCTS]]
    assert (found.fixed, found.reference) == (0.0, macs * 256.0)


def test_counts_are_for_one_sample():
    module = nn.Conv2d(3, 4, 3)
    assert count(nn.Sequential(module), torch.randn(5, 3, 6, 6))[1].reference == 4 * 16 * 27 * 256


class Repeats(nn.Module):
    """One layer called three times, once by keyword; an embedding; a layer of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.again, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.again(self.again(self.again(input=x))))


def test_repeated_calls_count_each_time_and_embeddings_nothing():
    layers, found = count(Repeats(), torch.tensor([[1, 2, 3]]))
    assert [layer.name for layer in layers] == ["embed", "again", "head"]
    macs = [0, 3 * 3 * 16, 3 * 8]  # calls x tokens x weights
    assert found.usage.tolist() == [[m * product for product in PRODUCTS] for m in macs]


def test_a_plan_adds_up():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).eval()
    x = torch.randn(2, 1, 4, 4)
    table = mps.profile(model, [x], KLDivergence(), OPTIONS, resources=["bitops"])
    assert usage_of(table, torch.tensor([1, 3]).numpy())["bitops"] == 2 * 4 * 9 * 32 + 24 * 24
    assert table.reference_usage["bitops"] == (72 + 24) * 256


class Attention(nn.Module):
    """Two heads by hand, and a layer that is not decided on."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = (part.reshape(*x.shape[:2], 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.fused:
            y = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.einsum("bhqk,bhkd->bhqd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v)
        return self.out(y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("fused", [True, False])
def test_products_of_activations_and_layers_left_alone_are_fixed_at_16_bits(fused):
    model, x = Attention(fused).eval(), torch.randn(3, 5, 8)
    layers = mps.layers(model, x, exclude=["out"])
    found = BitOps()(model, layers, OPTIONS, example=x)
    attention = 2 * (2 * 5 * 5 * 4)  # q k and p v: heads x queries x keys x head size
    assert found.usage.tolist() == [[5 * 8 * 24 * product for product in PRODUCTS]]
    assert found.fixed == (attention + 5 * 8 * 8) * 256
    assert found.reference == (attention + 5 * 8 * 8 + 5 * 8 * 24) * 256


@pytest.mark.parametrize(("cell", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)], ids=["lstm", "gru", "rnn"])
def test_recurrent_layers_are_seen_inside(cell, gates):
    """Two layers in two directions; each gate reads the input and the state."""
    model = cell(6, 8, num_layers=2, bidirectional=True, batch_first=True).eval()
    enabled = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    steps, first, second = 5, 6 + 8, 16 + 8
    assert count_macs(model, torch.randn(3, steps, 6)) == 3 * steps * 2 * gates * 8 * (first + second)
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == enabled


def test_torch_attention_is_seen_inside():
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    before = torch.backends.mha.get_fastpath_enabled()
    macs = count_macs(model, x) // 2
    assert macs == 5 * (8 * 24 + 8 * 8 + 8 * 16 + 16 * 8) + 2 * (2 * 5 * 5 * 4)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_product_of_two_activations_that_is_decided_counts_the_bits_of_both():
    layer = mps.Layer("scores", "matmul", macs=100)
    assert BitOps()(nn.Identity(), [layer], OPTIONS).usage.tolist() == [[100 * product for product in PRODUCTS]]


@pytest.mark.parametrize(
    ("function", "macs"),
    [
        (lambda x: torch.mv(x[0], torch.ones(3)), 12),
        (lambda x: torch.dot(x[0, 0], x[0, 1]), 3),
        (lambda x: torch.addmm(torch.zeros(4, 4), x[0], x[0].T), 4 * 3 * 4),
        (lambda x: torch.baddbmm(torch.zeros(2, 4, 4), x, x.mT), 2 * 4 * 3 * 4),
    ],
)
def test_other_products(function, macs):
    class Own(nn.Module):
        def forward(self, x):
            return function(x)[None]

    assert count_macs(Own(), torch.ones(2, 4, 3)) == macs
