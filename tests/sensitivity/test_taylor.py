"""First-order change of the loss, against finite differences."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.sensitivity import Taylor


def error(weight, precision):
    steps = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)
    return torch.cos(int(precision.weight) + 2 * steps)


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, [(torch.randn(n, 3).double(), torch.randint(0, 3, (n,))) for n in (5, 8)]


def loss_of(model, batches):
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        return float(F.cross_entropy(model(x), y))


OPTIONS = mps.precisions("w2 w3 w4")


def test_the_difference_of_the_loss_at_tiny_errors():
    model, batches = made()
    size = 1e-6
    tables = mps.profile(
        model, batches, [Taylor(signed=True), Taylor()], OPTIONS, quantizer=lambda w, p: w + size * error(w, p)
    )
    truth = np.zeros((2, 3))
    for row, layer in enumerate((0, 2)):
        for column, option in enumerate(OPTIONS):
            values = []
            for sign in (1, -1):
                changed = copy.deepcopy(model)
                with torch.no_grad():
                    changed[layer].weight += sign * size * error(model[layer].weight, option)
                values.append(loss_of(changed, batches))
            truth[row, column] = (values[0] - values[1]) / 2
    assert (truth < 0).any()
    assert (truth > 0).any()
    np.testing.assert_allclose(tables[0].sensitivity, truth, rtol=1e-6)
    np.testing.assert_allclose(tables[1].sensitivity, abs(truth), rtol=1e-6)
    assert [table.unit for table in tables] == ["nats", "relative"]
    np.testing.assert_array_equal(tables[0].sensitivity_se, tables[1].sensitivity_se)


def test_inputs_that_are_quantized():
    """<dloss/dY, Y_o - Y> of a layer, whatever lies behind it."""
    model, batches = made()
    table = mps.profile(
        model, batches, Taylor(signed=True), mps.precisions("w16a3"), loss="cross-entropy", exclude=["2"]
    )
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    step = (float(x.max()) - float(x.min())) / 7
    zero = round(-float(x.min()) / step)
    rounded = (x / step).round().clamp(-zero, 7 - zero) * step
    out = model[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model[2](torch.tanh(out)), y), out)
    truth = float((g * (model[0](rounded) - out)).sum())
    assert table.sensitivity.item() == pytest.approx(truth, rel=1e-6)


def test_an_own_loss():
    model, batches = made()

    def own(model, batch):
        return model(batch[0]).square().mean()

    table = mps.profile(
        model, batches, Taylor(signed=True), OPTIONS, loss=own, quantizer=lambda w, p: w + 1e-3 * error(w, p)
    )
    for row, layer in enumerate((0, 2)):
        truth = 0.0
        for x, _ in batches:
            (g,) = torch.autograd.grad(model(x).square().mean(), model[layer].weight)
            truth += float((g * 1e-3 * error(model[layer].weight, OPTIONS[0])).sum()) * len(x) / 13
        assert table.sensitivity[row, 0] == pytest.approx(truth, rel=1e-6)
