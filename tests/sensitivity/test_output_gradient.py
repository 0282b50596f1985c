"""Squared output gradients times squared output errors, and |g w|, against loops over samples."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.sensitivity import GradientImportance, OutputGradient


def error(weight, precision):
    steps = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)
    return torch.cos(1 + 2 * steps) * 0.4 / int(precision.weight)


def shifted(weight, precision):
    return weight + error(weight, precision)


class Net(nn.Module):
    """A convolution, a layer that is called twice, a head on tokens."""

    def __init__(self):
        super().__init__()
        self.conv, self.body, self.head = nn.Conv1d(2, 4, 2), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = self.conv(x).transpose(1, 2)
        return self.head(torch.tanh(self.body(torch.tanh(self.body(y))))).mean(1)


def made():
    torch.manual_seed(0)
    return Net().double(), [(torch.randn(n, 2, 5).double(), torch.randint(0, 3, (n,))) for n in (4, 3)]


def loop(model, batches, options, share):
    """1/2 mean over samples of sum (dT/dY)^2 (dY)^2; `share(log_p, label)` gives pairs of weight and T."""
    names = ["conv", "body", "head"]
    found, count = np.zeros((len(names), len(options))), 0
    for x, y in zip(*map(torch.cat, zip(*batches, strict=True)), strict=True):
        count += 1
        calls = []
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda m, a, out, i=i, calls=calls: calls.append((i, a[0].detach(), out))
            )
            for i, name in enumerate(names)
        ]
        log_p = model(x[None])[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        for weight, scalar in share(log_p, y):
            gradients = torch.autograd.grad(scalar, [out for _, _, out in calls], retain_graph=True)
            for (i, a, out), g in zip(calls, gradients, strict=True):
                module = model.get_submodule(names[i])
                for column, option in enumerate(options):
                    w = shifted(module.weight.detach(), option)
                    run = F.conv1d if isinstance(module, nn.Conv1d) else F.linear
                    difference = run(a, w, module.bias) - out.detach()
                    found[i, column] += 0.5 * weight * float((g.square() * difference.square()).sum())
    return found / count


OPTIONS = mps.precisions("w2 w4")


def test_the_loss_of_given_labels():
    model, batches = made()
    table = mps.profile(model, batches, OutputGradient(), OPTIONS, loss="cross-entropy", quantizer=shifted)
    truth = loop(model, batches, OPTIONS, lambda log_p, y: [(1.0, -log_p[y])])
    np.testing.assert_allclose(table.sensitivity, truth, rtol=1e-6)


def test_random_outputs_have_the_expectation_over_labels():
    model, batches = made()
    table = mps.profile(model, [x for x, _ in batches], OutputGradient(800), OPTIONS, quantizer=shifted)
    truth = loop(model, batches, OPTIONS, lambda log_p, _: [(float(q.exp()), q) for q in log_p])
    np.testing.assert_allclose(table.sensitivity, truth, rtol=0.1)


def test_inputs_that_are_quantized():
    """Weights and inputs at once: one difference of the output."""
    model, batches = made()
    options = mps.precisions("w16a2 w2a2")
    table = mps.profile(
        model, batches, OutputGradient(), options, loss="cross-entropy", quantizer=shifted, exclude=["conv", "body"]
    )
    x = torch.cat([x for x, _ in batches])
    y = torch.cat([y for _, y in batches])
    a = torch.tanh(model.body(torch.tanh(model.body(model.conv(x).transpose(1, 2))))).detach()
    low, high = float(a.min()), float(a.max())
    step = (high - low) / 3
    zero = round(-low / step)
    rounded = (a / step).round().clamp(-zero, 3 - zero) * step
    out = model.head(a)
    (g,) = torch.autograd.grad(F.cross_entropy(out.mean(1), y, reduction="sum"), out)
    for column, option in enumerate(options):
        w = shifted(model.head.weight, option) if option.quantizes_weight else model.head.weight
        difference = F.linear(rounded, w, model.head.bias) - out
        truth = 0.5 * float((g.square() * difference.square()).sum()) / len(x)
        assert table.sensitivity[0, column] == pytest.approx(truth, rel=1e-6)


def test_members_of_a_group_are_added():
    model, batches = made()
    run = {"loss": "cross-entropy", "quantizer": shifted}
    apart = mps.profile(model, batches, OutputGradient(), OPTIONS, groups=(), **run).sensitivity
    table = mps.profile(model, batches, OutputGradient(), OPTIONS, groups={"g": ["conv", "head"]}, **run)
    together = {layer.name: row for layer, row in zip(table.layers, table.sensitivity, strict=True)}
    np.testing.assert_allclose(together["conv"] + together["head"], apart[0] + apart[2], rtol=1e-9)


def test_importance_is_the_sum_of_absolute_products_times_the_relative_error():
    model, batches = made()
    table = mps.profile(model, batches, GradientImportance(), OPTIONS, loss="cross-entropy", quantizer=shifted)
    for row, name in enumerate(("conv", "body", "head")):
        weight, total = model.get_submodule(name).weight, 0.0
        for x, y in zip(*map(torch.cat, zip(*batches, strict=True)), strict=True):
            (g,) = torch.autograd.grad(F.cross_entropy(model(x[None])[0], y), weight)
            total += float((g * weight).abs().sum()) / 7
        for column, option in enumerate(OPTIONS):
            relative = float(error(weight, option).square().sum() / weight.square().sum())
            assert table.sensitivity[row, column] == pytest.approx(total * relative, rel=1e-6)
    assert table.unit == "relative"
