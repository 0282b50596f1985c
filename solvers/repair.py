"""From a plan that breaks limits to one that keeps them, and from one with room left to a better one."""

import numpy as np
from numpy.typing import NDArray

from mpsearch.solvers.feasibility import Floats, Options, fits

_STEPS = 400


def repaired(sensitivity: Floats, priced: Floats, usage: Floats, limits: Floats, options: Options) -> Options | None:
    """Change one row at a time: first the least priced damage for each unit of excess use, then the most damage saved.

    Args:
        sensitivity: (L, P), nan = not allowed.
        priced: (L, P) damage plus priced use, inf = not allowed.
        usage: (R, L, P).
        limits: (R,).
        options: (L,) where to start.

    Returns:
        (L,) options within the limits, or None where no single change helped any more.
    """
    rows = np.arange(len(options))
    current = options.copy()
    span = np.array([max(float(np.ptp(use)), np.finfo(float).tiny) for use in usage])
    allowed = ~np.isnan(sensitivity)
    cost = np.where(allowed, sensitivity, np.inf)
    for _ in range(_STEPS):
        used = np.array([use[rows, current].sum() for use in usage])
        over = np.maximum(used - limits, 0.0) / span
        if not over.any():
            break
        relief = over.sum() - _excess(usage, limits, span, used, current)
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(allowed & (relief > 0), (priced - priced[rows, current][:, None]) / relief, np.inf)
        cell = int(rate.argmin())
        if not np.isfinite(rate.flat[cell]):
            return None
        current[cell // rate.shape[1]] = cell % rate.shape[1]
    if not fits(current, usage, limits):
        return None
    for _ in range(_STEPS):
        used = np.array([use[rows, current].sum() for use in usage])
        saved = np.where(_excess(usage, limits, span, used, current) <= 0, cost[rows, current][:, None] - cost, -np.inf)
        cell = int(saved.argmax())
        row, before = cell // saved.shape[1], current[cell // saved.shape[1]]
        if not saved.flat[cell] > 0:
            break
        current[row] = cell % saved.shape[1]
        if not fits(current, usage, limits):
            current[row] = before
            break
    return current


def _excess(usage: Floats, limits: Floats, span: Floats, used: Floats, current: Options) -> NDArray[np.float64]:
    """(L, P) scaled excess over all limits after changing one row."""
    rows = np.arange(len(current))
    total = np.zeros(usage.shape[1:])
    for use, limit, scale, now in zip(usage, limits, span, used, strict=True):
        total += np.maximum(use + (now - limit - use[rows, current])[:, None], 0.0) / scale
    return total
