"""Best prices of several resources, by cutting planes."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CUTS = 120
_ROUNDS = 3
_TOLERANCE = 1e-10


def best_prices(sensitivity: Floats, usage: Floats, limits: Floats) -> Floats:
    """Prices m >= 0 that maximise sum_l min_p (c + m w)[l, p] - m b (Kelley, SIAM Journal 8 (1960) 703-712).

    The function is concave and piecewise linear; each evaluation gives a cut, and a linear program in R + 1 variables
    gives the next point, drawn towards the best one so far. Linear programs are accurate to a fixed share of their
    unit, so the search is repeated in the unit of the bound that it found.

    Args:
        sensitivity: (L, P), nan = not allowed.
        usage: (R, L, P).
        limits: (R,) finite.

    Returns:
        (R,) prices. Where their bound exceeds what any plan costs, no plan keeps the limits.
    """
    allowed = ~np.isnan(sensitivity)
    cost = np.where(allowed, sensitivity, np.inf)
    uses = np.where(allowed[None], usage, 0.0)
    rows = np.arange(len(cost))
    lowest = math.fsum(cost.min(axis=1).tolist())
    span = np.array([float((u.max(axis=1) - u.min(axis=1)).sum()) for u in uses])
    span = np.where(span > 0, span, 1.0)

    def evaluate(prices: Floats) -> tuple[float, Floats]:
        """Bound above the least damage, and its slope."""
        priced = cost + np.tensordot(prices, uses, axes=1)
        chosen = priced.argmin(axis=1)
        used = np.array([u[rows, chosen].sum() for u in uses])
        return float(priced[rows, chosen].sum() - prices @ limits) - lowest, used - limits

    largest = float(np.abs(sensitivity[allowed]).max()) or 1.0
    unit = math.fsum(np.where(allowed, sensitivity, -np.inf).max(axis=1).tolist()) - lowest or largest
    prices = np.zeros(len(limits))
    for _ in range(_ROUNDS):
        prices, value = _cutting_planes(evaluate, prices, unit, span)
        if not 0 < value < unit / 10:
            break
        unit = value
    return prices


def _cutting_planes(
    evaluate: Callable[[Floats], tuple[float, Floats]], start: Floats, unit: float, span: Floats
) -> tuple[Floats, float]:
    """Maximise from `start`, with values in `unit` and prices in `unit / span`; the best prices and their value."""
    import highspy

    from mpsearch.solvers.highs import silent_highs

    inf, count = highspy.kHighsInf, len(span)
    point = start * span / unit
    reach = max(16.0, 4 * float(point.max()))
    model = silent_highs(primal_feasibility_tolerance=1e-10, dual_feasibility_tolerance=1e-10)
    for _ in range(count):
        model.addVar(0.0, reach)
    model.addVar(-inf, 10.0 + count * reach)
    model.changeColCost(count, -1.0)
    columns = np.arange(count + 1, dtype=np.int32)
    best, best_value = point, -math.inf
    for _ in range(_CUTS):
        value, slope = evaluate(point * unit / span)
        value, slope = value / unit, slope / span
        if value > best_value:
            best, best_value = point.copy(), value
        if best_value > 2.0 and not start.any():  # far above what any plan costs
            break
        # theta <= value + slope (x - point)
        model.addRow(-inf, value - float(slope @ point), count + 1, columns, np.append(-slope, 1.0))
        model.run()
        solution = np.array(model.getSolution().col_value)
        if not np.isfinite(solution).all() or solution[count] - best_value <= _TOLERANCE * max(1.0, abs(best_value)):
            break
        target = np.clip(solution[:count], 0.0, None)
        if (target >= reach * (1 - 1e-9)).any() and reach < 1e12:
            reach *= 64.0
            for r in range(count):
                model.changeColBounds(r, 0.0, reach)
            model.changeColBounds(count, -inf, 10.0 + count * reach)
        point = target if value < best_value else 0.7 * target + 0.3 * best
    return best * unit / span, best_value * unit
