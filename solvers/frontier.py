"""Pareto fronts of damage over one resource: all points, a cover of them, or the convex hull."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import SolverError
from mpsearch.solvers.hull import hull_steps
from mpsearch.solvers.lists import undominated

Floats = NDArray[np.float64]

#: Points kept after a row before `exact_front` gives up.
MAX_POINTS = 4_000_000
#: The same for several resources, where every point is compared with every other.
MAX_SEVERAL = 50_000


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points of a front, by increasing use of the resource.

    Attributes:
        usage: (N,) use; (N, R) for several resources.
        sensitivity: (N,) damage.
        gap: (N,) relative gap to the least damage at that use; 0 = proven.
        method: what it is.
        options: options(i) gives the (L,) columns of point i.
    """

    usage: Floats
    sensitivity: Floats
    gap: Floats
    method: str
    options: Callable[[int], NDArray[np.int64]]


def exact_front(sensitivity: Floats, usage: Floats) -> Frontier:
    """All non-dominated points, by merging rows one after another (Nemhauser and Ullmann, 1969).

    After each row the list holds, for the rows so far, every use that no cheaper one beats in damage; only parents are kept, so
    memory is one integer a point and row.

    Args:
        sensitivity: (L, P), nan = not allowed.
        usage: (L, P).

    Raises:
        SolverError: above `MAX_POINTS` points.

    >>> front = exact_front(np.array([[9.0, 3.0], [4.0, 2.0]]), np.array([[2.0, 4.0], [2.0, 4.0]]))
    >>> front.usage.tolist(), front.sensitivity.tolist(), front.options(1).tolist()
    ([4.0, 6.0, 8.0], [13.0, 7.0, 5.0], [1, 0])
    """
    return _merged(sensitivity, usage, "exact", lambda s: slice(None))


def epsilon_front(sensitivity: Floats, usage: Floats, epsilon: float) -> Frontier:
    """A cover of the front: for every plan there is a point that uses no more and has at most (1 + epsilon) times its damage.

    Damage counts from the least of each row, so that it is never negative. Each row may thin the list by a factor
    (1 + epsilon)^(1 / L), as in Warburton's scheme (Operations Research, 1987).

    Raises:
        SolverError: for an epsilon that is not positive, or above `MAX_POINTS` points.
    """
    if not epsilon > 0:
        raise SolverError(f"epsilon={epsilon}: expected more than 0")
    base = float(np.nanmin(sensitivity, axis=1).sum())
    step = math.log1p(epsilon) / len(sensitivity)

    def thin(damage: Floats) -> NDArray[np.bool_]:
        with np.errstate(divide="ignore"):
            bucket = np.floor(np.log(damage) / step)
        first: NDArray[np.bool_] = np.append(True, bucket[1:] != bucket[:-1]) | (damage == 0)
        return first

    found = _merged(sensitivity, usage, f"epsilon {epsilon:g}", thin)
    above = found.sensitivity - base
    lowest = base + above / (1 + epsilon)
    size = np.maximum(np.abs(found.sensitivity), np.abs(lowest))
    gap = np.divide(found.sensitivity - lowest, size, out=np.zeros_like(size), where=size > 0)
    return Frontier(found.usage, found.sensitivity, gap, found.method, found.options)


def _merged(
    sensitivity: Floats, usage: Floats, method: str, thin: Callable[[Floats], slice | NDArray[np.bool_]]
) -> Frontier:
    shift = np.nanmin(sensitivity, axis=1)
    used, damage = np.zeros(1), np.zeros(1)
    parents: list[NDArray[np.int32]] = []
    chosen: list[NDArray[np.int16]] = []
    for row in range(len(sensitivity)):
        options = np.flatnonzero(~np.isnan(sensitivity[row]))
        us = np.concatenate([used + usage[row, p] for p in options])
        ss = np.concatenate([damage + (sensitivity[row, p] - shift[row]) for p in options])
        order = np.argsort(us, kind="stable")  # merges sorted runs, so nearly linear
        us, ss = us[order], ss[order]
        best = np.minimum.accumulate(ss)
        keep = np.append(True, ss[1:] < best[:-1])
        at = np.flatnonzero(keep)
        at = at[np.append(us[at][1:] != us[at][:-1], True)]  # of equal use the last one kept is best
        at = at[thin(ss[at])]
        if len(at) > MAX_POINTS:
            raise SolverError(
                f"more than {MAX_POINTS} non-dominated points after {row + 1} of {len(usage)} rows; use method='hull'"
            )
        used, damage = us[at], ss[at]
        parents.append((order[at] % max(1, len(us) // len(options))).astype(np.int32))
        chosen.append(options[order[at] // max(1, len(us) // len(options))].astype(np.int16))

    def trace(index: int) -> NDArray[np.int64]:
        found = np.empty(len(chosen), np.int64)
        for row in range(len(chosen) - 1, -1, -1):
            found[row] = chosen[row][index]
            index = int(parents[row][index])
        return found

    return Frontier(used, damage + math.fsum(shift.tolist()), np.zeros(len(used)), method, trace)


def exact_front_of_several(sensitivity: Floats, usage: Floats) -> Frontier:
    """All plans that no other equals or beats in damage and in every resource, for small tables.

    Args:
        sensitivity: (L, P), nan = not allowed.
        usage: (R, L, P).

    Returns:
        Points sorted by the first resource, then the second, ...; `usage` is (N, R).

    Raises:
        SolverError: above `MAX_SEVERAL` points.
    """
    used, damage = np.zeros((1, len(usage))), np.zeros(1)
    parents: list[NDArray[np.int64]] = []
    chosen: list[NDArray[np.int64]] = []
    for row in range(len(sensitivity)):
        options = np.flatnonzero(~np.isnan(sensitivity[row]))
        us = (used[:, None, :] + usage[:, row, options].T[None]).reshape(-1, len(usage))
        ss = (damage[:, None] + sensitivity[row, options]).ravel()
        at = undominated(us, ss)
        if len(at) > MAX_SEVERAL:
            raise SolverError(
                f"more than {MAX_SEVERAL} non-dominated points after {row + 1} of {len(sensitivity)} rows; take fewer "
                "resources, or limit the others with budget="
            )
        used, damage = us[at], ss[at]
        parents.append(at // len(options))
        chosen.append(options[at % len(options)])
    order = np.lexsort((damage, *used.T[::-1]))

    def trace(index: int) -> NDArray[np.int64]:
        found = np.empty(len(chosen), np.int64)
        state = int(order[index])
        for row in range(len(chosen) - 1, -1, -1):
            found[row] = chosen[row][state]
            state = int(parents[row][state])
        return found

    return Frontier(used[order], damage[order], np.zeros(len(order)), "exact", trace)


def hull_front(sensitivity: Floats, usage: Floats) -> Frontier:
    """The vertices and edge points of the front's lower convex hull, for tables of any size.

    From the least use, steps along the hulls of the rows in order of slope (Sinha and Zoltners, Operations Research,
    1979). Each point is optimal at its own use (it minimizes damage + price x use), so its gap is 0; between two points there may be
    more non-dominated plans, at most one step of one row better than the left one.

    >>> front = hull_front(np.array([[9.0, 3.0], [4.0, 2.0]]), np.array([[2.0, 4.0], [2.0, 4.0]]))
    >>> front.usage.tolist(), front.options(1).tolist()
    ([4.0, 6.0, 8.0], [1, 0])
    """
    steps = hull_steps(sensitivity, usage)
    rows = np.arange(len(usage))
    order = np.argsort(steps.slope, kind="stable")
    moved, targets = steps.row[order], steps.option[order]

    def options(index: int) -> NDArray[np.int64]:
        found = steps.start.copy()
        found[moved[:index]] = targets[:index]  # the last step of a row wins
        return found

    return Frontier(
        math.fsum(usage[rows, steps.start].tolist()) + np.append(0.0, np.cumsum(steps.more_use[order])),
        math.fsum(sensitivity[rows, steps.start].tolist()) + np.append(0.0, np.cumsum(steps.more_cost[order])),
        np.zeros(len(order) + 1),
        "hull",
        options,
    )
