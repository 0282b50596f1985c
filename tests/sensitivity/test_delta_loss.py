"""Gradients at the quantized model, against autograd on a model quantized by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mpsearch as mps
from mpsearch.sensitivity import DeltaLoss


def shifted(weight, precision):
    steps = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)
    return weight + torch.cos(1 + 2 * steps) * 0.8 / int(precision.weight)


def made(sizes=(5, 8)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, [(torch.randn(n, 3).double(), torch.randint(0, 3, (n,))) for n in sizes]


def rounded(x, low, high, levels):
    step = (high - low) / levels
    zero = round(-low / step)
    return (x / step).round().clamp(-zero, levels - zero) * step


def by_hand(model, batches, option, loss):
    """(batches, layers) sum |dT/dW (W_q - W)| + sum |dT/dx_q (x_q - x)| with everything quantized; straight through."""
    everything = torch.cat([x for x, _ in batches])
    with torch.no_grad():
        ranges = [(float(z.min()), float(z.max())) for z in (everything, torch.tanh(model[0](everything)))]
    found = []
    for x, y in batches:
        weights = []
        for layer in (model[0], model[2]):
            weight = layer.weight.detach()
            weights.append((shifted(weight, option) if option.quantizes_weight else weight).requires_grad_())
        points, changes = [], []
        z = x
        for number, layer in enumerate((model[0], model[2])):
            z = torch.tanh(z) if number else z
            if option.quantizes_activation:
                changes.append((rounded(z, *ranges[number], 7) - z).detach())
                points.append((z + changes[-1]).requires_grad_() if not number else z + changes[-1])
                z = points[-1]
            z = F.linear(z, weights[number], layer.bias.detach())
        reference = model(x).detach()
        if loss == "kl":
            p = reference.softmax(1)
            value = (p * (reference.log_softmax(1) - z.log_softmax(1))).sum(1).mean()
        else:
            value = F.cross_entropy(z, y)
        gradients = torch.autograd.grad(value, [*weights, *points])
        row = [
            float((g * (w - layer.weight)).abs().sum().detach())
            for g, w, layer in zip(gradients[:2], weights, (model[0], model[2]), strict=True)
        ]
        for number, change in enumerate(changes):
            row[number] += float((gradients[2 + number] * change).abs().sum())
        found.append(row)
    return np.array(found)


@pytest.mark.parametrize("loss", ["kl", "cross-entropy"])
def test_autograd_at_the_quantized_model(loss):
    model, batches = made()
    options = mps.precisions("w2 w4 w16a3 w2a3")
    table = mps.profile(model, batches, DeltaLoss(), options, loss=loss, quantizer=shifted)
    share = np.array([len(x) for x, _ in batches]) / 13
    for column, option in enumerate(options):
        truth = by_hand(model, batches, option, loss)
        mean = share @ truth
        np.testing.assert_allclose(table.sensitivity[:, column], mean, rtol=1e-6, err_msg=str(option))
        se = np.sqrt(2 / 1 * (share**2) @ (truth - mean) ** 2)
        np.testing.assert_allclose(table.sensitivity_se[:, column], se, rtol=1e-6)
    assert table.unit == "relative"


def test_checkpoints_of_activations_change_nothing():
    class Again(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model[2](checkpoint(self.model[:2], x, use_reentrant=False))

    model, batches = made()
    plain, again = (
        mps.profile(one, batches, DeltaLoss(), mps.precisions("w2a3"), quantizer=shifted, progress=False).sensitivity
        for one in (model, Again(model))
    )
    np.testing.assert_allclose(again, plain, rtol=1e-12)


def test_what_is_not_quantized_costs_nothing():
    model, batches = made()
    table = mps.profile(model, batches, DeltaLoss(), mps.precisions("w16"))
    assert (table.sensitivity == 0).all()
    assert table.origin["passes"] == {"forward": 0, "backward": 0}


def test_one_batch_has_no_standard_error():
    model, batches = made((5,))
    assert np.isnan(mps.profile(model, batches, DeltaLoss(), mps.precisions("w4")).sensitivity_se).all()
