"""Pareto fronts of damage over one resource: all points, a cover of them, or the convex hull."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.totals import merged, plus, running_sums
from mpsearch.errors import SolverError
from mpsearch.solvers.hull import hull_steps
from mpsearch.solvers.lists import undominated

Floats = NDArray[np.float64]
Options = NDArray[np.int64]

#: Points kept after a row before `exact_front` gives up.
MAX_POINTS = 4_000_000
#: The same for several resources, where every point is compared with every other.
MAX_SEVERAL = 50_000


@dataclass(frozen=True, eq=False)
class Frontier:
    """Points of a front, by increasing use of the resource; both amounts are correctly rounded sums over the layers.

    Attributes:
        usage: (N,) use; (N, R) for several resources.
        sensitivity: (N,) damage.
        gap: (N,) relative gap to the least damage at that use; 0 = proven.
        method: what it is.
        options: options(i) gives the (G,) columns of point i.
    """

    usage: Floats
    sensitivity: Floats
    gap: Floats
    method: str
    options: Callable[[int], NDArray[np.int64]]


def exact_front(
    sensitivity: Floats, usage: Floats, rows: Options | None = None, fixed: float = 0.0, divisor: float = 1.0
) -> Frontier:
    """All non-dominated points, by merging rows one after another (Nemhauser and Ullmann, 1969).

    After each row the list holds, for the rows so far, every use that no cheaper one beats in damage; only parents are kept, so
    memory is one integer a point and row. Sums are pairs of floats, some 106 bits, so that what is told is rounded once.

    Args:
        sensitivity: (L, P), nan = not allowed.
        usage: (L, P).
        rows: (L,) number of the row of each layer, which is decided on as one; by default each is its own.
        fixed: use of what no decision touches.
        divisor: of the use.

    Raises:
        SolverError: above `MAX_POINTS` points.

    >>> front = exact_front(np.array([[9.0, 3.0], [4.0, 2.0]]), np.array([[2.0, 4.0], [2.0, 4.0]]))
    >>> front.usage.tolist(), front.sensitivity.tolist(), front.options(1).tolist()
    ([4.0, 6.0, 8.0], [13.0, 7.0, 5.0], [1, 0])
    """
    return _merged(sensitivity, usage, rows, fixed, divisor, "exact", lambda s: slice(None))


def epsilon_front(
    sensitivity: Floats,
    usage: Floats,
    epsilon: float,
    rows: Options | None = None,
    fixed: float = 0.0,
    divisor: float = 1.0,
) -> Frontier:
    """A cover of the front: for every plan there is a point that uses no more and has at most (1 + epsilon) times its damage.

    Damage counts from the least of each row, so that it is never negative. Each row may thin the list by a factor
    (1 + epsilon)^(1 / L), as in Warburton's scheme (Operations Research, 1987). Further arguments as in `exact_front`.

    Raises:
        SolverError: for an epsilon that is not positive, or above `MAX_POINTS` points.
    """
    if not epsilon > 0:
        raise SolverError(f"epsilon={epsilon}: expected more than 0")
    members = _members(rows, len(sensitivity))
    base = math.fsum(float(np.nanmin(sensitivity[layers].sum(axis=0))) for layers in members)
    step = math.log1p(epsilon) / len(members)

    def thin(damage: Floats) -> NDArray[np.bool_]:
        with np.errstate(divide="ignore"):
            bucket = np.floor(np.log(np.maximum(damage, 0.0)) / step)
        first: NDArray[np.bool_] = np.append(True, bucket[1:] != bucket[:-1]) | (damage <= 0)
        return first

    points = _merged(sensitivity, usage, rows, fixed, divisor, f"epsilon {epsilon:g}", thin)
    above = np.maximum(points.sensitivity - base, 0.0)
    lowest = base + above / (1 + epsilon)
    size = np.maximum(np.abs(points.sensitivity), np.abs(lowest))
    gap = np.divide(points.sensitivity - lowest, size, out=np.zeros_like(size), where=size > 0)
    return Frontier(points.usage, points.sensitivity, np.maximum(gap, 0.0), points.method, points.options)


def _members(rows: Options | None, layers: int) -> list[Options]:
    """Layers of each row."""
    if rows is None:
        return list(np.arange(layers)[:, None])
    order = np.argsort(rows, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(rows[order])) + 1)


def _merged(
    sensitivity: Floats,
    usage: Floats,
    rows: Options | None,
    fixed: float,
    divisor: float,
    method: str,
    thin: Callable[[Floats], slice | NDArray[np.bool_]],
) -> Frontier:
    used, damage = (np.array([fixed]), np.zeros(1)), (np.zeros(1), np.zeros(1))
    lowest = 0.0  # damage of the rows so far at their least
    parents: list[NDArray[np.int32]] = []
    chosen: list[NDArray[np.int16]] = []
    members = _members(rows, len(sensitivity))
    for row, layers in enumerate(members):
        options = np.flatnonzero(~np.isnan(sensitivity[layers]).any(axis=0))
        lowest += float(sensitivity[layers][:, options].sum(axis=0).min())
        us, ss = (
            tuple(
                np.concatenate(parts) for parts in zip(*(_added(sums, table[layers, p]) for p in options), strict=True)
            )
            for sums, table in ((used, usage), (damage, sensitivity))
        )
        # merges sorted runs, so nearly linear
        order = np.lexsort((us[1], us[0])) if us[1].any() else np.argsort(us[0], kind="stable")
        high, low = ss[0][order], ss[1][order]
        at = np.flatnonzero(np.append(True, high[1:] <= np.minimum.accumulate(high)[:-1]))
        while len(at) > 1:  # of equal rounded damage the one with less left over
            worse = np.append(False, (high[at][1:] == high[at][:-1]) & (low[at][1:] >= low[at][:-1]))
            if not worse.any():
                break
            at = at[~worse]
        at = at[np.append(_differ(us[0][order[at]], us[1][order[at]]), True)]  # of equal use the last one kept is best
        at = at[thin(high[at] - lowest)]
        if len(at) > MAX_POINTS:
            raise SolverError(
                f"more than {MAX_POINTS} non-dominated points after {row + 1} of {len(members)} rows; use method='hull'"
            )
        states, survivors = len(us[0]) // len(options), order[at]
        used, damage = (us[0][survivors], us[1][survivors]), (ss[0][survivors], ss[1][survivors])
        parents.append((survivors % states).astype(np.int32))
        chosen.append(options[survivors // states].astype(np.int16))
    points = undominated_points(used[0] / divisor, damage[0])

    def trace(index: int) -> NDArray[np.int64]:
        columns = np.empty(len(chosen), np.int64)
        at = int(points[index])
        for row in range(len(chosen) - 1, -1, -1):
            columns[row] = chosen[row][at]
            at = int(parents[row][at])
        return columns

    return Frontier(used[0][points] / divisor, damage[0][points], np.zeros(len(points)), method, trace)


def _added(sums: tuple[Floats, Floats], cells: Floats) -> tuple[Floats, Floats]:
    for cell in cells.tolist():
        sums = plus(*sums, cell)
    return sums


def _differ(high: Floats, low: Floats) -> NDArray[np.bool_]:
    """(N - 1,) True where a pair differs from the one before."""
    return np.asarray((high[1:] != high[:-1]) | (low[1:] != low[:-1]))


def undominated_points(usage: Floats, sensitivity: Floats) -> Options:
    """Indices of the points that no other equals or beats in both, by increasing use; of equal points the first."""
    order = np.lexsort((sensitivity, usage))
    damage = sensitivity[order]
    return np.asarray(order[np.append(True, damage[1:] < np.minimum.accumulate(damage)[:-1])])


def exact_front_of_several(
    sensitivity: Floats,
    usage: Floats,
    rows: Options | None = None,
    fixed: Floats | None = None,
    divisor: Floats | None = None,
) -> Frontier:
    """All plans that no other equals or beats in damage and in every resource, for small tables.

    Args:
        sensitivity: (L, P), nan = not allowed.
        usage: (R, L, P).
        rows: as in `exact_front`.
        fixed: (R,).
        divisor: (R,).

    Returns:
        Points sorted by the first resource, then the second, ...; `usage` is (N, R).

    Raises:
        SolverError: above `MAX_SEVERAL` points.
    """
    resources = len(usage)
    tables = [*usage, sensitivity]
    start = [*(np.zeros(resources) if fixed is None else fixed), 0.0]
    sums = [(np.array([value]), np.zeros(1)) for value in start]
    parents: list[NDArray[np.int64]] = []
    chosen: list[NDArray[np.int64]] = []
    members = _members(rows, len(sensitivity))
    for row, layers in enumerate(members):
        options = np.flatnonzero(~np.isnan(sensitivity[layers]).any(axis=0))
        wider = [
            tuple(
                np.concatenate(parts) for parts in zip(*(_added(pair, table[layers, p]) for p in options), strict=True)
            )
            for pair, table in zip(sums, tables, strict=True)
        ]
        ranks = []
        for high, low in wider:
            order = np.lexsort((low, high))
            rank = np.empty(len(order))
            rank[order] = np.cumsum(np.append(0, _differ(high[order], low[order])))
            ranks.append(rank)
        at = undominated(np.stack(ranks[:-1], axis=1), ranks[-1])
        if len(at) > MAX_SEVERAL:
            raise SolverError(
                f"more than {MAX_SEVERAL} non-dominated points after {row + 1} of {len(members)} rows; take fewer "
                "resources, or limit the others with budget="
            )
        states = len(sums[0][0])
        sums = [(high[at], low[at]) for high, low in wider]
        parents.append(at % states)
        chosen.append(options[at // states])
    used = np.stack([high for high, _ in sums[:-1]], axis=1) / (1.0 if divisor is None else divisor)
    damage = sums[-1][0]
    points = undominated(used, damage)  # as they are told
    points = points[np.lexsort((damage[points], *used[points].T[::-1]))]

    def trace(index: int) -> NDArray[np.int64]:
        columns = np.empty(len(chosen), np.int64)
        state = int(points[index])
        for row in range(len(chosen) - 1, -1, -1):
            columns[row] = chosen[row][state]
            state = int(parents[row][state])
        return columns

    return Frontier(used[points], damage[points], np.zeros(len(points)), "exact", trace)


def hull_front(
    sensitivity: Floats, usage: Floats, rows: Options | None = None, fixed: float = 0.0, divisor: float = 1.0
) -> Frontier:
    """The vertices and edge points of the front's lower convex hull, for tables of any size.

    From the least use, steps along the hulls of the rows in order of slope (Sinha and Zoltners, Operations Research,
    1979). Each point is optimal at its own use (it minimizes damage + price x use), so its gap is 0; between two points there may be
    more non-dominated plans, at most one step of one row better than the left one. Arguments as in `exact_front`.

    >>> front = hull_front(np.array([[9.0, 3.0], [4.0, 2.0]]), np.array([[2.0, 4.0], [2.0, 4.0]]))
    >>> front.usage.tolist(), front.options(1).tolist()
    ([4.0, 6.0, 8.0], [1, 0])
    """
    of_layer = np.arange(len(sensitivity)) if rows is None else rows
    steps = hull_steps(merged(sensitivity, of_layer)[0], merged(usage, of_layer)[0])
    order = np.argsort(steps.slope, kind="stable")
    moved, targets, before = steps.row[order], steps.option[order], steps.before[order]
    layers = np.argsort(of_layer, kind="stable")
    first = np.searchsorted(of_layer[layers], np.arange(len(steps.start) + 1))
    sizes = np.diff(first)[moved]  # layers that each step moves
    ends = np.cumsum(sizes)
    step = np.repeat(np.arange(len(moved)), sizes)
    layer = layers[np.arange(len(step)) - (ends - sizes)[step] + first[moved[step]]]
    start = steps.start[of_layer]

    def sums(table: Floats, constant: float) -> Floats:
        terms = np.stack([-table[layer, before[step]], table[layer, targets[step]]], axis=1).ravel()
        head = np.append(table[np.arange(len(start)), start], constant)
        return np.asarray(running_sums(np.append(head, terms))[len(start) + np.append(0, 2 * ends)])

    used, damage = sums(usage, fixed) / divisor, sums(sensitivity, 0.0)
    points = undominated_points(used, damage)

    def options(index: int) -> NDArray[np.int64]:
        columns = steps.start.copy()
        taken = int(points[index])
        columns[moved[:taken]] = targets[:taken]  # the last step of a row wins
        return columns

    return Frontier(used[points], damage[points], np.zeros(len(points)), "hull", options)
