"""The door from a table to its Pareto front."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation.solving import choose
from mpsearch.core.budget import Budget
from mpsearch.core.front import Front, check_over
from mpsearch.core.problem import Problem, least_options
from mpsearch.core.settings import check_kind, checked_number
from mpsearch.core.solution import Solver, Status, relative_gap
from mpsearch.core.table import CostTable
from mpsearch.core.totals import total_of
from mpsearch.errors import BudgetError, InfeasibleError, SolverError, TableError

Method = Literal["auto", "exact", "epsilon", "hull", "sweep"]

#: Cells up to which `auto` tries for every non-dominated point; beyond, the hull of the front is taken.
EXACT_CELLS = 4096


def pareto(
    table: CostTable,
    over: str | Sequence[str] = "memory_bytes",
    *,
    budget: Budget | None = None,
    solver: Solver | None = None,
    method: Method = "auto",
    epsilon: float = 1e-3,
    points: int = 64,
) -> Front:
    """The Pareto front of damage over one resource.

    Args:
        table: what every option costs and damages.
        over: the resource, or several, where the table is small: then no plan of the front is beaten in all of them.
        budget: further limits that every point must keep; only with `solver` or `method="sweep"`, which it implies.
        solver: sweep this solver over `points` limits instead of computing the front directly.
        method: `exact` (all non-dominated points), `epsilon` (each of them within a factor 1 + epsilon in damage),
            `hull` (the Lagrangian points, any size, with a gap for each), `sweep`, or `auto`: exact where it is
            small enough, else hull; `Front.method` says which it was.
        epsilon: relative error of `epsilon`.
        points: limits of a sweep, evenly spaced between the least and the most that plans use.

    Returns:
        The front, sorted by the resource: `front[i]` is a `Solution`, `front.at(limit)` the best one within a limit.

    Raises:
        BudgetError: for a resource that the table does not have.
        InfeasibleError: where no plan meets `budget`.
        SolverError: where the solver gives up everywhere.

    >>> import mpsearch as mps
    >>> layers = (mps.Layer("a", weight_shape=(10,)), mps.Layer("b", weight_shape=(10,)))
    >>> table = mps.CostTable(layers, mps.precisions("w2 w4"), [[9, 3], [4, 2]])
    >>> front = mps.pareto(table, "average_bits")
    >>> [(point.usage["average_bits"], point.sensitivity) for point in front]
    [(2.0, 13.0), (3.0, 7.0), (4.0, 5.0)]
    """
    check_kind(table, CostTable, "a cost table", TableError)
    check_kind(over, str | tuple | list, "the name of a resource, or a list of them", BudgetError)
    if budget is not None:
        check_kind(budget, Budget, "a budget, mps.Budget(average_bits=4)", BudgetError)
    epsilon = checked_number(epsilon, "epsilon", float, 1e-3, SolverError)
    points = checked_number(points, "points", int, 64, SolverError)
    if not isinstance(over, str):
        names = tuple(over)
        for name in names:
            check_kind(name, str, "the names of resources", BudgetError)
            check_over(table, name)
        if not names or len(set(names)) != len(names):
            raise BudgetError(f"over={list(names)}: expected one or several different resources")
        if len(names) > 1:
            if (
                method not in ("auto", "exact")
                or solver is not None
                or budget is not None
                or table.interactions is not None
            ):
                raise SolverError(
                    "the front over several resources is exact: it takes no method, solver, budget or interactions"
                )
            return _several(table, names)
        over = names[0]
    check_over(table, over)
    if budget is not None and over in budget:
        raise BudgetError(f"{over} is the axis of the front and limited too; use front.at(...) or limit another")
    if method == "auto" and (solver is not None or budget is not None or table.interactions is not None):
        method = "sweep"
    if method == "sweep":
        return _sweep(table, over, Budget() if budget is None else budget, solver, points)
    if solver is not None or budget is not None or table.interactions is not None:
        raise SolverError(f"method={method!r} takes no solver, budget or interactions; use method='sweep'")
    return _direct(table, over, method, epsilon)


def _direct(table: CostTable, over: str, method: Method, epsilon: float) -> Front:
    from mpsearch.solvers import frontier

    problem = Problem.of(table, Budget())
    axis = total_of(table, over)
    if method == "auto":
        method = "exact" if problem.objective.size <= EXACT_CELLS else "hull"
    rows, fixed, divisor = problem.row_of_layer, axis.fixed[0], axis.divisor
    if method == "exact":
        points = frontier.exact_front(table.sensitivity, axis.cells[0], rows, fixed, divisor)
    elif method == "epsilon":
        points = frontier.epsilon_front(table.sensitivity, axis.cells[0], epsilon, rows, fixed, divisor)
    else:
        points = frontier.hull_front(table.sensitivity, axis.cells[0], rows, fixed, divisor)
    return Front(table, over, points.usage, points.sensitivity, points.gap, points.method, problem, _Points(points))


def _several(table: CostTable, over: tuple[str, ...]) -> Front:
    from mpsearch.solvers import frontier

    problem = Problem.of(table, Budget())
    axes = [total_of(table, name) for name in over]
    points = frontier.exact_front_of_several(
        table.sensitivity,
        np.array([axis.cells[0] for axis in axes]),
        problem.row_of_layer,
        np.array([axis.fixed[0] for axis in axes]),
        np.array([axis.divisor for axis in axes]),
    )
    first, more = points.usage[:, 0], points.usage[:, 1:]
    return Front(
        table, over[0], first, points.sensitivity, points.gap, points.method, problem, _Points(points), over[1:], more
    )


class _Points(Sequence[NDArray[Any]]):
    """The options of a frontier, by number."""

    def __init__(self, found: Any) -> None:
        self._found = found

    def __len__(self) -> int:
        return len(self._found.usage)

    def __getitem__(self, index: Any) -> Any:
        return self._found.options(index)


def _sweep(table: CostTable, over: str, budget: Budget, solver: Solver | None, points: int) -> Front:
    from mpsearch import solvers
    from mpsearch.allocation.solving import default_solver

    if points < 2:
        raise SolverError(f"points={points}: a sweep needs 2 or more")
    free = Problem.of(table, budget)
    solver = default_solver(free) if solver is None else solver
    reason = free.shortfall()
    if reason is not None:
        raise InfeasibleError(reason)
    axis = total_of(table, over)

    def used(options: NDArray[np.int64]) -> float:
        return axis.of(options[free.row_of_layer])

    cheapest = choose(solvers.Exact(), Problem.of(table, budget, over)).options if table.interactions is None else None
    best = choose(solver, free)
    if best.options is None:
        raise (InfeasibleError if best.status is Status.INFEASIBLE else SolverError)(
            f"{solver!r} found no plan within {budget!r}"
        )
    if cheapest is None:
        cheapest = least_options(axis.cells[0], free.row_of_layer, ~np.isnan(free.objective))
    limits = np.linspace(used(cheapest), used(best.options), points)
    best_at: dict[float, tuple[float, float, NDArray[np.int64]]] = {}
    for limit in limits.tolist():
        problem = free.limited({over: (-math.inf, limit)})
        choice = choose(solver, problem)
        if choice.options is None:
            continue
        value = problem.value(choice.options)
        gap = 0.0 if choice.status is Status.OPTIMAL else relative_gap(value, choice.bound)
        at = used(choice.options)
        if at not in best_at or value < best_at[at][0]:
            best_at[at] = (value, gap, choice.options)
    uses: list[float] = []
    for at in sorted(best_at):
        if not uses or best_at[at][0] < best_at[uses[-1]][0]:
            uses.append(at)
    if not uses:
        raise SolverError(f"{solver!r} found no plan at any of {points} limits")
    return Front(
        table,
        over,
        np.array(uses),
        np.array([best_at[at][0] for at in uses]),
        np.array([best_at[at][1] for at in uses]),
        f"sweep of {solver!r}",
        Problem.of(table, Budget()),
        [best_at[at][2] for at in uses],
    )
