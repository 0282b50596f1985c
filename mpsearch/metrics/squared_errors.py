"""Squared errors of the output, over their number, over the signal, or over its peak."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.pieces import by_pieces
from mpsearch.metrics.statistics import wide


@dataclass(frozen=True)
class MSE(Comparison):
    """Mean squared error over the numbers of the output: (y - y0)^2.

    >>> MSE().terms(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), torch.zeros(1).long(), 1)[0]    # (2^2 + 0) / 2
    tensor([2.], dtype=torch.float64)
    """

    name: ClassVar[str] = "mse"
    unit: ClassVar[str] = "mse"
    by_rows: ClassVar[bool] = True

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) mean squared errors."""
        values = by_pieces(lambda before, after: (wide(after) - wide(before)).square().mean(-1), reference, rows)
        return values, torch.ones_like(values)

    def weights(self, reference: Tensor, index: Tensor, count: int) -> Tensor:
        """(N,) of 1."""
        return wide(reference.new_ones(len(index)))

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """sqrt(2 / C) times values: the Hessian is 2 / C times the identity."""
        return math.sqrt(2 / values.shape[1]) * values


class SquaredError(Comparison):
    """A sum of squared errors over a weight that the unquantized output gives, so that twice the identity is the Hessian of the sum."""

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """sqrt(2) times values: the Hessian is twice the identity."""
        return math.sqrt(2) * values


@dataclass(frozen=True)
class RelativeError(SquaredError):
    """Noise over signal: sum ||y - y0||^2 / sum ||y0||^2 over all samples, a ratio of sums; 1 for an output of zeros.

    >>> values, weights = RelativeError().terms(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.zeros(1).long(), 1)
    >>> float(values / weights)                                # 1 / 25
    0.04
    """

    name: ClassVar[str] = "relative-error"
    unit: ClassVar[str] = "relative error"
    by_rows: ClassVar[bool] = True

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) squared errors and (N,) squared lengths of the unquantized rows."""
        return _squared_errors(reference, rows), by_pieces(lambda before: wide(before).square().sum(-1), reference)


@dataclass(frozen=True)
class PSNR(SquaredError):
    """Peak signal-to-noise ratio, shown in dB: -10 log10 of the damage.

        damage = sum ||y - y0||^2 / sum n peak^2,   peak = max y0 - min y0 of the sample's n numbers   [mse / peak^2]

    >>> values, weights = PSNR().terms(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.1, 1.0]]), torch.zeros(1).long(), 1)
    >>> round(PSNR().shown(float(values / weights)), 2)        # 0.1^2 over two numbers: 10 log10(200)
    23.01
    """

    name: ClassVar[str] = "psnr"
    unit: ClassVar[str] = "mse / peak^2"

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) squared errors and (N,) squared peaks times numbers."""
        greatest, least = wide(reference.amax(-1)), wide(reference.amin(-1))
        high = greatest.new_full((count,), -math.inf).scatter_reduce(0, index, greatest, "amax")
        low = least.new_full((count,), math.inf).scatter_reduce(0, index, least, "amin")
        return _squared_errors(reference, rows), (reference.shape[1] * (high - low).square())[index]

    @property
    def shown_unit(self) -> str:
        """dB: ten times the logarithm of the ratio."""
        return "dB"

    def shown(self, value: float) -> float:
        """In dB; infinite without any error."""
        return math.inf if value == 0 else -10 * math.log10(value)

    def shown_se(self, value: float, se: float) -> float:
        """The standard error in dB, to first order; nan without any error."""
        return math.nan if value == 0 else 10 / math.log(10) * se / value


def _squared_errors(reference: Tensor, rows: Tensor) -> Tensor:
    """(N,) |y - y0|^2."""
    return by_pieces(lambda before, after: (wide(after) - wide(before)).square().sum(-1), reference, rows)
