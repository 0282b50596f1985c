"""The best few plans, by Lawler's partition, with any exact solver."""

import heapq
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.solution import Choice, Status
from mpsearch.solvers.feasibility import Floats, Options, total


def ranked(
    choose: Callable[[NDArray[np.bool_]], Choice],
    first: Choice,
    sensitivity: Floats,
    usage: Floats,
    limits: Floats,
    *,
    bounded: bool = True,
) -> Iterator[Choice]:
    """Distinct plans within the limits, best first, as long as there are any and more are asked for.

    Lawler, Management Science 18 (1972) 401-405: the plans other than the best one fall into L parts, part l
    with the best plan's options before row l and another option in row l. Each part is one smaller table,
    solved only when its Lagrangian bound, taken from the solver's own multipliers, is the least of all parts.

    Args:
        choose: an exact solver's answer where only (L, P) cells are allowed.
        first: its answer to the whole, a plan.
        sensitivity: (L, P), as in `Solver.choose`.
        usage: (R, L, P).
        limits: (R,).
        bounded: the objective is the sum of `sensitivity` alone; else every part is solved at once.

    Yields:
        The plans. The first is `first`; the others are `FEASIBLE`, bounded like it. `stats["rank"]` counts from 1, and
        `stats["rank_proven"]` tells whether every part was solved to proof up to there.

    >>> from mpsearch.solvers import BruteForce
    >>> table, use, limit = np.array([[4.0, 1.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0])
    >>> choose = lambda allowed: BruteForce().choose(np.where(allowed, table, np.nan), use, limit)
    >>> [c.options.tolist() for c in ranked(choose, choose(~np.isnan(table)), table, use, limit)]
    [[1, 0], [0, 1], [0, 0]]
    """
    assert first.options is not None
    allowed = ~np.isnan(sensitivity)
    multipliers = np.zeros(len(limits)) if first.multipliers is None else first.multipliers
    priced = np.where(allowed, sensitivity, np.inf)
    for price, use in zip(multipliers, usage, strict=True):
        priced += price * np.where(allowed, use, 0.0)
    paid = multipliers[multipliers > 0] * limits[multipliers > 0]
    largest = np.where(allowed, np.abs(priced), 0.0).max(axis=1).sum()
    offset = -float(paid.sum()) - 1e-12 * float(largest + np.abs(paid).sum()) if bounded else -np.inf
    ticket = itertools.count()  # keeps the heap from comparing arrays

    def value(choice: Choice) -> float:
        assert choice.options is not None
        return total(sensitivity, choice.options) if bounded else choice.bound

    queue: list[tuple[float, int, NDArray[np.bool_], Options | None]] = [
        (value(first), next(ticket), allowed, first.options)
    ]
    proven = first.status is Status.OPTIMAL
    rank = 0
    while queue:
        _, _, part, options = heapq.heappop(queue)
        if options is None:
            choice = choose(part)
            proven &= choice.status in (Status.OPTIMAL, Status.INFEASIBLE)
            if choice.options is not None:
                heapq.heappush(queue, (value(choice), next(ticket), part, choice.options))
            continue
        rank += 1
        status = Status.FEASIBLE if rank > 1 else first.status
        stats = {**first.stats, "rank": rank, "rank_proven": proven}
        yield Choice(options, status, first.bound, first.multipliers, stats)
        for bound, rest in _parts(part, options, priced):
            heapq.heappush(queue, (bound + offset, next(ticket), rest, None))


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
