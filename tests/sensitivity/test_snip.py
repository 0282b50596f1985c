"""SNIP against single samples, and against removing weights."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity.snip import SNIP


def double(weight, precision):
    """An error as large as the weight: cells are scores."""
    return 2 * weight


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def test_loop_over_samples():
    model = net()
    batches = [(torch.randn(n, 3).double(), torch.randint(0, 3, (n,))) for n in (4, 2)]
    pairs = [pair for batch in batches for pair in zip(*batch, strict=True)]
    expected = []
    for layer in (model[0], model[2]):
        g = torch.zeros_like(layer.weight)
        for x, y in pairs:
            g += torch.autograd.grad(-model(x[None])[0].log_softmax(-1)[y], layer.weight)[0] / len(pairs)
        expected.append(
            sum(abs(a * b) for a, b in zip(g.flatten().tolist(), layer.weight.flatten().tolist(), strict=True))
        )
    table = mps.profile(model, batches, SNIP(), mps.precisions("w4"), quantizer=double)
    np.testing.assert_allclose(table.sensitivity[:, 0], expected)


def test_removing_weights():
    """The derivative by a mask on single weights, by finite differences."""
    model, x = net(), torch.randn(5, 3).double()
    loss = lambda m, batch: m(batch).square().mean()  # noqa: E731
    table = mps.profile(model, [x], SNIP(), mps.precisions("w4"), loss=loss, quantizer=double)
    total, step = 0.0, 1e-5
    with torch.no_grad():
        for place in range(12):
            values = []
            for sign in (1, -1):
                masked = net()
                masked[2].weight.view(-1)[place] *= 1 + sign * step
                values.append(float(loss(masked, x)))
            total += abs(values[0] - values[1]) / (2 * step)
    assert table.sensitivity[1, 0] == pytest.approx(total, rel=1e-6)


def test_seed():
    model, x = net(), [torch.randn(5, 3).double()]
    first, second = (
        mps.profile(model, x, SNIP(seed), mps.precisions("w4"), quantizer=double).sensitivity for seed in (0, 1)
    )
    assert (first != second).all()
