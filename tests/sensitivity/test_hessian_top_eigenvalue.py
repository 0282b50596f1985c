"""Largest eigenvalues against dense matrices and closed forms."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.sensitivity import HessianTopEigenvalue


def unit(weight, precision):
    """||D||^2 = 2, so that a score is |lambda|."""
    return weight + (2 / weight.numel()) ** 0.5


def eigenvalues(model, batches, loss, **settings):
    table = mps.profile(
        model, batches, HessianTopEigenvalue(**settings), mps.precisions("w4"), loss=loss, quantizer=unit
    )
    return table, [value for (value,) in table.origin["eigenvalues"].values()]


def quadratic(matrix):
    """1/2 w' A w for a single layer."""
    a = torch.tensor(matrix, dtype=torch.double)
    model = nn.Sequential(nn.Linear(len(a), 1, bias=False)).double()

    def loss(model, batch):
        w = model[0].weight[0]
        return 0.5 * w @ a @ w + 0 * model(batch).sum()

    return model, [torch.ones(1, len(a), dtype=torch.double)], loss


# tests/data/curvature_closed_forms.json: diagonal_quadratic and indefinite_quadratic
@pytest.mark.parametrize(
    ("matrix", "value"),
    [
        (np.diag([0.5, 3.0, -1.25, 7.0, 0.0, 2.0]), 7.0),
        (np.diag([-5.0, 1.0]), -5.0),
        ([[1.0, 2.0], [2.0, -5.0]], -2 - 13**0.5),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0),
    ],
)
def test_quadratic_losses(matrix, value):
    """The sign is kept beside the table; the score is the absolute value."""
    table, (found,) = eigenvalues(*quadratic(np.array(matrix)), tolerance=1e-9)
    assert found == pytest.approx(value, abs=1e-6)
    assert table.sensitivity.item() == pytest.approx(abs(value), abs=1e-6)
    assert table.sensitivity_se is None


# linear_regression, logistic_regression (as two logits) and softmax_regression_zero
X = [[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]


def regression(outputs):
    model = nn.Sequential(nn.Linear(3, outputs, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    return model, torch.tensor(X, dtype=torch.double)


def test_linear_regression():
    model, x = regression(1)
    batch = (x, torch.zeros(6, 1, dtype=torch.double))
    _, (found,) = eigenvalues(model, [batch], lambda m, b: F.mse_loss(m(b[0]), b[1]), tolerance=1e-9)
    assert found == pytest.approx(6.696602003216272, rel=1e-6)


@pytest.mark.parametrize("loss", ["kl", "cross-entropy"])
def test_softmax_regression(loss):
    model, x = regression(3)
    _, (found,) = eigenvalues(model, [(x, torch.tensor([0, 1, 2, 0, 1, 2]))], loss, tolerance=1e-9)
    assert found == pytest.approx(1.116100333869379, rel=1e-6)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def data(sizes=(5, 8, 4)):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, generator=generator, dtype=torch.double), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes
    ]


def dense(model, batches):
    """(layers) eigenvalue of largest absolute value of each block."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = []
    for name in ("0.weight", "2.weight"):
        weight = dict(model.named_parameters())[name].detach()

        def loss(flat, name=name, weight=weight):
            return F.cross_entropy(functional_call(model, {name: flat.reshape(weight.shape)}, (x,)), y)

        values = torch.linalg.eigvalsh(hessian(loss)(weight.flatten()).detach())
        found.append(float(values[values.abs().argmax()]))
    return np.array(found)


def test_blocks_of_a_network():
    table, found = eigenvalues(net(), data(), "cross-entropy", tolerance=1e-7, iterations=500)
    np.testing.assert_allclose(found, dense(net(), data()), rtol=1e-3)
    np.testing.assert_allclose(table.sensitivity[:, 0], np.abs(found), rtol=1e-9)


def test_slices_are_mean_and_deviation_over_batches():
    """Q-BERT: |mean| + standard deviation."""
    table, found = eigenvalues(net(), data(), "cross-entropy", tolerance=1e-7, iterations=500, slices=True)
    each = np.array([dense(net(), [batch]) for batch in data()])
    np.testing.assert_allclose(found, each.mean(0), rtol=1e-3)
    np.testing.assert_allclose(table.sensitivity[:, 0], abs(each.mean(0)) + each.std(0, ddof=1), rtol=1e-3)
    np.testing.assert_allclose(table.sensitivity_se[:, 0], each.std(0, ddof=1) / 3**0.5, rtol=1e-3)


def test_fused_attention_goes_through_its_plain_form():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x):
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            return self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0].mean(1))

    torch.manual_seed(0)
    _, found = eigenvalues(Attention(), [torch.randn(3, 5, 4)], "kl")
    assert all(value > 0 for value in found)


def test_what_it_does_not_score_is_refused():
    with pytest.raises(mps.EstimatorError, match="scores weights, not inputs: w4a8"):
        mps.profile(net(), data(), HessianTopEigenvalue(), mps.precisions("w4a8"))
    with pytest.raises(mps.EstimatorError, match="iterations=0"):
        HessianTopEigenvalue(iterations=0)
    with pytest.raises(mps.EstimatorError, match="tolerance=0"):
        HessianTopEigenvalue(tolerance=0)


def test_layers_that_have_settled_cost_no_more():
    model, batches, loss = quadratic(np.diag([3.0, 3.0]))  # every direction is one of the largest
    table, _ = eigenvalues(model, batches, loss)
    assert table.origin["passes"] == {"forward": 2.0, "backward": 6.0}
