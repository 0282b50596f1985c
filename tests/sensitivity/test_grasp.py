"""GraSP against the dense Hessian of all weights together."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

import mpsearch as mps
from mpsearch.sensitivity.grasp import GraSP


def double(weight, precision):
    return 2 * weight


def scores(model, batches, estimator, loss=None):
    table = mps.profile(model, batches, estimator, mps.precisions("w4"), loss=loss, quantizer=double)
    return table.sensitivity[:, 0]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def test_dense_hessian():
    model = net()
    batches = [(torch.randn(n, 3).double(), torch.randint(0, 3, (n,))) for n in (4, 2)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(flat):
        first, second = flat[:12].reshape(4, 3), flat[12:].reshape(3, 4)
        put = {"0.weight": first, "0.bias": model[0].bias, "2.weight": second}
        return nn.functional.cross_entropy(functional_call(model, put, (x,)), y)

    flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    product = flat * (hessian(loss)(flat) @ jacrev(loss)(flat))
    expected = [abs(float(product[:12].sum().detach())), abs(float(product[12:].sum().detach()))]
    np.testing.assert_allclose(scores(model, batches, GraSP()), expected)


def test_a_linear_loss_has_no_curvature():
    model = net()
    linear = lambda m, batch: m[0].weight.sum() + m[2].weight.sum() + 0 * m(batch).sum().detach()  # noqa: E731
    assert (scores(model, [torch.randn(5, 3).double()], GraSP(), linear) == 0).all()


def test_seed_and_errors():
    model, x = net(), [torch.randn(5, 3).double()]
    assert (scores(model, x, GraSP(0)) != scores(model, x, GraSP(1))).all()
    with pytest.raises(mps.EstimatorError, match="cannot be differentiated"):
        scores(model, x, GraSP(), lambda m, batch: m(batch).sum().detach())
