"""Second moments of inputs and output gradients times squared errors, against loops and averages over errors."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.sensitivity import KFACDiagonal

OPTIONS = mps.precisions("w2 w4")


def error(weight, precision):
    steps = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)
    return torch.cos(1 + 2 * steps) * 0.4 / int(precision.weight)


def shifted(weight, precision):
    return weight + error(weight, precision)


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is stored (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.randn(nx, nf))

    def forward(self, x):
        return x @ self.weight


class Pooled(nn.Module):
    """A layer, then a head on the mean over its places."""

    def __init__(self, layer, channels_last):
        super().__init__()
        self.layer, self.head, self.channels_last = layer, nn.Linear(4, 3), channels_last

    def forward(self, x):
        y = torch.tanh(self.layer(x))
        return self.head(y if y.ndim == 2 else y.mean(1) if self.channels_last else y.flatten(2).mean(2))


def patches(module, x):
    """(places, groups, inputs) what one output place sees, by sliding windows."""
    if isinstance(module, nn.Embedding):
        return F.one_hot(x[0], module.num_embeddings).double()[:, None]
    if isinstance(module, nn.Conv2d):
        x = F.pad(x, [module.padding[0]] * 4)
        stride, (height, width) = module.stride[0], module.kernel_size
        rows = range(0, x.shape[2] - height + 1, stride)
        columns = range(0, x.shape[3] - width + 1, stride)
        seen = [x[0, :, i : i + height, j : j + width].flatten() for i in rows for j in columns]
        return torch.stack(seen).reshape(len(seen), module.groups, -1)
    return x.reshape(-1, 1, x.shape[-1])


def form(model, inputs, labels, options=OPTIONS):
    """1/2 sum_ij b_i a_j D_ij^2 of `layer`, by a loop over samples; a: mean over places, b: sum over places."""
    module, a, b = model.layer, 0, 0
    for x, y in zip(inputs, labels, strict=True):
        kept = []
        handle = module.register_forward_hook(lambda m, i, out, kept=kept: kept.append(out))
        loss = F.cross_entropy(model(x[None]), y[None])
        handle.remove()
        (g,) = torch.autograd.grad(loss, kept)
        g = g.reshape(-1, g.shape[-1]) if model.channels_last else g.flatten(2)[0].T
        a = a + patches(module, x[None]).square().mean(0) / len(inputs)
        b = b + g.square().sum(0) / len(inputs)
    found = []
    for option in options:
        weight = module.weight.detach()
        if isinstance(module, Conv1D):
            change = error(weight.T, option)
        elif isinstance(module, nn.Embedding):
            change = error(weight, option).T
        else:
            change = error(weight, option).flatten(1)
        groups, outputs = a.shape[0], len(b)  # type: ignore[attr-defined]
        inputs_of = a.repeat_interleave(outputs // groups, 0)  # type: ignore[attr-defined]
        found.append(0.5 * float((b[:, None] * inputs_of * change.square()).sum()))
    return found


CASES = {
    "linear": (lambda: nn.Linear(5, 4), True, (5,)),
    "linear on tokens": (lambda: nn.Linear(5, 4), True, (6, 5)),
    "Conv1D": (lambda: Conv1D(4, 5), True, (6, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1, stride=2), False, (2, 5, 5)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 4, 2, groups=2), False, (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), False, (4, 5, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), True, None),
}


def made(name, count=12):
    torch.manual_seed(0)
    build, channels_last, shape = CASES[name]
    model = Pooled(build(), channels_last).double()
    inputs = torch.randint(0, 7, (count, 6)) if shape is None else torch.randn(count, *shape).double()
    return model, inputs, torch.randint(0, 3, (count,))


@pytest.mark.parametrize("name", CASES)
def test_a_loop_over_samples(name):
    model, x, y = made(name)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    table = mps.profile(
        model, batches, KFACDiagonal(), OPTIONS, loss="cross-entropy", quantizer=shifted, exclude=["head"]
    )
    np.testing.assert_allclose(table.sensitivity[0], form(model, x, y), rtol=1e-6)


def test_the_standard_error_is_the_jackknife_over_eight_groups():
    model, x, y = made("linear on tokens", 16)
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    table = mps.profile(
        model, batches, KFACDiagonal(), OPTIONS, loss="cross-entropy", quantizer=shifted, exclude=["head"]
    )
    rest = np.array([form(model, x[keep], y[keep]) for keep in (torch.arange(16) % 8 != i for i in range(8))])
    spread = np.sqrt(7 / 8 * ((rest - rest.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(table.sensitivity_se[0], spread, rtol=1e-6)


def test_one_sample_is_exact_on_average_over_errors_of_either_sign():
    """(g^T D x)^2 averaged over all D of entries +-1 is sum g_i^2 x_j^2."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 2)).double(), torch.randn(1, 3).double(), torch.tensor([1])
    table = mps.profile(
        model, [(x, y)], KFACDiagonal(), mps.precisions("w4"), loss="cross-entropy", quantizer=lambda w, p: w + 1
    )
    g = (model(x).softmax(1) - F.one_hot(y, 2))[0].detach()
    total = 0.0
    for signs in itertools.product((-1.0, 1.0), repeat=6):
        change = torch.tensor(signs, dtype=torch.double).reshape(2, 3)
        total += 0.5 * float(g @ change @ x[0]) ** 2 / 64
    assert table.sensitivity.item() == pytest.approx(total, rel=1e-9)


def test_errors_of_inputs_are_added():
    """1/2 sum b_i E[(Q(x)_j - x_j)^2] W_ij^2."""
    model, x, y = made("linear")
    options = mps.precisions("w2 w16a2 w2a2")
    table = mps.profile(
        model, [(x, y)], KFACDiagonal(), options, loss="cross-entropy", quantizer=shifted, exclude=["head"]
    )
    weights, inputs, both = table.sensitivity[0]
    assert both == pytest.approx(weights + inputs, rel=1e-9)
    step = (float(x.max()) - float(x.min())) / 3
    zero = round(-float(x.min()) / step)
    noise = ((x / step).round().clamp(-zero, 3 - zero) * step - x).square().mean(0)
    y_out = model.layer(x).detach().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model.head(torch.tanh(y_out)), y, reduction="sum"), y_out)
    truth = 0.5 * float((g.square().mean(0)[:, None] * noise * model.layer.weight.square()).sum())
    assert inputs == pytest.approx(truth, rel=1e-6)


def test_layers_without_second_moments_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(mps.EstimatorError, match=r"no second moments for a ConvTranspose2d.*FisherProjection"):
        mps.profile(model, [torch.randn(2, 2, 3, 3)], KFACDiagonal(), OPTIONS)
