"""The best few plans, by Lawler's partition, with any exact solver."""

import heapq
import itertools

import numpy as np
from numpy.typing import NDArray

from mpsearch.solution import Choice, Solver, Status
from mpsearch.solvers.feasibility import Floats, Options, total


def top_choices(solver: Solver, sensitivity: Floats, usage: Floats, limits: Floats, count: int) -> list[Choice]:
    """The `count` best distinct plans within the limits, best first.

    Lawler, Management Science 18 (1972) 401-405: the plans other than the best one fall into L parts, part l
    with the best plan's options before row l and another option in row l. Each part is one smaller table,
    solved only when its Lagrangian bound, taken from the solver's own multipliers, is the least of all parts.

    Args:
        solver: an exact one.
        sensitivity: (L, P), as in `Solver.choose`.
        usage: (R, L, P).
        limits: (R,).
        count: plans wanted; fewer come back where there are not as many.

    Returns:
        The plans, or the solver's one `Choice` without a plan. The first is the solver's own answer; the others are
        `FEASIBLE`, bounded like the first. `stats["rank"]` counts from 1, and `stats["rank_proven"]` tells whether
        every part was solved to proof up to there.

    >>> from mpsearch.solvers import BruteForce
    >>> table, use = np.array([[4.0, 1.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]])
    >>> [c.options.tolist() for c in top_choices(BruteForce(), table, use, np.array([3.0]), 5)]
    [[1, 0], [0, 1], [0, 0]]
    """
    first = solver.choose(sensitivity, usage, limits)
    if first.options is None:
        return [first]
    allowed = ~np.isnan(sensitivity)
    multipliers = np.zeros(len(limits)) if first.multipliers is None else first.multipliers
    priced = np.where(allowed, sensitivity, np.inf)
    for price, use in zip(multipliers, usage, strict=True):
        priced += price * np.where(allowed, use, 0.0)
    paid = multipliers[multipliers > 0] * limits[multipliers > 0]
    largest = np.where(allowed, np.abs(priced), 0.0).max(axis=1).sum()
    offset = -float(paid.sum()) - 1e-12 * float(largest + np.abs(paid).sum())
    ticket = itertools.count()  # keeps the heap from comparing arrays
    queue: list[tuple[float, int, NDArray[np.bool_], Options | None]] = [
        (total(sensitivity, first.options), next(ticket), allowed, first.options)
    ]
    proven = first.status is Status.OPTIMAL
    found: list[Choice] = []
    while queue and len(found) < count:
        _, _, part, options = heapq.heappop(queue)
        if options is None:
            choice = solver.choose(np.where(part, sensitivity, np.nan), usage, limits)
            proven &= choice.status in (Status.OPTIMAL, Status.INFEASIBLE)
            if choice.options is not None:
                heapq.heappush(queue, (total(sensitivity, choice.options), next(ticket), part, choice.options))
            continue
        status = Status.FEASIBLE if found else first.status
        stats = {**first.stats, "rank": len(found) + 1, "rank_proven": proven}
        found.append(Choice(options, status, first.bound, first.multipliers, stats))
        for bound, rest in _parts(part, options, priced):
            heapq.heappush(queue, (bound + offset, next(ticket), rest, None))
    return found


def _parts(part: NDArray[np.bool_], options: Options, priced: Floats) -> list[tuple[float, NDArray[np.bool_]]]:
    """Lawler's partition of `part` without `options`, each with the least sum of `priced` in it."""
    cheapest = np.where(part, priced, np.inf).min(axis=1)
    before = np.concatenate([[0.0], np.cumsum(priced[np.arange(len(priced)), options])])
    after = np.concatenate([np.cumsum(cheapest[::-1])[::-1], [0.0]])
    parts = []
    for row, option in enumerate(options.tolist()):
        rest = part.copy()
        rest[:row] = False
        rest[np.arange(row), options[:row]] = True
        rest[row, option] = False
        if rest[row].any():
            parts.append((float(before[row] + priced[row, rest[row]].min() + after[row + 1]), rest))
    return parts
