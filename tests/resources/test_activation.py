"""`activation_bytes` against a tracker of live memory, and against tensors listed by hand."""

import itertools

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.core.problem import usage_of
from mpsearch.models.peak_memory import live_bytes
from mpsearch.resources import ActivationBytes


class Residual(nn.Module):
    """x -> conv -> relu -> conv, plus x; then a head. The sum reads the input of the first convolution too."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(4 * 25, 3)

    def forward(self, x):
        x = self.stem(x).relu_()
        y = self.b(self.a(x).relu())
        return self.head((x + y).flatten(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, ids):
        x = self.embed(ids)
        y = self.norm(x)
        return x + self.o(nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))


MODELS = [
    (
        nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 5), nn.ReLU(inplace=True), nn.Linear(5, 30)),
        torch.randn(3, 6),
    ),
    (Residual(), torch.randn(3, 2, 5, 5)),
    (Block(), torch.randint(7, (3, 6))),
]


@pytest.mark.parametrize(("model", "x"), MODELS)
def test_the_unquantized_peak_is_that_of_live_bytes(model, x):
    model.eval()
    found = ActivationBytes()(model, mps.layers(model, x), mps.precisions("w4"), example=x)
    with torch.no_grad(), live_bytes() as peak:
        model(x[:1])
    held = x[:1].numel() * x.element_size()
    assert found.reference == peak.bytes + held  # one sample, its input held all along
    assert (found.usage.sum(1)[:, 0] + found.fixed).max() == found.reference


def test_by_hand():
    """A chain: the input, what each layer writes, and what each activation function writes."""
    model, x = MODELS[0]
    layers = mps.layers(model, x)
    options = mps.precisions("w16 w8a8 w4a4")
    found = ActivationBytes()(model, layers, options, example=x)
    table = mps.CostTable(
        layers, options, [[0.0] * 3] * 3, peaks={"activation_bytes": mps.Peak(found.usage, found.fixed)}
    )
    share = [1, 1 / 4, 1 / 8]  # of float32
    for first in range(3):
        for second in range(3):
            for third in range(3):
                start, hidden, narrow = 24 * share[first], 160 * share[second], 20 * share[third]
                steps = [
                    start + 160,  # the first layer writes what ReLU reads: left alone
                    start + 160 + hidden,
                    start + hidden + narrow,  # the second ReLU works in place, before the third layer reads
                    start + narrow + 120,
                ]
                chosen = torch.tensor([first, second, third]).numpy()
                assert usage_of(table, chosen)["activation_bytes"] == max(steps)


@pytest.mark.parametrize(("model", "x"), MODELS)
def test_steps_that_are_left_out_are_never_the_peak(model, x, monkeypatch):
    layers, options = mps.layers(model.eval(), x), mps.precisions("w16 w8a8 w4a4")
    few = ActivationBytes()(model, layers, options, example=x)
    monkeypatch.setattr("mpsearch.resources.activation._uncovered", lambda steps: list(range(len(steps))))
    every = ActivationBytes()(model, layers, options, example=x)
    assert len(few.usage) <= len(every.usage)
    rows = range(len(layers))
    for columns in itertools.product(range(3), repeat=len(layers)):
        peaks = [(found.usage[:, rows, columns].sum(1) + found.fixed).max() for found in (few, every)]
        assert peaks[0] == peaks[1]


def test_a_tensor_that_a_sum_reads_too_is_left_alone():
    model, x = MODELS[1]
    layers = mps.layers(model, x)
    found = ActivationBytes()(model.eval(), layers, mps.precisions("w8a8 w16"), example=x)
    row = [layer.name for layer in layers].index("a")
    assert not found.usage[:, row].any()
    assert found.usage[:, [layer.name for layer in layers].index("b")].any()


def test_readers_of_one_group_share_a_precision_and_so_the_tensor():
    model, x = MODELS[2]
    grouped = mps.layers(model, x, groups={"qkv": ["q", "k", "v"]})
    loose = [mps.Layer(one.name, one.kind, one.weight_shape, one.macs) for one in grouped]
    options = mps.precisions("w8a8")
    together, apart = (ActivationBytes()(model, layers, options, example=x) for layers in (grouped, loose))
    rows = [grouped.index(next(one for one in grouped if one.name == name)) for name in "qkv"]
    assert together.usage[:, rows].any()
    assert not apart.usage[:, rows].any()


@pytest.mark.parametrize(("model", "x"), MODELS)
def test_the_model_is_left_as_it_was(model, x):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ActivationBytes()(model, mps.layers(model, x), mps.precisions("w8a8"), example=x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_block_formats_count_their_scales():
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.ones(1, 64)
    options = mps.precisions("w8amxfp8 wnvfp4anvfp4 w8aq8_0")
    found = ActivationBytes()(model, mps.layers(model, x), options, example=x)
    assert found.usage[0, 0].tolist() == [64 + 2, 32 + 4, 68]
