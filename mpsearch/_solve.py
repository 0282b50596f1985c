"""The door from a table and a budget to a plan."""

import inspect
import time
from typing import overload

from mpsearch.budget import Budget
from mpsearch.errors import InfeasibleError, SolverError
from mpsearch.problem import Problem
from mpsearch.solution import Choice, Solution, Solver, Status
from mpsearch.table import CostTable

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
        budget: upper limits, `Budget(memory_bytes="1MB")`; with `minimize`, `Budget(sensitivity=0.02)`.
        solver: any solver; by default `Exact`, or, for a table with interactions, `ILP` up to 24 rows
            and `Annealing` beyond.
        minimize: `sensitivity`, or a resource whose use is to be least.
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
        limits = " and ".join(f"{key} <= {limit:.6g}" for key, limit in problem.limits.items())
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
    """One call of a solver, with the interactions where there are any.

    Raises:
        SolverError: where the solver cannot take interactions.
    """
    if problem.interactions is None:
        return solver.choose(problem.objective, problem.usage, problem.free)
    if "interactions" not in inspect.signature(solver.choose).parameters:
        raise SolverError(
            f"{type(solver).__name__} cannot take the table's {len(problem.interactions.value)} interactions; "
            "use ILP, Annealing or BruteForce"
        )
    return solver.choose(problem.objective, problem.usage, problem.free, interactions=problem.interactions)  # type: ignore[call-arg]


def default_solver(problem: Problem) -> Solver:
    """The solver that `solve` takes where none is named."""
    from mpsearch import solvers

    if problem.interactions is None:
        return solvers.Exact()
    return solvers.ILP() if len(problem.objective) <= _ILP_ROWS else solvers.Annealing()


def _best(solver: Solver, problem: Problem, count: int) -> list[Choice]:
    from mpsearch.solvers.top import top_choices

    if count < 1:
        raise SolverError(f"top={count}: expected 1 or more")
    if problem.interactions is not None:
        raise SolverError("the best several plans of a table with interactions are not available; ask for one")
    found: list[Choice] = top_choices(solver, problem.objective, problem.usage, problem.free, count)
    return found
