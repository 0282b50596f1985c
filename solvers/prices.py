"""Best prices of several resources, by cutting planes."""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CUTS = 120
_TOLERANCE = 1e-10


def best_prices(sensitivity: Floats, usage: Floats, limits: Floats) -> Floats:
    """Prices m >= 0 that maximise sum_l min_p (c + m w)[l, p] - m b (Kelley, SIAM Journal 8 (1960) 703-712).

    The function is concave and piecewise linear; each evaluation gives a cut, and a linear program in R + 1 variables gives
    the next point, drawn towards the best one so far.

    Args:
        sensitivity: (L, P), nan = not allowed.
        usage: (R, L, P).
        limits: (R,) finite.

    Returns:
        (R,) prices. Where their bound exceeds what any plan costs, no plan keeps the limits.
    """
    import highspy

    allowed = ~np.isnan(sensitivity)
    cost = np.where(allowed, sensitivity, np.inf)
    uses = np.where(allowed[None], usage, 0.0)
    rows = np.arange(len(cost))
    worst = math.fsum(np.where(allowed, sensitivity, -np.inf).max(axis=1).tolist())
    best_cost = math.fsum(cost.min(axis=1).tolist())
    span = np.array([float((u.max(axis=1) - u.min(axis=1)).sum()) for u in uses])
    scale_use = np.where(span > 0, span, 1.0)
    scale_cost = worst - best_cost or max(float(np.abs(sensitivity[allowed]).max()), np.finfo(float).tiny)

    def evaluate(prices: Floats) -> tuple[float, Floats]:
        """Value and slope in scaled prices."""
        real = prices * scale_cost / scale_use
        priced = cost + np.tensordot(real, uses, axes=1)
        chosen = priced.argmin(axis=1)
        used = np.array([u[rows, chosen].sum() for u in uses])
        value = float((priced[rows, chosen]).sum() - real @ limits) - best_cost
        return value / scale_cost, (used - limits) / scale_use

    count = len(limits)
    model = highspy.Highs()
    model.setOptionValue("output_flag", False)
    model.setOptionValue("threads", 1)
    inf = highspy.kHighsInf
    reach = 16.0
    for _ in range(count):
        model.addVar(0.0, reach)
    model.addVar(-inf, 2.0 + count * reach)
    model.changeColCost(count, -1.0)
    columns = np.arange(count + 1, dtype=np.int32)
    point = np.zeros(count)
    best, best_value = point, -math.inf
    top = math.inf
    for _ in range(_CUTS):
        value, slope = evaluate(point)
        if value > best_value:
            best, best_value = point.copy(), value
        if best_value > 2.0:  # far above what any plan costs
            break
        # theta <= value + slope (x - point)
        model.addRow(-inf, value - float(slope @ point), count + 1, columns, np.append(-slope, 1.0))
        model.run()
        solution = np.array(model.getSolution().col_value)
        top = solution[count]
        if top - best_value <= _TOLERANCE * max(1.0, abs(top)):
            break
        target = np.clip(solution[:count], 0.0, None)
        if (target >= reach * (1 - 1e-9)).any() and reach < 1e12:
            reach *= 64.0
            for r in range(count):
                model.changeColBounds(r, 0.0, reach)
            model.changeColBounds(count, -inf, 2.0 + count * reach)
        point = target if value < best_value else 0.7 * target + 0.3 * best
    return np.asarray(np.maximum(best, 0.0) * scale_cost / scale_use)
