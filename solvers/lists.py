"""Dynamic programming over lists of partial plans of the rows in doubt."""

import time

import numpy as np
from numpy.typing import NDArray

from mpsearch.solvers.core import Core, Found
from mpsearch.solvers.feasibility import Floats, fits

_TRIES = 32  # plans at the very limit that are asked for before the search moves on


def search(
    core: Core,
    slack: Floats,
    rounding: Floats,
    multipliers: Floats,
    ceiling: float,
    usage: Floats,
    limits: Floats,
    *,
    max_states: int,
    deadline: float,
) -> Found:
    """Best plan by dynamic programming over rows in doubt, all others left at the base plan.

    A plan that differs from the base plan in some rows has the excess

        sum of reduced costs + multipliers @ (slack - sum of shifts)

    over the Lagrangian bound; both terms are at least 0 for plans within the limits. So a partial plan whose reduced
    costs exceed the best known excess is hopeless, and so is every row whose cheapest change does (Pisinger, European
    Journal of Operational Research 83 (1995) 394-410; Nemhauser and Ullmann, 1969, for the lists). Each partial plan
    is a whole plan too, the rest at base, so that the ceiling falls as the search goes on.

    Args:
        core: the rows in doubt.
        slack: (R,) limits less the base plan's use, rounded upwards where sums are not exact; may be negative.
        rounding: (R,) how far upwards; plans as near as that to a limit are
            summed exactly.
        multipliers: (R,).
        ceiling: only plans with less excess are wanted.
        usage: (R, L, P) of the whole table.
        limits: (R,).
        max_states: partial plans kept after a row.
        deadline: of `time.perf_counter`.
    """
    resources = len(slack)
    most = np.array([s.max(axis=0) for s in core.shifts]).reshape(-1, resources)
    least = np.array([s.min(axis=0) for s in core.shifts]).reshape(-1, resources)
    up = np.vstack([np.cumsum(most[::-1], axis=0)[::-1], np.zeros(resources)])
    down = np.vstack([np.cumsum(least[::-1], axis=0)[::-1], np.zeros(resources)])
    use, price = np.zeros((1, resources)), np.zeros(1)
    history: list[tuple[NDArray[np.int32], NDArray[np.int16]]] = []
    best: tuple[float, int, int] = (ceiling, -1, -1)  # excess, row, state
    lost, largest = np.inf, 1

    def trace(row: int, state: int) -> list[tuple[int, int]]:
        moves = []
        for r in range(row - 1, -1, -1):
            parent, option = history[r]
            moves.append((r, int(option[state])))
            state = int(parent[state])
        return moves

    def take(row: int) -> None:
        """The best partial plan that keeps the limits becomes the one to beat."""
        nonlocal best, lost
        excess = np.where((use <= slack).all(axis=1), price + (slack - use) @ multipliers, np.inf)
        for _ in range(_TRIES):
            state = int(excess.argmin())
            value = float(excess[state])
            if value >= best[0]:
                return
            if (use[state] <= slack - 2 * rounding).all() or fits(core.changed(trace(row, state)), usage, limits):
                best = (value, row, state)
                return
            lost, excess[state] = min(lost, value), np.inf  # it may have hidden one that does keep them
        lost = min(lost, float(excess.min()))

    take(0)
    for row, (shift, cost) in enumerate(zip(core.shifts, core.costs, strict=True)):
        if cost[1:].min(initial=np.inf) + price.min() > best[0]:
            break
        states = len(price)
        new_use = (shift[:, None, :] + use[None, :, :]).reshape(-1, resources)  # sorted runs, which sort fast
        new_price = (cost[:, None] + price[None, :]).reshape(-1)
        unused = np.maximum(slack - new_use - up[row + 1], 0.0) @ multipliers
        survivors = np.flatnonzero((new_price + unused <= best[0]) & (new_use + down[row + 1] <= slack).all(axis=1))
        survivors = survivors[undominated(new_use[survivors], new_price[survivors] - new_use[survivors] @ multipliers)]
        if len(survivors) > max_states:
            # the likeliest are cheap and near the limits; what is dropped is bounded by its price alone
            likely = new_price[survivors] + np.abs(slack - new_use[survivors]) @ multipliers
            order = np.argpartition(likely, max_states)
            lost = min(lost, float(new_price[survivors[order[max_states:]]].min()))
            survivors = np.sort(survivors[order[:max_states]])
        use, price = new_use[survivors], new_price[survivors]
        history.append(((survivors % states).astype(np.int32), (survivors // states).astype(np.int16)))
        largest = max(largest, len(survivors))
        if not len(survivors):
            break
        take(row + 1)
        if time.perf_counter() > deadline:
            lost = min(lost, float(price.min()))
            break
    if best[1] < 0:
        return Found(None, lost, largest)
    return Found(core.changed(trace(best[1], best[2])), min(lost, best[0]), largest)


def undominated(use: Floats, cost: Floats) -> NDArray[np.int64]:
    """Indices of the states that no other one equals or beats in cost and in every use."""
    if use.shape[1] == 1:
        order = np.argsort(use[:, 0], kind="stable")
        sorted_use, sorted_cost = use[order, 0], cost[order]
        before = np.minimum.accumulate(sorted_cost)
        at = np.flatnonzero(np.append(True, sorted_cost[1:] < before[:-1])) if len(order) else np.empty(0, np.int64)
        at = at[np.append(sorted_use[at][1:] != sorted_use[at][:-1], True)] if len(at) else at
        return np.asarray(order[at], np.int64)
    order = np.lexsort((*use.T[::-1], cost))
    front = np.empty(0, np.int64)
    block = max(1, 4_000_000 // max(1, len(order)))
    for start in range(0, len(order), block):
        part = order[start : start + block]
        others = np.concatenate([front, part])
        beaten = np.ones((len(part), len(others)), bool)
        for r in range(use.shape[1]):
            beaten &= use[others, r] <= use[part, r][:, None]
        beaten &= cost[others] <= cost[part][:, None]
        earlier = np.arange(len(others)) < (len(front) + np.arange(len(part)))[:, None]
        front = np.concatenate([front, part[~(beaten & earlier).any(axis=1)]])
    return np.sort(front)
