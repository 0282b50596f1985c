"""The sweep of gradients holds the model, one layer, one batch: whatever the number of layers, precisions, draws, samples."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.estimation import weight_changes
from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients import backward_pass, layer_calls
from mpsearch.models.peak_memory import live_bytes
from mpsearch.sensitivity import EmpiricalFisher, Fisher, FisherProjection, GradientImportance, OutputGradient

WIDTH = 256
LAYER_BYTES = 4 * WIDTH * WIDTH
PIECE_BYTES = LAYER_BYTES // 8
ALL = [FisherProjection(), Fisher(), EmpiricalFisher(), GradientImportance(), OutputGradient()]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Small beside a layer, and nothing that is rounded is kept."""
    monkeypatch.setattr(backward_pass, "CHUNK_BYTES", PIECE_BYTES)
    monkeypatch.setattr(weight_changes, "CHANGED", PIECE_BYTES // 4)
    for part in (weight_changes, layer_calls, backward_pass):
        monkeypatch.setattr(part, "PIECE", PIECE_BYTES // 8)
    monkeypatch.setattr(Context, "quantized", lambda self, layer, precision: self.module(layer).weight.detach() * 0.75)


def peak_bytes(estimator, layers=3, options="w4", samples=2, dtype=torch.float32):
    torch.manual_seed(0)
    blocks = [part for _ in range(layers) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    model = nn.Sequential(*blocks, nn.Linear(WIDTH, 4)).to(dtype)
    batches = [(torch.randn(samples, WIDTH, dtype=dtype), torch.zeros(samples, dtype=torch.long)) for _ in range(2)]
    with live_bytes() as peak:
        mps.profile(model, batches, estimator, mps.precisions(options), loss="cross-entropy")
    return peak.bytes


@pytest.mark.parametrize("estimator", ALL, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(
    "more",
    [{"layers": 12}, {"options": "w8 w7 w6 w5 w4 w3 w2"}, {"samples": 8}],
    ids=["layers", "precisions", "samples"],
)
def test_memory_is_flat(estimator, more):
    assert peak_bytes(estimator, **more) - peak_bytes(estimator) < LAYER_BYTES / 4


def test_memory_is_flat_with_draws():
    assert peak_bytes(FisherProjection(8)) - peak_bytes(FisherProjection(2)) < LAYER_BYTES / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", ALL, ids=lambda one: type(one).__name__)
def test_memory_is_twice_the_largest_layer(estimator, dtype):
    """And pieces: of gradients in float32, of changes, of what is summed in float64."""
    largest_bytes = LAYER_BYTES * torch.empty(0, dtype=dtype).element_size() // 4
    print(type(estimator).__name__, peak_bytes(estimator, dtype=dtype) / largest_bytes)
    assert peak_bytes(estimator, dtype=dtype) < 2 * largest_bytes + 8 * PIECE_BYTES
