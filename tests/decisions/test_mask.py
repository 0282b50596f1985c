"""`layers(target=...)`: cells that a target refuses are not in the table."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.core.layer import Layer
from mpsearch.decisions.mask import decidable, refused_options
from mpsearch.sensitivity import FisherProjection, KLDivergence
from mpsearch.targets.rules import TARGETS


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)).eval()


X = torch.randn(4, 1, 6, 6)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_table_holds_what_the_rules_allow(target):
    options = mps.precisions("w3 w4 w4g32 w8 w8a8 wq8_0 wnf4g64 w16")
    layers = mps.layers(model(), X, target=target)
    table = mps.profile(model(), [X], KLDivergence(), options, layers=layers, progress=False)
    for row, layer in enumerate(layers):
        for column, option in enumerate(options):
            assert table.allowed[row, column] == (TARGETS[target].refusal(layer, option) is None), (layer.name, option)
    assert table.allowed[:, -1].all()


def test_without_a_target_nothing_is_refused():
    assert not refused_options(mps.layers(model(), X), mps.precisions("w2 w4g7")).any()


def test_a_group_is_refused_together():
    layers = [
        Layer("a", "linear", (8, 64), group="g", target="onnxruntime"),
        Layer("b", "linear", (8, 48), group="g", target="onnxruntime"),
        Layer("c", "linear", (8, 64), target="onnxruntime"),
    ]
    found = refused_options(layers, mps.precisions("w4g32 w4g16 w16"))
    assert found.tolist() == [[True, False, False], [True, False, False], [False, False, False]]


def test_a_layer_without_an_option_is_left_alone_with_a_word():
    layers = mps.layers(model(), X, target="onnxruntime")
    reason = "onnxruntime cannot express w4g32 for '0': it quantizes linear, not conv2d"
    with pytest.warns(UserWarning, match=re.escape(f"no option fits 0: left alone ({reason})")):
        table = mps.profile(model(), [X], KLDivergence(), mps.precisions("w4g32"), layers=layers, progress=False)
    assert [layer.name for layer in table.layers] == ["2", "4"]
    assert table.origin["undecided"]["without_option"] == {"0": reason}
    with pytest.raises(
        mps.TableError, match=r"of w4g128 nothing is left for '0', nor for any other layer: add an option"
    ):
        mps.profile(model(), [X], KLDivergence(), mps.precisions("w4g128"), layers=layers, progress=False)


class Small(nn.Module):
    """A gate of 4 columns beside layers of 256."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.gate, self.b = nn.Linear(256, 256), nn.Linear(4, 4), nn.Linear(256, 8)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.b(h) + self.gate(h[:, :4]).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("target", "options", "decided"),
    [
        (None, "wq4_k wq8_0", "a b"),
        (None, "wq4_k wq8_0 w8", "a gate b"),
        (None, "wq2_k wiq4_xs", "a b"),
        (None, "w4g64 w8g64", "a gate b"),  # one short group
        (None, "wmxfp4 w8", "a gate b"),
        ("mlx", "w4g64 w8g64", "a b"),
        ("mlx", "w4g64 w8g64 w16", "a gate b"),
        ("gguf", "wq4_k wq8_0", "a b"),
        ("hqq", "w4g64 w8g64", "a b"),
        ("onnxruntime", "w4g32 w8g32", "a b"),
        ("gptqmodel", "w4g32 w8g32", "a"),
    ],
)
def test_layers_smaller_than_a_group_do_not_stop_a_search(target, options, decided):
    net, data = Small(), [torch.randn(12, 256, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = mps.search(
            net,
            data,
            mps.Budget(memory_bytes="90%"),
            mps.precisions(options),
            layers=mps.layers(net, data[0], target=target),
            max_passes=25,
            progress=False,
        )
    left = [name for name in ("a", "gate", "b") if name not in decided.split()]
    assert list(result.plan) == decided.split()
    words = f"no option fits {', '.join(left)}: left alone"
    assert any(words in str(one.message) for one in caught) == bool(left)
    assert (words in str(result)) == bool(left)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_fast_search_ends_early_where_one_plan_is_left():
    """Of the two options one fits no layer, and the small gate has none: what is left is measured."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4), nn.Linear(4, 3))
    data = [torch.randn(16, 64) for _ in range(4)]
    with pytest.warns(UserWarning, match="no option fits 3: left alone"):
        result = mps.search(
            net, data, mps.Budget(memory_bytes="90%"), mps.precisions("wq4_k wq8_0"), effort="fast", progress=False
        )
    assert {name: str(precision) for name, precision in result.plan.items()} == {"0": "wq8_0", "2": "wq8_0"}


def test_a_group_with_a_member_that_no_option_fits_is_left_alone_whole():
    layers = [
        Layer("a", "linear", (8, 256), group="g"),
        Layer("b", "linear", (8, 4), group="g"),
        Layer("c", "linear", (8, 256)),
    ]
    with pytest.warns(UserWarning, match="no option fits a, b: left alone"):
        left, reasons = decidable(layers, mps.precisions("wq4_k"))
    assert ([layer.name for layer in left], list(reasons)) == (["c"], ["a", "b"])


def test_unknown_targets_are_refused():
    with pytest.raises(mps.TableError, match=r"unknown target 'vlm'.*vllm"):
        mps.layers(model(), X, target="vlm")


def test_the_allowed_cells_are_those_of_a_table_without_a_target(tmp_path):
    options = mps.precisions("w4 w4g32 w16")
    estimators = [KLDivergence(), FisherProjection()]
    masked = mps.profile(
        model(), [X], estimators, options, layers=mps.layers(model(), X, target="onnxruntime"), progress=False
    )
    layers = mps.layers(model(), X)
    for table, estimator in zip(masked, estimators, strict=True):
        free = mps.profile(model(), [X], estimator, mps.precisions("w4 w16"), layers=layers, progress=False)
        np.testing.assert_allclose(table.sensitivity[:, 2], free.sensitivity[:, 1])
        table.save(tmp_path / "table.csv")
        loaded = mps.CostTable.load(tmp_path / "table.csv")
        assert loaded == table
        np.testing.assert_array_equal(loaded.allowed, table.allowed)


class Qkv(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x) * self.k_proj(x + 1) * self.v_proj(x + 2)


def test_what_a_target_joins_is_grouped_by_its_names():
    x = torch.randn(2, 4)
    assert {layer.group for layer in mps.layers(Qkv(), x)} == {""}
    assert {layer.group for layer in mps.layers(Qkv(), x, target="vllm")} == {"q_proj (one matrix in vllm)"}
    assert {layer.group for layer in mps.layers(Qkv(), x, target="vllm", cut=["*"])} == {"q_proj (one matrix in vllm)"}
    assert {layer.group for layer in mps.layers(Qkv(), x, target="torchao")} == {""}


class Gates(nn.Module):
    """Gates of 48 rows beside a layer of 64 x 64."""

    def __init__(self):
        super().__init__()
        self.wide, self.gates = nn.Linear(64, 64), nn.Linear(64, 48)

    def forward(self, x):
        return self.gates(torch.relu(self.wide(x)))


@pytest.mark.parametrize(
    ("target", "taken"), [("auto-round", False), ("gptqmodel", False), ("vllm", True), ("mlx", True)]
)
def test_rows_are_taken_as_each_tool_takes_them(target, taken):
    options = mps.precisions("w4g32 w16")
    refused = refused_options(mps.layers(Gates(), torch.randn(2, 64), target=target), options)
    assert refused.tolist() == [[False, False], [not taken, False]]


def test_what_lies_inside_a_module_that_the_target_sees_as_one_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    with pytest.warns(
        UserWarning, match=r"torchao has no name for attention.k_proj, attention.out_proj, attention.q_proj"
    ):
        found = mps.layers(Net(), torch.randn(2, 3, 4), target="torchao")
    assert [layer.name for layer in found] == ["head"]


def test_a_search_stays_with_what_the_target_has():
    torch.manual_seed(0)
    net = model()
    batches = [torch.randn(16, 1, 6, 6) for _ in range(4)]
    found = mps.search(
        net,
        batches,
        mps.Budget(memory_bytes="60%"),
        mps.precisions("w3g32 w4g32 w8g32 w16"),
        layers=mps.layers(net, X, target="onnxruntime"),
        effort="fast",
        progress=False,
    )
    layers = {layer.name: layer for layer in mps.layers(net, X)}
    assert all(
        TARGETS["onnxruntime"].refusal(layers[name], precision) is None for name, precision in found.plan.items()
    )
