"""The promise of the unit: tables in nats predict the measured divergence at small errors, within 10 %."""

import functools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.sensitivity import (
    Fisher,
    FisherProjection,
    GaussNewtonTrace,
    HessianAugmented,
    HessianTrace,
    KFACDiagonal,
    KLDivergence,
)

OPTIONS = mps.precisions("w2 w3 w4 w5 w6 w7 w8")
RELATIVE = 0.01  # errors against the weight: those of 8 bits


def noise(weight, precision):
    """A draw of random errors for each precision, without preferred direction, all of the same size."""
    generator = torch.Generator().manual_seed(int(precision.weight) * weight.numel())
    draw = torch.randn(weight.shape, generator=generator)
    return weight + RELATIVE * weight.norm() / draw.norm() * draw


@functools.cache
def trained():
    """A small network on scikit-learn's digits, right on 97 of 100 images, and 256 images."""
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.Tanh(),
        nn.Linear(16, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(300):
        at = torch.arange(step * 64, step * 64 + 64) % 1500
        optimizer.zero_grad()
        F.cross_entropy(model(x[at]), y[at]).backward()
        optimizer.step()
    model.eval()
    assert (model(x[1500:]).argmax(1) == y[1500:]).float().mean() > 0.85
    return model, [x[:128], x[128:256]]


def damage(model, batches, name, weight):
    """Mean divergence with another weight."""
    with torch.no_grad():
        found = []
        for x in batches:
            reference = model(x).double().log_softmax(1)
            now = functional_call(model, {name: weight}, (x,)).double().log_softmax(1)
            found.append((reference.exp() * (reference - now)).sum(1).mean())
    return float(torch.stack(found).mean())


@functools.cache
def all_directions():
    """(layers) mean measured divergence over errors of one size along all directions of a random orthogonal basis.

    Of a quadratic form that mean is the one over all isotropic errors, without the scatter of draws.
    """
    model, batches = trained()
    found = []
    for name, parameter in model.named_parameters():
        if not name.endswith("weight"):
            continue
        weight, generator = parameter.detach(), torch.Generator().manual_seed(0)
        basis, _ = torch.linalg.qr(torch.randn(weight.numel(), weight.numel(), generator=generator))
        size = RELATIVE * weight.norm()
        found.append(np.mean([damage(model, batches, name, weight + size * v.reshape(weight.shape)) for v in basis]))
    return np.array(found)


@pytest.mark.parametrize("estimator", [FisherProjection(30), HessianAugmented(30, seed=1)], ids=type)
def test_the_real_errors(estimator):
    """Cell by cell: the divergence of just these errors."""
    model, batches = trained()
    predicted, measured = mps.profile(model, batches, [estimator, KLDivergence()], OPTIONS, quantizer=noise)
    np.testing.assert_allclose(predicted.sensitivity, measured.sensitivity, rtol=0.1)


@pytest.mark.parametrize(
    "estimator", [KFACDiagonal(30), Fisher(400), GaussNewtonTrace(60), HessianTrace(400)], ids=type
)
def test_errors_without_preferred_direction(estimator):
    model, batches = trained()
    table = mps.profile(model, batches, estimator, OPTIONS[:1], quantizer=noise)
    if isinstance(estimator, KFACDiagonal):
        # takes inputs and gradients as independent, and gradients at the places of a convolution as uncorrelated
        np.testing.assert_allclose(table.sensitivity[1:, 0], all_directions()[1:], rtol=0.15)
    else:
        np.testing.assert_allclose(table.sensitivity[:, 0], all_directions(), rtol=0.1)
