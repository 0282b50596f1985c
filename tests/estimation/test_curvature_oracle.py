"""Hessian-vector products, traces, eigenvalues and Kronecker factors against curvlinops, a library of curvature matrices."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.estimation.gradients.hessian import gradient, hessian_products
from mpsearch.sensitivity import GaussNewtonTrace, HessianTopEigenvalue, HessianTrace, KFACDiagonal

with warnings.catch_warnings():  # of the libraries that it imports
    warnings.simplefilter("ignore")
    curvlinops = pytest.importorskip("curvlinops")  # make installs it, without what it asks for in vain

SIZES = (5, 8, 4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()


def weights(model: nn.Module) -> list[nn.Parameter]:
    return list(model.parameters())


def labelled() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, generator=generator, dtype=torch.double), torch.randint(0, 3, (n,), generator=generator))
        for n in SIZES
    ]


def numbered(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Inputs with the outputs of the model itself, at which squared errors have their minimum."""
    return [(x, model(x).detach()) for x, _ in labelled()]


def dense(operator: Any) -> Tensor:
    return torch.as_tensor(operator @ torch.eye(operator.shape[1], dtype=torch.double)).detach()


def blocks(matrix: Tensor, model: nn.Module) -> list[Tensor]:
    sizes = [w.numel() for w in weights(model)]
    ends = np.cumsum(sizes)
    return [matrix[end - size : end, end - size : end] for size, end in zip(sizes, ends, strict=True)]


def hessian(model: nn.Module) -> Tensor:
    return dense(curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), weights(model), labelled()))


def error_of_two_a_weight(weight: Tensor, precision: mps.Precision) -> Tensor:
    """||D||^2 = 2 n, so that 1/2 tr(H) / n ||D||^2 is the trace."""
    return weight + 2**0.5


def unit_error(weight: Tensor, precision: mps.Precision) -> Tensor:
    """||D||^2 = 2, so that 1/2 |lambda| ||D||^2 is the eigenvalue."""
    return weight + (2 / weight.numel()) ** 0.5


def test_products_with_the_whole_hessian() -> None:
    model = net()
    generator = torch.Generator().manual_seed(2)
    vectors = [torch.randn(w.shape, generator=generator, dtype=torch.double) for w in weights(model)]
    total = sum(SIZES)
    products = [torch.zeros_like(v) for v in vectors]
    for x, y in labelled():
        gradients = gradient(F.cross_entropy(model(x), y), weights(model), create_graph=True)
        parts = hessian_products(gradients, weights(model), vectors)
        products = [whole + len(x) / total * part for whole, part in zip(products, parts, strict=True)]
    expected = hessian(model) @ torch.cat([v.flatten() for v in vectors])
    torch.testing.assert_close(torch.cat([p.flatten() for p in products]), expected)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_traces(method: str) -> None:
    model = net()
    estimator = HessianTrace(300, method=method)  # type: ignore[arg-type]
    table = mps.profile(
        model, labelled(), estimator, mps.precisions("w4"), loss="cross-entropy", quantizer=error_of_two_a_weight
    )
    traces = np.array([float(block.trace()) for block in blocks(hessian(net()), net())])
    assert table.sensitivity_se is not None
    error, se = np.abs(table.sensitivity[:, 0] - traces), table.sensitivity_se[:, 0]
    assert (error <= 4 * se + 1e-9 * np.abs(traces)).all()
    assert (se < 0.2 * np.abs(traces)).all()


def test_largest_eigenvalues() -> None:
    estimator = HessianTopEigenvalue(tolerance=1e-9, iterations=2000)
    table = mps.profile(net(), labelled(), estimator, mps.precisions("w4"), loss="cross-entropy", quantizer=unit_error)
    largest = [float(torch.linalg.eigvalsh(block).abs().max()) for block in blocks(hessian(net()), net())]
    assert table.sensitivity[:, 0] == pytest.approx(largest, rel=1e-4)


def test_traces_of_the_gauss_newton_matrix() -> None:
    """Four draws of three outputs, signs by the rows of a Hadamard matrix: the expectation exactly."""
    model = net()
    operator = curvlinops.GGNLinearOperator(model, nn.MSELoss(), weights(model), numbered(model))
    traces = [float(block.trace()) for block in blocks(dense(operator), model)]
    inputs = [x for x, _ in labelled()]
    table = mps.profile(
        net(), inputs, GaussNewtonTrace(4), mps.precisions("w4"), metric="mse", quantizer=error_of_two_a_weight
    )
    assert table.sensitivity[:, 0] == pytest.approx(traces, rel=1e-9)


def test_kronecker_factors() -> None:
    """The diagonal of K-FAC, by a quadratic form of errors of any sizes."""
    model = net()
    operator = curvlinops.KFACLinearOperator(
        model, nn.MSELoss(), weights(model), numbered(model), fisher_type="type-2", kfac_approx="expand"
    )
    generator = torch.Generator().manual_seed(3)
    errors = {w.shape: torch.randn(w.shape, generator=generator, dtype=torch.double) for w in weights(model)}
    expected = [
        0.5 * float(block.diagonal() @ errors[w.shape].flatten().square())
        for block, w in zip(blocks(dense(operator), model), weights(model), strict=True)
    ]
    inputs = [x for x, _ in labelled()]
    table = mps.profile(
        net(),
        inputs,
        KFACDiagonal(draws=4),
        mps.precisions("w4"),
        metric="mse",
        quantizer=lambda weight, precision: weight + errors[weight.shape],
    )
    assert table.sensitivity[:, 0] == pytest.approx(expected, rel=1e-9)
