"""Gradient x weight against scaling whole layers."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity.gradient_weight import GradientWeight
from mpsearch.sensitivity.snip import SNIP


def double(weight, precision):
    return 2 * weight


def scores(model, batches, estimator):
    return mps.profile(model, batches, estimator, mps.precisions("w4"), quantizer=double).sensitivity[:, 0]


def test_scaling_a_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    batch = (torch.randn(6, 2, 3, 3).double(), torch.randint(0, 3, (6,)))
    found, step = scores(model, [batch], GradientWeight()), 1e-5
    with torch.no_grad():
        for row, layer in enumerate((model[0], model[3])):
            original, values = layer.weight.clone(), []
            for sign in (1, -1):
                layer.weight.copy_(original * (1 + sign * step))
                values.append(float(nn.functional.cross_entropy(model(batch[0]), batch[1])))
            layer.weight.copy_(original)
            assert found[row] == pytest.approx(abs(values[0] - values[1]) / (2 * step), rel=1e-6)
    assert (found < scores(model, [batch], SNIP())).all()  # signs cancel


def test_a_layer_in_front_of_a_normalization_scores_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4, eps=0), nn.Linear(4, 3)).double()
    batch = (torch.randn(6, 3).double(), torch.randint(0, 3, (6,)))
    found = scores(model, [batch], GradientWeight())
    assert found[0] < 1e-12 < found[1]
    assert scores(model, [batch], SNIP())[0] > 1e-3


def test_seed():
    model, x = nn.Sequential(nn.Linear(3, 3)), [torch.randn(5, 3)]
    assert scores(model, x, GradientWeight(0)) != scores(model, x, GradientWeight(1))
