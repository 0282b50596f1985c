"""An independent check of a solution: its totals, and its bound from the multipliers alone."""

import math
from collections import defaultdict

import numpy as np

from mpsearch.core.budget import Budget
from mpsearch.core.problem import Problem
from mpsearch.core.solution import Solution, Status
from mpsearch.core.table import CostTable
from mpsearch.core.totals import total_of


def check_solution(
    table: CostTable,
    budget: Budget,
    solution: Solution,
    *,
    minimize: str = "sensitivity",
    max_states: int = 200_000,
    tolerance: float = 1e-9,
) -> bool:
    """Confirm a solution without any code of a solver.

    With multipliers m >= 0 no plan within the limits is below g(m) = sum_l min_p (c + m w)[l, p] - m b. Any plan below the
    claimed bound has reduced costs that sum to less than bound - g(m), so only the options with smaller ones are left;
    a plain dictionary of (use so far -> least damage so far) goes through them.

    Args:
        table: the table that was solved.
        budget: its budget.
        solution: to be confirmed.
        minimize: what was minimized.
        max_states: partial plans up to which the bound is followed beyond g(m).
        tolerance: relative.

    Returns:
        True where the whole bound is confirmed, False where only g(m) is, because there were too many partial plans.

    Raises:
        AssertionError: where a limit is broken, a total is wrong, or the bound does not hold.
    """
    problem = Problem.of(table, budget, minimize)
    assert solution.plan is not None, "there is no plan to check"
    columns = [table.precisions.index(solution.plan[layer.name]) for layer in table.layers]
    options = np.zeros(len(problem.objective), np.int64)
    options[problem.row_of_layer] = columns
    assert (options[problem.row_of_layer] == columns).all(), "layers of a group have different precisions"
    assert problem.feasible(options), "the plan breaks a limit"
    total = total_of(table, minimize)
    value = problem.value(options)
    claimed = solution.sensitivity if minimize == "sensitivity" else solution.usage[minimize]
    assert math.isclose(value, claimed, rel_tol=1e-12, abs_tol=0.0), f"damage {claimed}, recomputed {value}"
    bound = value if solution.status is Status.OPTIMAL else solution.bound
    if not math.isfinite(bound):
        return False
    assert bound <= value * (1 + math.copysign(tolerance, value)), f"bound {bound} above the plan's {value}"
    bound = bound * total.divisor - total.fixed[0]  # as a sum of cells
    prices = np.array(list((solution.multipliers or dict.fromkeys(problem.row_names, 0.0)).values()))
    assert (prices >= 0).all(), "a negative multiplier"
    priced = problem.objective + np.tensordot(prices, problem.usage, axes=1)
    least = np.nanmin(priced, axis=1)
    gap = bound - (math.fsum(least.tolist()) - math.fsum((prices * problem.free).tolist()))
    slack = tolerance * max(abs(bound), float(np.nanmax(np.abs(problem.objective[np.arange(len(options)), options]))))
    # use so far -> least damage so far, of partial plans that may end below the bound; where uses are rounded, each with its options
    states: dict[tuple[tuple[float, ...], tuple[int, ...]], float] = {((0.0,) * len(prices), ()): 0.0}
    rounded = bool(problem.blur.any())
    ahead = np.append(np.cumsum(least[::-1])[::-1][1:], 0.0) - math.fsum((prices * problem.free).tolist())
    for row in range(len(options)):
        wider: dict[tuple[tuple[float, ...], tuple[int, ...]], float] = defaultdict(lambda: math.inf)
        for (used, taken), damage in states.items():
            for p in np.flatnonzero(priced[row] - least[row] <= max(gap, 0.0) + slack).tolist():
                now = tuple((used + problem.usage[:, row, p]).tolist())
                cost = damage + float(problem.objective[row, p])
                if cost + float(np.dot(prices, now)) + ahead[row] < bound - slack:
                    key = (now, (*taken, p) if rounded else ())
                    wider[key] = min(wider[key], cost)
        states = wider
        if len(states) > max_states:
            return False
    for (used, taken), damage in states.items():
        within = all(u <= b for u, b in zip(used, problem.free.tolist(), strict=True))
        within = within and (not rounded or problem.feasible(np.array(taken)))
        assert not within or damage >= bound - slack, f"a plan has {damage}, below the bound {bound}"
    return True
