"""A plan within several limits from prices that nearly keep them."""

import numpy as np

from mpsearch.solvers.feasibility import Floats, Options, fits

_STEPS = 400  # changes of single rows
_CELLS = 50_000  # up to which every cell is weighed at every change
_FILL = 20_000  # likeliest improvements that are tried in each round of filling


def repaired(sensitivity: Floats, prices: Floats, usage: Floats, limits: Floats, base: Options) -> Options | None:
    """Bring the least-priced plan within the limits, then spend what is left of them.

    Small tables change one row at a time, the least priced damage for each unit of excess use first. Large ones, or where that gets
    stuck, raise all prices by the least factor that will do.

    Args:
        sensitivity: (L, P), nan = not allowed.
        prices: (R,) of the resources.
        usage: (R, L, P).
        limits: (R,).
        base: (L,) the least-priced plan.

    Returns:
        (L,) options within the limits, or None where neither way leads to any.
    """
    cost = np.where(np.isnan(sensitivity), np.inf, sensitivity)
    plan = _stepwise(cost, prices, usage, limits, base) if cost.size <= _CELLS else None
    plan = _dearer(cost, prices, usage, limits) if plan is None else plan
    return None if plan is None else _filled(cost, prices, usage, limits, plan)


def _stepwise(cost: Floats, prices: Floats, usage: Floats, limits: Floats, base: Options) -> Options | None:
    rows = np.arange(len(base))
    current = base.copy()
    span = np.array([max(float(np.ptp(use)), np.finfo(float).tiny) for use in usage])
    priced = cost + np.tensordot(prices, usage, axes=1)
    for _ in range(_STEPS):
        used = np.array([use[rows, current].sum() for use in usage])
        over = np.maximum(used - limits, 0.0) / span
        if not over.any():
            return current if fits(current, usage, limits) else None
        after = np.zeros(cost.shape)
        for use, limit, scale, now in zip(usage, limits, span, used, strict=True):
            after += np.maximum(use + (now - limit - use[rows, current])[:, None], 0.0) / scale
        relief = over.sum() - after
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(
                np.isfinite(cost) & (relief > 0), (priced - priced[rows, current][:, None]) / relief, np.inf
            )
        cell = int(rate.argmin())
        if not np.isfinite(rate.flat[cell]):
            return None
        current[cell // rate.shape[1]] = cell % rate.shape[1]
    return None


def _dearer(cost: Floats, prices: Floats, usage: Floats, limits: Floats) -> Options | None:
    raised = prices if prices.any() else np.ones(len(prices))
    paid = np.tensordot(raised, usage, axes=1)
    for exponent in np.arange(-10.0, 4.0, 0.5):
        plan = np.asarray((cost + (1 + 10.0**exponent) * paid).argmin(axis=1), np.int64)
        if fits(plan, usage, limits):
            return plan
    return None


def _filled(cost: Floats, prices: Floats, usage: Floats, limits: Floats, plan: Options) -> Options:
    rows = np.arange(len(plan))
    priced = cost + np.tensordot(prices, usage, axes=1)
    current = plan
    for _ in range(3):
        better = np.flatnonzero((cost < cost[rows, current][:, None]).ravel())
        dearer = (priced - priced[rows, current][:, None]).ravel()[better]
        trial = current.copy()
        used = np.array([use[rows, trial].sum() for use in usage])
        for cell in better[np.argsort(dearer, kind="stable")[:_FILL]].tolist():
            row, option = divmod(cell, cost.shape[1])
            after = used + usage[:, row, option] - usage[:, row, trial[row]]
            if cost[row, option] < cost[row, trial[row]] and (after <= limits).all():
                used, trial[row] = after, option
        if not fits(trial, usage, limits) or (trial == current).all():
            break
        current = trial
    return current
