"""Synaptic flow against products of absolute matrices."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity.synflow import Synflow


def double(weight, precision):
    return 2 * weight


def scores(model, batches, estimator):
    return mps.profile(model, batches, estimator, mps.precisions("w4"), quantizer=double).sensitivity[:, 0]


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2, bias=False)), [torch.randn(4, 3)]


def test_products_of_matrices():
    model, batches = chain()
    a, b = (model[i].weight.detach().double().abs().numpy() for i in (0, 2))
    before, after = a @ np.ones(3), np.ones(2) @ b  # flow into the second layer, and out of the first
    first = sum(after[i] * a[i, j] for i in range(5) for j in range(3))
    second = sum(b[i, j] * before[j] for i in range(2) for j in range(5))
    np.testing.assert_allclose(scores(model, batches, Synflow("sum")), [first, second])
    np.testing.assert_allclose(scores(model, batches, Synflow("mean")), [first / 15, second / 10])


def test_flow_is_conserved_so_the_sum_tells_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2, bias=False),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 2, bias=False),
    )
    found = scores(model, [torch.randn(2, 1, 5, 5)], Synflow("sum"))
    assert (found > 0).all()
    np.testing.assert_allclose(found, found[0])


def test_data_signs_and_running_means_do_not_matter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    first = scores(model, [torch.randn(4, 3)], Synflow())
    with torch.no_grad():
        model[1].running_mean.normal_()
        for parameter in model.parameters():
            parameter.mul_(torch.where(torch.rand_like(parameter) < 0.5, -1.0, 1.0))
    np.testing.assert_array_equal(first, scores(model, [torch.randn(7, 3)], Synflow()))


def test_deep_networks_need_double_precision():
    layers = [nn.Linear(100, 100, bias=False) for _ in range(20)]
    for layer in layers:
        nn.init.constant_(layer.weight, 10.0)
    layers[0].weight.data[:, ::2] *= -1  # the model itself gives zeros
    found = scores(nn.Sequential(*layers), [torch.ones(1, 100)], Synflow("sum"))
    np.testing.assert_allclose(found, 100 * 1000.0**20)  # 1e62: float32 ends at 3e38


def test_errors():
    with pytest.raises(mps.EstimatorError, match="reduction='max'"):
        Synflow("max")
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(30)])
    for layer in model:
        nn.init.constant_(layer.weight, 1e20)
    with pytest.raises(mps.EstimatorError, match="is inf, expected a finite number"):
        scores(model.double(), [torch.full((1, 1), 1e-300).double()], Synflow())
