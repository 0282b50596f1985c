"""Entropy of feature maps against white noise sent through layers."""

import math

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity.qe import QE


def score(layer, example):
    table = mps.profile(nn.Sequential(layer), [example], QE(), mps.precisions("w4"), quantizer=lambda w, p: 2 * w)
    return table.sensitivity[0, 0]


@pytest.mark.parametrize(
    ("layer", "shape", "channels"),
    [
        (nn.Linear(8, 5, bias=False), (20000, 8), 5),
        (nn.Conv2d(3, 4, 3, bias=False), (200, 3, 12, 12), 4),
        (nn.Conv2d(4, 4, 3, groups=4, bias=False), (200, 4, 12, 12), 4),
    ],
)
def test_white_noise(layer, shape, channels):
    torch.manual_seed(0)
    nn.init.normal_(layer.weight, 0.1, 0.5)
    x = torch.randn(shape)
    with torch.no_grad():
        sigma = float(layer(x).var(0).mean().sqrt() if len(shape) == 2 else layer(x).var((0, 2, 3)).mean().sqrt())
    assert score(layer, x[:2]) == pytest.approx(math.log(channels) + math.log(sigma), abs=0.02)


def test_embedding():
    torch.manual_seed(0)
    layer = nn.Embedding(500, 6)
    sigma = float(layer(torch.randint(0, 500, (20000,))).detach().std())
    assert score(layer, torch.tensor([[1, 2]])) == pytest.approx(math.log(6) + math.log(sigma), abs=0.02)


def test_it_is_never_negative():
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, 1e-3)
    assert score(layer, torch.ones(1, 3)) == 0


def test_each_use_of_a_shared_weight_counts():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    alone = [score(nn.Embedding(5, 3, _weight=model[0].weight), torch.tensor([[1]]))]
    model[1].weight = model[0].weight
    linear = nn.Linear(3, 5, bias=False)
    linear.weight = model[0].weight
    alone.append(score(linear, torch.ones(1, 3)))
    table = mps.profile(model, [torch.tensor([[1]])], QE(), mps.precisions("w4"), quantizer=lambda w, p: 2 * w)
    assert table.sensitivity.sum() == pytest.approx(sum(alone))
