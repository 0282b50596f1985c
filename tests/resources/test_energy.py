"""`energy_j` against a sum by hand."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.resources import Energy, OperationEnergy
from mpsearch.resources.arithmetic import number


def test_by_hand():
    model, x = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(16, 2)), torch.randn(2, 3, 5)
    found = Energy()(model, mps.layers(model, x), mps.precisions("w8a8 w4 w16"), example=x)
    integers, floats, byte = 0.2e-12 + 0.1e-12, 3.7e-12 + 0.9e-12, 1.3e-9 / 8
    rows = []
    for macs, weights, outputs, into, out in ((4 * 4 * 6, 24, 4, 15, 16), (32, 32, 2, 16, 2)):
        eight = (
            macs * integers + ((weights + 4 * outputs) / 2 + into + 4 * out) * byte
        )  # weights are read once for two samples
        four = macs * floats + ((weights / 2 + 4 * outputs) / 2 + 4 * into + 4 * out) * byte
        alone = macs * floats + (4 * weights / 2 + 4 * into + 4 * out) * byte
        rows.append([eight, four, alone])
    assert found.usage.tolist() == [pytest.approx(row) for row in rows]
    assert found.reference == pytest.approx(rows[0][2] + rows[1][2])


@pytest.mark.parametrize(("name", "picojoules"), [("8", 0.2 + 0.1), ("fp16", 1.1 + 0.9), ("fp32", 3.7 + 0.9)])
def test_the_published_points(name, picojoules):
    assert OperationEnergy().mac(number(name, ""), number(name, "")) == pytest.approx(picojoules * 1e-12)


def test_fewer_bits_take_less():
    costs = [OperationEnergy().mac(number(str(bits), ""), number("8", "")) for bits in (2, 3, 4, 8)]
    assert costs == sorted(costs)
    mixed = OperationEnergy().mac(number("4", ""), number("16", "float32"))
    assert mixed == OperationEnergy().mac(number("fp32", ""), number("fp32", ""))  # widened first


def test_own_numbers():
    model, x = nn.Sequential(nn.Linear(4, 2, bias=False)), torch.ones(1, 4)
    own = OperationEnergy(fp32_multiply=2.0, fp16_multiply=1.0, fp32_add=1.0, memory_byte=0.0)
    assert Energy(own)(model, mps.layers(model, x), mps.precisions("w16"), example=x).usage[0, 0] == pytest.approx(24)
