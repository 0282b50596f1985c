"""Bisection over one list of layers, ordered by sensitivity, for how far down it to lower the precision."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.solution import Choice, SolverCapabilities, Status
from mpsearch.errors import SolverError
from mpsearch.solvers.feasibility import Floats, Options, fits, reachable, shifted, total
from mpsearch.solvers.lagrangian import dual

_NEAR = 4  # positions on either side of the boundary that are looked at one by one


@dataclass(frozen=True)
class Bisection:
    """Lower the precision of layers in the order of their sensitivity, and bisect where to stop.

    "Augmenting Hessians with Inter-Layer Dependencies" (2306.04879) and phase 2 of AIMET's AMP: every step
    from one option of a layer to the next cheaper one stands in one list, by the damage that the layer has
    after it; a position in the list is a plan. O(log(L P)) plans are looked at, which pays where each has to
    be measured.

    Without `objective`: the first position that keeps the limits. With it: the last position whose measured
    damage is at most `tolerance` and that keeps the limits, the cheapest plan that is good enough. What is
    measured need not be monotone along the list, so positions near the boundary are looked at one by one, and
    the best plan *seen* is returned, not the last. Where bisection sees none within the limits, all positions
    are tried against these.

    Attributes:
        objective: measured damage of the options (L,) of one plan; None bisects on the limits.
        tolerance: the most measured damage that is accepted, in the unit of `objective`.

    Raises:
        SolverError: `objective` without `tolerance`, or the other way round.

    >>> choice = Bisection().choose(np.array([[4.0, 1.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0]))
    >>> choice.options.tolist()
    [1, 0]
    """

    capabilities: ClassVar[SolverCapabilities] = SolverCapabilities(lower_limits=False)

    objective: Callable[[Options], float] | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if (self.objective is None) != (self.tolerance is None):
            raise SolverError(
                f"Bisection takes objective and tolerance together, got {self.objective} and {self.tolerance}"
            )

    def choose(self, sensitivity: Floats, usage: Floats, limits: Floats) -> Choice:
        """See `Solver.choose`."""
        usage, limits = shifted(sensitivity, usage, limits)
        allowed = reachable(sensitivity, usage, limits)
        if not allowed.any(axis=1).all():
            return Choice(None, Status.INFEASIBLE, math.inf)
        relaxed = dual(sensitivity, usage, limits, allowed)
        if relaxed.bound == math.inf:
            return Choice(None, Status.INFEASIBLE, math.inf, relaxed.multipliers)
        path = _Path(sensitivity, _price(usage, allowed, relaxed.multipliers), allowed)
        if self.objective is None or self.tolerance is None:
            return self._on_table(path, sensitivity, usage, limits, relaxed.bound, relaxed.multipliers)
        return self._measured(path, usage, limits)

    def _on_table(
        self, path: "_Path", sensitivity: Floats, usage: Floats, limits: Floats, bound: float, multipliers: Floats
    ) -> Choice:
        seen = _bisect(path.length, lambda position: not fits(path.plan(position), usage, limits))
        within = [position for position, over in seen.items() if not over]
        if not within:
            within = [position for position in range(path.length + 1) if fits(path.plan(position), usage, limits)]
        stats = {"steps": path.length, "plans": len(seen)}
        if not within:
            return Choice(None, Status.UNSOLVED, bound, multipliers, stats)
        options = min(map(path.plan, within), key=lambda plan: total(sensitivity, plan))
        value = total(sensitivity, options)
        status = Status.OPTIMAL if value <= bound else Status.FEASIBLE
        return Choice(options, status, min(value, bound), multipliers, stats)

    def _measured(self, path: "_Path", usage: Floats, limits: Floats) -> Choice:
        objective, tolerance = self.objective, self.tolerance
        assert objective is not None
        assert tolerance is not None
        measured: dict[int, float] = {}

        def good(position: int) -> bool:
            measured[position] = float(objective(path.plan(position)))
            return measured[position] <= tolerance

        seen = _bisect(path.length, good)
        within = [p for p, accepted in seen.items() if accepted and fits(path.plan(p), usage, limits)]
        stats = {"steps": path.length, "evaluations": len(measured)}
        if not within:
            least = min(measured.values())
            reason = f"least measured damage {least:.6g}, expected at most {tolerance:.6g} within the limits"
            return Choice(None, Status.UNSOLVED, stats=stats | {"reason": reason})
        return Choice(path.plan(max(within)), Status.FEASIBLE, stats=stats | {"measured": measured[max(within)]})


def _bisect(length: int, test: Callable[[int], bool]) -> dict[int, bool]:
    """Positions 0..length that were tested: both ends, the bisection to where `test` turns false, and its surroundings."""
    seen = {end: test(end) for end in dict.fromkeys((0, length))}
    low, high = 0, length
    while high - low > 1 and seen[0] and not seen[length]:
        middle = (low + high) // 2
        seen[middle] = test(middle)
        low, high = (middle, high) if seen[middle] else (low, middle)
    boundary = low if seen[0] and not seen[length] else length if seen[0] else 0
    for position in range(max(0, boundary - _NEAR), min(length, boundary + _NEAR) + 1):
        if position not in seen:
            seen[position] = test(position)
    return seen


def _price(usage: Floats, allowed: NDArray[np.bool_], multipliers: Floats) -> Floats:
    """(L, P) one resource out of many: at their multipliers, or each in its own range where no limit binds."""
    clean = np.where(allowed, usage, 0.0)
    ranges = np.ptp(clean, axis=(1, 2))
    weights = multipliers if multipliers.any() else 1 / np.where(ranges > 0, ranges, 1.0)
    return np.asarray(np.tensordot(weights, clean, axes=1))


class _Path:
    """Plans from the least damage downwards, one step of one row from each to the next."""

    def __init__(self, sensitivity: Floats, price: Floats, allowed: NDArray[np.bool_]) -> None:
        damage = np.where(allowed, sensitivity, np.inf)
        order = np.lexsort((price, damage), axis=1)
        self.start = order[:, 0]
        steps = []
        for row, columns in enumerate(order.tolist()):
            cheapest = price[row, columns[0]]
            for column in columns[1:]:
                if allowed[row, column] and price[row, column] < cheapest:
                    cheapest = price[row, column]
                    steps.append((damage[row, column] - damage[row, columns[0]], row, column))
        steps.sort()
        self.rows = np.array([row for _, row, _ in steps], np.int64)
        self.columns = np.array([column for _, _, column in steps], np.int64)
        self.length = len(steps)

    def plan(self, position: int) -> Options:
        """The plan after the first `position` steps."""
        options = self.start.copy()
        options[self.rows[:position]] = self.columns[:position]  # of several in one row, the last counts
        return options
