"""Lower convex hulls of the options of each row, as steps from the least use upwards."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Options = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Steps:
    """Hull steps of all rows; within a row they are in order, and slopes do not fall.

    Attributes:
        start: (L,) option of least use in each row, the least damage among equals.
        slope: (N,) change of damage for one unit of use, negative.
        row: (N,) row of the step.
        option: (N,) option that it leads to.
        before: (N,) option that it leaves.
        more_use: (N,) > 0.
        more_cost: (N,) < 0.
    """

    start: Options
    slope: Floats
    row: Options
    option: Options
    before: Options
    more_use: Floats
    more_cost: Floats


def hull_steps(sensitivity: Floats, usage: Floats) -> Steps:
    """Walk the lower hull of every row at once (Sinha and Zoltners, Operations Research 27 (1979) 503-515).

    Args:
        sensitivity: (L, P), nan = not allowed, one allowed at least in each row.
        usage: (L, P).

    >>> steps = hull_steps(np.array([[9.0, 6.0, 2.0]]), np.array([[1.0, 2.0, 3.0]]))   # 6 lies above the line
    >>> steps.slope.tolist(), steps.option.tolist()
    ([-3.5], [2])
    """
    rows = np.arange(len(usage))
    allowed = ~np.isnan(sensitivity)
    use = np.where(allowed, usage, np.inf)
    cost = np.where(allowed, sensitivity, np.inf)
    start = np.where(use == use.min(axis=1)[:, None], cost, np.inf).argmin(axis=1)
    current, slope = start.copy(), np.full(len(rows), -np.inf)
    steps: list[tuple[Floats, Options, Options, Options, Floats, Floats]] = []
    alive = rows
    for _ in range(usage.shape[1] - 1):
        here_use, here_cost = use[alive, current[alive]], cost[alive, current[alive]]
        wider = use[alive] - here_use[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            slopes = np.where((wider > 0) & allowed[alive], (cost[alive] - here_cost[:, None]) / wider, np.inf)
        steepest = slopes.min(axis=1)
        moves = steepest < 0
        if not moves.any():
            break
        alive, slopes, steepest = alive[moves], slopes[moves], steepest[moves]
        target = np.where(slopes == steepest[:, None], use[alive], -np.inf).argmax(axis=1)
        slope[alive] = np.maximum(slope[alive], steepest)  # rounding must not reorder the steps of a row
        more_use = use[alive, target] - here_use[moves]
        more_cost = cost[alive, target] - here_cost[moves]
        steps.append((slope[alive], alive, target, current[alive], more_use, more_cost))
        current[alive] = target
    empty = np.empty(0)
    if not steps:
        none = empty.astype(np.int64)
        return Steps(start, empty, none, none, none, empty, empty)
    slopes_, rows_, options_, before_, uses_, costs_ = zip(*steps, strict=True)
    join = np.concatenate
    return Steps(start, join(slopes_), join(rows_), join(options_), join(before_), join(uses_), join(costs_))
