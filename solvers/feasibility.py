"""Exact arithmetic on plans: what a choice costs, whether it keeps the limits, what can be part of one that does."""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Options = NDArray[np.int64]


def total(table: Floats, options: Options) -> float:
    """Correctly rounded sum of one cell a row.

    >>> total(np.array([[1e16, 1.0], [1.0, 2.0], [-1e16, 0.0]]), np.array([0, 0, 0]))
    1.0
    """
    return math.fsum(table[np.arange(len(options)), options].tolist())


def fits(options: Options, usage: Floats, limits: Floats) -> bool:
    """Whether `options` (L,) keep every limit, decided as `Solver.choose` defines it."""
    return all(total(use, options) <= limit for use, limit in zip(usage, limits, strict=True))


def least_usage(allowed: NDArray[np.bool_], usage: Floats) -> Floats:
    """(R, L): the least that any allowed option of a row uses."""
    least: Floats = np.where(allowed, usage, np.inf).min(axis=2)
    return least


def reachable(sensitivity: Floats, usage: Floats, limits: Floats) -> NDArray[np.bool_]:
    """(L, P): the cells that a choice within the limits can contain, every other row at its least use.

    A row without any is a proof of infeasibility: `math.fsum` is monotone, so a sum of least uses above its
    limit stays above it for every choice. Cells within rounding of the limit are kept.
    """
    allowed = ~np.isnan(sensitivity)
    for use, least, limit in zip(usage, least_usage(allowed, usage), limits, strict=True):
        needed = math.fsum(least.tolist())
        rounding = 4 * np.finfo(float).eps * (math.fsum(np.abs(least).tolist()) + abs(limit))
        slack = limit - needed if needed > limit else limit - needed + rounding
        allowed &= use - least[:, None] <= slack + 4 * np.finfo(float).eps * np.abs(use)
        allowed &= needed <= limit
    return allowed
