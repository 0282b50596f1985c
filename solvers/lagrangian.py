"""Lagrangian relaxation of the budgets: prices for resources, the plans they lead to, and the bound they prove."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsearch.solvers.feasibility import Floats, Options

_SWEEPS = 6  # of coordinate ascent where there are several budgets


@dataclass(frozen=True)
class Dual:
    """Outcome of `dual`.

    Attributes:
        multipliers: (R,) >= 0, price of one unit of each resource.
        bound: no choice within the limits costs less, rounding included; inf where it exceeds what any choice
            costs, which proves that there is none.
        plans: distinct least-priced plans (L,) met on the way, the last ones nearest to the limits on either side.
    """

    multipliers: Floats
    bound: float
    plans: list[Options]


def bound_at(
    sensitivity: Floats, usage: Floats, limits: Floats, allowed: NDArray[np.bool_], multipliers: Floats
) -> float:
    """`sum_l min_p (sensitivity + multipliers @ usage)[l, p] - multipliers @ limits`, rounded downwards.

    >>> table, use = np.array([[4.0, 0.0]]), np.array([[[1.0, 2.0]]])
    >>> round(bound_at(table, use, np.array([1.5]), np.full((1, 2), True), np.array([4.0])), 9)
    2.0
    """
    if not multipliers.any():
        return math.fsum(np.where(allowed, sensitivity, np.inf).min(axis=1).tolist())
    priced = np.where(allowed, sensitivity, np.inf)
    weight = np.where(allowed, np.abs(sensitivity), 0.0)
    for price, use in zip(multipliers, usage, strict=True):
        priced += price * np.where(allowed, use, 0.0)
        weight += price * np.where(allowed, np.abs(use), 0.0)
    priced_in = multipliers > 0  # a limit may be infinite
    paid = (multipliers[priced_in] * limits[priced_in]).tolist()
    rounding = 4 * np.finfo(float).eps * (float(weight.max(axis=1).sum()) + math.fsum(map(abs, paid)))
    bound = math.fsum(priced.min(axis=1).tolist()) - math.fsum(paid) - float((1 + len(limits)) * rounding)
    return bound if math.isfinite(bound) else -math.inf


def dual(sensitivity: Floats, usage: Floats, limits: Floats, allowed: NDArray[np.bool_]) -> Dual:
    """Prices that (nearly) maximise the Lagrangian bound: bisection on one price, in turn where there are several.

    Everett, Operations Research 11 (1963) 399-417. For one budget the bound is that of the linear program.
    Cycling through several prices may stop short of the best bound; what it returns is a bound all the same.

    Args:
        sensitivity: (L, P), nan outside `allowed`.
        usage: (R, L, P).
        limits: (R,).
        allowed: (L, P), at least one a row.
    """
    rows = np.arange(len(sensitivity))
    base = np.where(allowed, sensitivity, np.inf)
    uses = [np.where(allowed, use, 0.0) for use in usage]
    prices = np.zeros(len(limits))
    plans: dict[bytes, Options] = {}

    def plan_at(priced: Floats) -> Options:
        options = np.asarray(priced.argmin(axis=1), np.int64)
        plans.pop(options.tobytes(), None)  # the latest last
        plans[options.tobytes()] = options
        return options

    plan_at(base)
    worst = math.fsum(np.where(allowed, sensitivity, -np.inf).max(axis=1).tolist())
    bound = bound_at(sensitivity, usage, limits, allowed, prices)
    best = prices.copy()
    for _ in range(1 if len(limits) == 1 else _SWEEPS if len(limits) else 0):
        before = prices.copy()
        for r, (use, limit) in enumerate(zip(uses, limits, strict=True)):
            others = base + sum((prices[s] * uses[s] for s in range(len(limits)) if s != r), np.zeros(base.shape))
            prices[r] = _price(others, use, float(limit), rows, plan_at)
            if (raised := bound_at(sensitivity, usage, limits, allowed, prices)) > bound:
                bound, best = raised, prices.copy()
            if bound > worst:
                return Dual(best, math.inf, list(plans.values()))
        if np.array_equal(prices, before):
            break
    return Dual(best, bound, list(plans.values()))


def _price(
    cost: Floats, use: Floats, limit: float, rows: NDArray[np.int64], plan_at: Callable[[Floats], Options]
) -> float:
    """Bisect for the least price at which the least-priced plan uses no more than `limit`."""

    def excess(price: float) -> float:
        return float(use[rows, plan_at(cost + price * use)].sum()) - limit

    if excess(0.0) <= 0:
        return 0.0
    allowed = np.isfinite(cost)
    gained, saved = (
        float((np.where(allowed, table, -np.inf).max(axis=1) - np.where(allowed, table, np.inf).min(axis=1)).max())
        for table in (cost, use)
    )
    if saved == 0:
        return 0.0
    low, high = 0.0, gained / saved or 1.0
    for _ in range(14):
        if excess(high) <= 0:
            break
        low, high = high, 16 * high
    else:
        return 0.0  # no price brings this resource down at the prices of the others
    for _ in range(100):
        middle = math.sqrt(low * high) if low > 0 else high / 64
        if not low < middle < high or high - low <= 1e-13 * high or middle < 1e-280:
            break
        if excess(middle) <= 0:
            high = middle
        else:
            low = middle
    return high
