"""Memory of plans in a model: flat in the number of plans and of precisions."""

import itertools

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models.peak_memory import live_bytes

WIDTH, DEPTH, ROWS = 96, 6, 8
LAYER_BYTES = 4 * WIDTH * WIDTH


@pytest.fixture(autouse=True)
def no_room(monkeypatch):
    """Nothing is held in memory, as it is in effect for a large model."""
    monkeypatch.setattr("mpsearch.quantizers.rounded_weights.ROOM_BYTES", 0)


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(DEPTH)]
    return nn.Sequential(*layers), [torch.randn(ROWS, WIDTH) for _ in range(2)]


def peak_bytes(options, count):
    """The most that tensors take while so many plans of these precisions are measured."""
    model, batches = network()
    names = [name for name, _ in model.named_children()]
    choices = itertools.islice(itertools.cycle(mps.precisions(options)), count + DEPTH)
    row = list(choices)
    plans = [mps.Plan(dict(zip(names, row[place : place + DEPTH], strict=True))) for place in range(count)]
    with mps.Calibration(model, batches, progress=False, metric="mse") as calibration:
        calibration.measure(plans)  # rounds each weight, a part of the rows at a time
        with live_bytes() as peak:
            calibration.measure(plans)
    return peak.bytes


def test_plans_and_precisions_take_no_more_memory():
    """One unpacked layer is in the model at a time, whatever the number of plans and of precisions."""
    base = peak_bytes("w4", 1)
    assert LAYER_BYTES < base < 2 * LAYER_BYTES + 8 * 4 * ROWS * WIDTH
    assert peak_bytes("w4", 6) == base
    many = peak_bytes("w3 w4 w5 w6", 12)
    assert many <= base + LAYER_BYTES  # codes of 6 bits take more while they are unpacked
    assert peak_bytes("w3 w4 w5 w6", 24) == peak_bytes("w6", 1) == many
