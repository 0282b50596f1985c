"""The door from a table and a budget to a plan."""

import inspect
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.budget import Budget, inequality
from mpsearch.core.problem import Problem
from mpsearch.core.settings import check_kind, check_settings, checked_number
from mpsearch.core.solution import Choice, Solution, Solver, Status, capabilities_of, takes_interactions
from mpsearch.core.table import CostTable
from mpsearch.errors import BudgetError, InfeasibleError, SolverError, TableError

_AT_THE_LIMIT = 64  # plans that break a limit by less than the rounding of sums, before the limit is drawn in
_ILP_ROWS = 24  # with interactions; beyond, linearising them outgrows the solver


@overload
def solve(
    table: CostTable,
    budget: Budget,
    solver: Solver | None = None,
    *,
    minimize: str = "sensitivity",
    top: None = None,
    throw: bool = True,
) -> Solution: ...


@overload
def solve(
    table: CostTable,
    budget: Budget,
    solver: Solver | None = None,
    *,
    minimize: str = "sensitivity",
    top: int,
    throw: bool = True,
) -> list[Solution]: ...


def solve(
    table: CostTable,
    budget: Budget,
    solver: Solver | None = None,
    *,
    minimize: str = "sensitivity",
    top: int | None = None,
    throw: bool = True,
) -> Solution | list[Solution]:
    """Find the plan with the least damage within a budget, or the cheapest within a tolerated damage.

    Args:
        table: what every option costs and damages; layers of one group get one precision.
        budget: limits, `Budget(memory_bytes="1MB")` or `Budget(average_bits=(3.9, 4))`; with `minimize`, `Budget(sensitivity=0.02)`.
        solver: any solver; by default `Exact`, or, for a table with interactions, `ILP` up to 24 rows
            and `Annealing` beyond.
        minimize: `sensitivity`, or a resource, `average_bits` or `effective_bits` whose use is to be least.
        top: return the best `top` distinct plans, best first, as a list.
        throw: raise where there is no plan; else a `Solution` without a plan says why in `stats["reason"]`.

    Returns:
        The solution, its totals recomputed from the table and its limits checked again; a list of them with `top`.

    Raises:
        InfeasibleError: where it is proven that no plan meets the budget (with `throw`).
        SolverError: where the solver gave up (with `throw`), or returned what does not hold.
        BudgetError: where the budget does not fit the table.

    >>> import mpsearch as mps
    >>> layers = (mps.Layer("a", weight_shape=(10,)), mps.Layer("b", weight_shape=(10,)))
    >>> table = mps.CostTable(layers, mps.precisions("w2 w4 w6"), [[9, 3, 1], [4, 3, 2]])
    >>> best = mps.solve(table, mps.Budget(average_bits=4))   # a: 6 bits, b: 2 bits
    >>> best.sensitivity, str(best.plan["a"]), str(best.status)
    (5.0, 'w6', 'optimal')
    """
    check_kind(table, CostTable, "a cost table", TableError)
    check_kind(budget, Budget, "a budget, mps.Budget(average_bits=4)", BudgetError)
    check_kind(minimize, str, "the name of a resource to minimize", BudgetError)
    if top is not None:
        checked_number(top, "top", int, 1, SolverError)
    problem = Problem.of(table, budget, minimize)
    solver = default_solver(problem) if solver is None else solver
    name = repr(solver)
    start = time.perf_counter()
    reason = problem.shortfall()
    if reason is not None:
        choices = [Choice(None, Status.INFEASIBLE, float("inf"), stats={"reason": reason})]
    elif top is None:
        choices = [choose(solver, problem)]
    else:
        choices = _best(solver, problem, top)
    seconds = time.perf_counter() - start
    solutions = [problem.solution(choice, name, seconds) for choice in choices]
    first = solutions[0]
    if first.plan is None:
        limits = " and ".join(inequality(name, limit) for name, limit in problem.limits.items())
        if first.status is Status.INFEASIBLE:
            if len(problem.usage) == 1 and reason is None:
                raise SolverError(f"{name} says that {limits} cannot be met, but the least that any plan uses fits")
            reason = reason or f"no plan meets {limits} together, though each alone can be met (proven by {name})"
            if throw:
                raise InfeasibleError(reason)
        else:
            reason = f"{name} found no plan within {limits} and no proof that there is none; " + str(
                first.stats.get("reason", "try another solver or more time")
            )
            if throw:
                raise SolverError(reason)
        first = problem.solution(Choice(None, choices[0].status, stats={"reason": reason}), name, seconds)
        solutions = [first]
    return solutions if top is not None else first


def choose(solver: Solver, problem: Problem) -> Choice:
    """The answer of a solver, its plan within the limits to the last bit of what is reported.

    A solver sees uses that may be rounded down (`Problem.blur`). Where its plan breaks a limit by less than that, its next best plans are
    asked for until one holds.

    Raises:
        SolverError: where the solver cannot take interactions or a lower limit.
    """
    choice = _answer(solver, problem)
    if choice.options is None or not _blurred(problem, choice):
        return choice
    for further in itertools.islice(_ranked(solver, problem, choice), _AT_THE_LIMIT):
        if not _blurred(problem, further):
            assert further.options is not None
            if not further.stats["rank_proven"] or choice.status is not Status.OPTIMAL:
                return replace(further, status=Status.FEASIBLE)
            rows = np.arange(len(problem.objective))
            value = math.fsum(problem.objective[rows, further.options].tolist())
            value += problem.interactions.total(further.options) if problem.interactions is not None else 0.0
            return replace(further, status=Status.OPTIMAL, bound=value)
    inside = _answer(solver, replace(problem, free=problem.free - problem.blur))
    if inside.options is None:
        reason = "the plans within the limits differ from those beyond by less than the rounding of their sums"
        return Choice(None, Status.UNSOLVED, choice.bound, choice.multipliers, {"reason": reason})
    return replace(inside, status=Status.FEASIBLE, bound=choice.bound, multipliers=choice.multipliers)


def _ranked(solver: Solver, problem: Problem, first: Choice) -> Iterator[Choice]:
    """Plans within the limits as the solver sees them, best first."""
    from mpsearch.solvers.top import ranked

    def within(allowed: NDArray[np.bool_]) -> Choice:
        return _answer(solver, replace(problem, objective=np.where(allowed, problem.objective, np.nan)))

    bounded = problem.interactions is None
    return ranked(within, first, problem.objective, problem.usage, problem.free, bounded=bounded)


def _blurred(problem: Problem, choice: Choice) -> bool:
    """A plan keeps the limits as the solver sees them, but not as they are."""
    assert choice.options is not None
    return _is_plan(problem, choice.options) and problem.fits(choice.options) and not problem.feasible(choice.options)


def _is_plan(problem: Problem, options: Any) -> bool:
    shape = np.shape(options)
    return shape == (len(problem.objective),) and bool(((options >= 0) & (options < problem.objective.shape[1])).all())


def _answer(solver: Solver, problem: Problem) -> Choice:
    """One call of a solver, with the interactions where there are any and it declares to take them."""
    if not isinstance(solver, Solver) or not callable(solver.choose):
        raise SolverError(f"{solver!r} is no solver: it has no method 'choose'")
    check_settings(solver, SolverError)
    can = capabilities_of(solver)
    lower = next((name for name, (low, _) in problem.limits.items() if low > -math.inf), None)
    if lower is not None and not can.lower_limits:
        raise SolverError(
            f"{type(solver).__name__} cannot take the lower limit {inequality(lower, problem.limits[lower])}; use Exact or ILP"
        )
    if problem.interactions is None:
        return solver.choose(problem.objective, problem.usage, problem.free)
    if not takes_interactions(solver):
        undeclared = "interactions" in inspect.signature(solver.choose).parameters
        raise SolverError(
            f"{type(solver).__name__} cannot take the table's {len(problem.interactions.value)} interactions; "
            + (
                "its choose(..., interactions) is not declared: capabilities = SolverCapabilities(interactions=True)"
                if undeclared
                else "use ILP, Annealing or BruteForce"
            )
        )
    return solver.choose(problem.objective, problem.usage, problem.free, interactions=problem.interactions)


def default_solver(problem: Problem) -> Solver:
    """The solver that `solve` takes where none is named."""
    from mpsearch import solvers

    if problem.interactions is None:
        return solvers.Exact()
    return solvers.ILP() if len(problem.objective) <= _ILP_ROWS else solvers.Annealing()


def _best(solver: Solver, problem: Problem, count: int) -> list[Choice]:
    if count < 1:
        raise SolverError(f"top={count}: expected 1 or more")
    if problem.interactions is not None:
        raise SolverError("the best several plans of a table with interactions are not available; ask for one")
    first = _answer(solver, problem)
    if first.options is None:
        return [first]
    holding = (choice for choice in _ranked(solver, problem, first) if not _blurred(problem, choice))
    plans = list(itertools.islice(holding, count))
    return plans or [Choice(None, Status.INFEASIBLE, math.inf)]
