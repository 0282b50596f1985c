"""Dynamic programming over lists of undominated partial plans, in whole numbers."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.solution import Choice, SolverCapabilities, Status
from mpsearch.solvers.feasibility import Floats, Options, Whole, fits, reachable, shifted, total, whole
from mpsearch.solvers.lagrangian import dual

_BLOCK = 256  # partial plans compared at once where there are several resources


@dataclass(frozen=True)
class DynamicProgramming:
    """Exact dynamic programming: row by row, keep each partial plan that no other beats in damage and in use.

    Nemhauser and Ullmann, Management Science 15 (1969) 494-505; for one integer resource the states are those
    of the classical O(L P B) recursion without its empty ones. Floats are dyadic fractions, so use is counted
    in whole multiples of a power of two: sums are exact for seconds as for bytes. Several budgets are states
    with several coordinates, whose number grows fast.

    Partial plans whose Lagrangian bound exceeds a plan at hand are dropped (Morin and Marsten, Operations
    Research 24 (1976) 611-627). Where more than `max_states` states are left, those of least Lagrangian bound
    stay, and the least bound of the others limits what is lost: the plan is still `OPTIMAL` if it is no worse
    than that, else `FEASIBLE` with the bound.

    Attributes:
        max_states: partial plans kept after each row; memory is about 6 bytes a state and row. For several budgets a
            twenty-fifth of it, since there every partial plan is compared with every other.

    >>> choice = DynamicProgramming().choose(
    ...     np.array([[4.0, 1.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0])
    ... )
    >>> choice.options.tolist(), str(choice.status)
    ([1, 0], 'optimal')
    """

    capabilities: ClassVar[SolverCapabilities] = SolverCapabilities(exact=True)

    max_states: int = 100_000

    def choose(self, sensitivity: Floats, usage: Floats, limits: Floats) -> Choice:
        """See `Solver.choose`."""
        usage, limits = shifted(sensitivity, usage, limits)
        allowed = reachable(sensitivity, usage, limits)
        if not allowed.any(axis=1).all():
            return Choice(None, Status.INFEASIBLE, math.inf)
        relaxed = dual(sensitivity, usage, limits, allowed)
        if relaxed.bound == math.inf:
            return Choice(None, Status.INFEASIBLE, math.inf, relaxed.multipliers)
        scaled = [whole(use, allowed, float(limit))[:2] for use, limit in zip(usage, limits, strict=True)]
        rows = len(sensitivity)
        lowest = np.where(allowed, sensitivity, np.inf).min(axis=1)
        above = sensitivity - lowest[:, None]
        ahead = _least_ahead([table for table, _ in scaled], allowed)
        slack = _bound_ahead(above, usage, limits, allowed, relaxed.multipliers)
        cost = np.zeros(1)
        use: list[Whole] = [np.zeros(1, table.dtype) for table, _ in scaled]
        priced = np.zeros(1)  # multipliers times use, as floats
        steps: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
        lost, most = math.inf, 1
        most_kept = self.max_states if len(limits) < 2 else -(-self.max_states // 25)
        known = min((x for x in relaxed.plans if fits(x, usage, limits)), key=lambda x: total(above, x), default=None)
        ceiling = math.inf if known is None else total(above, known) * (1 + 1e-12)
        for row in range(rows):
            columns = np.flatnonzero(allowed[row])
            prices = sum(
                (m * u[row, columns] for m, u in zip(relaxed.multipliers, usage, strict=True)),
                np.zeros(len(columns)),
            )
            new_cost = (cost[:, None] + above[row, columns]).ravel()
            new_use = [(u[:, None] + table[row, columns]).ravel() for u, (table, _) in zip(use, scaled, strict=True)]
            new_priced = (priced[:, None] + prices).ravel()
            states = np.arange(len(new_cost))
            for u, least, (_, limit) in zip(new_use, ahead, scaled, strict=True):
                states = states[np.asarray(u[states] + least[row + 1] <= limit, bool)]
            states = states[_undominated(new_cost[states], [u[states] for u in new_use])]
            bounds = new_cost[states] + new_priced[states] + slack[row + 1]
            states, bounds = states[bounds <= ceiling], bounds[bounds <= ceiling]
            if len(states) > most_kept:
                order = np.argsort(bounds, kind="stable")
                lost = min(lost, float(bounds[order[most_kept]]))
                states = np.sort(states[order[:most_kept]])
            cost, use, priced = new_cost[states], [u[states] for u in new_use], new_priced[states]
            steps.append(((states // len(columns)).astype(np.int32), columns[states % len(columns)].astype(np.int16)))
            most = max(most, len(states))
            if not len(states):
                break
        stats = {"states": most}
        options = _trace(steps, int(cost.argmin())) if len(cost) else known
        if options is None and lost == math.inf:
            return Choice(None, Status.INFEASIBLE, math.inf, relaxed.multipliers, stats)
        if options is None:
            return Choice(None, Status.UNSOLVED, relaxed.bound, relaxed.multipliers, stats)
        if known is not None and total(above, known) < total(above, options):
            options = known
        value = total(sensitivity, options)
        if total(above, options) <= lost:
            return Choice(options, Status.OPTIMAL, value, relaxed.multipliers, stats)
        size = math.fsum(np.abs(lowest).tolist())
        bound = max(relaxed.bound, math.fsum(lowest.tolist()) + lost - 1e-14 * (size + abs(lost)))
        return Choice(options, Status.FEASIBLE, min(bound, value), relaxed.multipliers, stats)


def _trace(steps: list[tuple[NDArray[np.int32], NDArray[np.int16]]], state: int) -> Options:
    """The options that led to a state of the last row."""
    options = np.empty(len(steps), np.int64)
    for row, (parent, option) in reversed(list(enumerate(steps))):
        options[row] = option[state]
        state = int(parent[state])
    return options


def _least_ahead(tables: list[Whole], allowed: NDArray[np.bool_]) -> list[list[int]]:
    """For each resource, the least that rows from `row` on use, for row = 0..L."""
    ahead = []
    for table in tables:
        sums = [0]
        for row in reversed(range(len(table))):
            sums.append(sums[-1] + int(table[row, allowed[row]].min()))
        ahead.append(sums[::-1])
    return ahead


def _bound_ahead(
    cost: Floats, usage: Floats, limits: Floats, allowed: NDArray[np.bool_], multipliers: Floats
) -> Floats:
    """(L + 1,): what cost + priced use of a partial plan up to `row` must be raised by to bound its completions."""
    priced, weight = np.where(allowed, cost, np.inf), np.where(allowed, cost, 0.0)
    for price, use in zip(multipliers, usage, strict=True):
        priced += price * np.where(allowed, use, 0.0)
        weight += price * np.abs(np.where(allowed, use, 0.0))
    rest = np.concatenate([np.cumsum(priced.min(axis=1)[::-1])[::-1], [0.0]])
    paid = multipliers[multipliers > 0] * limits[multipliers > 0]
    rounding = (len(cost) + 8) * np.finfo(float).eps * (weight.max(axis=1).sum() + np.abs(paid).sum())
    return np.asarray(rest - paid.sum() - rounding)


def _undominated(cost: Floats, use: list[Whole]) -> NDArray[np.int64]:
    """Ascending indices of the states that no other one equals or beats in cost and every use (one of equals stays)."""
    order = np.argsort(cost, kind="stable")
    for coordinate in use[::-1]:
        order = order[np.argsort(coordinate[order], kind="stable")]
    if not use:
        return order[:1]
    if len(use) == 1:
        ahead = np.minimum.accumulate(cost[order])
        undominated = np.ones(len(order), bool)
        undominated[1:] = ahead[1:] < ahead[:-1]
        return np.sort(order[undominated])
    # whatever beats a state comes before it in this order
    coordinates = [cost[order], *(u[order] for u in use[1:])]
    front: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for start in range(0, len(order), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(order)))
        before = np.concatenate([*front, block])
        beaten = np.ones((len(block), len(before)), bool)
        for values in coordinates:
            beaten &= np.asarray(values[before] <= values[block, None], bool)
        beaten &= before < block[:, None]
        front.append(block[~beaten.any(axis=1)])
    return np.sort(order[np.concatenate(front)])
