"""Eigenvalues and traces against dense Hessians."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

import mpsearch as mps
from mpsearch.sensitivity.hawq_proxies import HAWQProxy, HAWQV2Proxy


def double(weight, precision):
    return 2 * weight


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def data(sizes=(6, 3)):
    torch.manual_seed(1)
    return [(2 * torch.randn(n, 3).double(), torch.randint(0, 3, (n,))) for n in sizes]


def dense(model, batch):
    """Hessian of the cross-entropy by all weights, 24 x 24."""

    def loss(flat):
        put = {"0.weight": flat[:12].reshape(4, 3), "0.bias": model[0].bias, "2.weight": flat[12:].reshape(3, 4)}
        return nn.functional.cross_entropy(functional_call(model, put, (batch[0],)), batch[1])

    flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    return hessian(loss)(flat).detach().numpy()


def table(estimator, batches=None, loss="cross-entropy", groups="auto"):
    return mps.profile(
        net(), batches or data(), estimator, mps.precisions("w4"), loss=loss, groups=groups, quantizer=double
    )


def test_top_eigenvalue():
    model, batches = net(), data()
    expected = np.zeros(2)
    for batch in batches:
        matrix = dense(model, batch)
        blocks = matrix[:12, :12], matrix[12:, 12:]
        expected += len(batch[0]) / 9 * np.array([np.abs(np.linalg.eigvalsh(block)).max() for block in blocks])
    np.testing.assert_allclose(table(HAWQProxy(60)).sensitivity[:, 0], expected, rtol=1e-3)


def test_a_group_is_one_block():
    batches = data((6,))
    found = table(HAWQProxy(60), batches, groups={"all": ["0", "2"]}).sensitivity[:, 0]
    assert found.sum() == pytest.approx(np.abs(np.linalg.eigvalsh(dense(net(), batches[0]))).max(), rel=1e-3)


def test_the_largest_magnitude_counts():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    loss = lambda m, batch: (torch.tensor([[-2.5, 0.5]]) * m[0].weight ** 2).sum() + 0 * m(batch).sum()  # noqa: E731
    found = mps.profile(model, [torch.ones(1, 2)], HAWQProxy(), mps.precisions("w4"), loss=loss, quantizer=double)
    assert found.sensitivity[0, 0] == pytest.approx(5)


def test_trace():
    model, batches = net(), data()
    expected = np.zeros(2)
    for batch in batches:
        diagonal = dense(model, batch).diagonal()
        expected += len(batch[0]) / 9 * np.array([diagonal[:12].sum(), diagonal[12:].sum()])
    found = table(HAWQV2Proxy(400))
    assert (abs(found.sensitivity[:, 0] - expected) < 4 * found.sensitivity_se[:, 0]).all()
    assert (found.sensitivity_se[:, 0] < 0.2 * abs(expected)).all()


def test_standard_errors_are_the_scatter_over_seeds():
    found = [table(HAWQV2Proxy(32, seed)) for seed in range(40)]
    scatter = np.std([t.sensitivity[:, 0] for t in found], axis=0, ddof=1)
    claimed = np.sqrt(np.mean([t.sensitivity_se[:, 0] ** 2 for t in found], axis=0))
    assert (abs(np.log(claimed / scatter)) < 0.4).all()


def test_a_linear_loss_has_no_curvature():
    linear = lambda m, batch: m[0].weight.sum() + m[2].weight.sum() + 0 * m(batch[0]).sum().detach()  # noqa: E731
    for estimator in (HAWQProxy(3), HAWQV2Proxy(2)):
        assert (table(estimator, loss=linear).sensitivity == 0).all()


def test_settings():
    assert (table(HAWQProxy(2)).sensitivity != table(HAWQProxy(2, seed=1)).sensitivity).all()
    assert (table(HAWQV2Proxy(2)).sensitivity != table(HAWQV2Proxy(2, seed=1)).sensitivity).all()
    with pytest.raises(mps.EstimatorError, match="num_iterations=0"):
        HAWQProxy(0)
    with pytest.raises(mps.EstimatorError, match="num_samples=1"):
        HAWQV2Proxy(1)
