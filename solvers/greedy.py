"""Greedy allocation by damage per unit of resource, with repair, fill and swaps."""

import math
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.core.solution import Choice, SolverCapabilities, Status
from mpsearch.solvers.feasibility import Floats, reachable, shifted, total
from mpsearch.solvers.lagrangian import dual
from mpsearch.solvers.moves import Moves

_STARTS = 4  # plans on either side of the limits from which to go on


@dataclass(frozen=True)
class Greedy:
    """Least damage per unit of resource first, from both ends; the better plan is kept.

    Steps of least damage per unit saved, taken from the best plan downwards, and of most damage removed per
    unit spent, taken from the cheapest plan upwards, follow the same lower convex hulls of (usage, damage)
    until they meet at the limit (Sinha and Zoltners, Operations Research 27 (1979) 503-515). That common part
    is taken in one go at its Lagrange multiplier, for several budgets at one multiplier each. What is left is
    done step by step from either side: *repair* (least damage per unit of excess, until all limits hold),
    *fill* (most damage removed per unit of priced resource that still fits), *swap* (two rows at once, while
    that helps). Each step lowers the excess or the damage, so opposing resources cannot make it cycle.

    Never proves more than its Lagrangian bound: the status is `OPTIMAL` where the plan meets it, `INFEASIBLE`
    where the least uses of the rows exceed a limit or the bound exceeds what any plan costs, `UNSOLVED` where
    repair got stuck.

    >>> import numpy as np
    >>> choice = Greedy().choose(np.array([[4.0, 1.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0]))
    >>> choice.options.tolist(), str(choice.status)
    ([1, 0], 'feasible')
    """

    capabilities: ClassVar[SolverCapabilities] = SolverCapabilities()

    def choose(self, sensitivity: Floats, usage: Floats, limits: Floats) -> Choice:
        """See `Solver.choose`."""
        usage, limits = shifted(sensitivity, usage, limits)
        allowed = reachable(sensitivity, usage, limits)
        if not allowed.any(axis=1).all():
            return Choice(None, Status.INFEASIBLE, math.inf)
        relaxed = dual(sensitivity, usage, limits, allowed)
        if relaxed.bound == math.inf:
            return Choice(None, Status.INFEASIBLE, math.inf, relaxed.multipliers)
        table = Moves(sensitivity, usage, limits, allowed, relaxed.multipliers)
        best, value = None, math.inf
        for start in relaxed.plans[-_STARTS:]:
            options = table.improved(start)
            if options is not None and (cost := total(sensitivity, options)) < value:
                best, value = options, cost
        if best is None and (best := table.improved(table.cheapest())) is not None:
            value = total(sensitivity, best)
        stats = {"steps": table.steps}
        if best is None:
            return Choice(None, Status.UNSOLVED, relaxed.bound, relaxed.multipliers, stats)
        status = Status.OPTIMAL if value <= relaxed.bound else Status.FEASIBLE
        return Choice(best, status, min(value, relaxed.bound), relaxed.multipliers, stats)
