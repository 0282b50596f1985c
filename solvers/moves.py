"""Steps from one plan to a better one: repair what breaks a limit, fill what is left, swap two rows."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mpsearch.solvers.feasibility import Floats, Options, fits, least_usage, total

_PAIRS = 768  # cells, those of least priced damage, whose pairs of moves are tried


class Moves:
    """All moves of one table: move k puts row `row[k]` on option `column[k]`; `steps` counts those made."""

    def __init__(
        self,
        sensitivity: Floats,
        usage: Floats,
        limits: Floats,
        allowed: NDArray[np.bool_],
        multipliers: Floats,
    ) -> None:
        self.sensitivity, self.usage, self.limits, self.multipliers = sensitivity, usage, limits, multipliers
        self.allowed = allowed
        self.row, self.column = np.nonzero(allowed)
        self.damage = sensitivity[allowed]
        self.use = usage[:, allowed]  # (R, K)
        spread = np.ptp(self.use, axis=1)
        self.unit = np.where(spread > 0, spread, 1.0)
        priced = np.where(allowed, sensitivity, np.inf)
        for price, use in zip(multipliers, usage, strict=True):
            priced += price * np.where(allowed, use, 0.0)
        near = (priced - priced.min(axis=1, keepdims=True))[allowed]
        self.near = np.sort(np.argsort(near, kind="stable")[:_PAIRS])
        self.steps = 0

    def cheapest(self) -> Options:
        """Each row at its least use of all resources, each measured in its own range."""
        least = least_usage(self.allowed, self.usage)
        use = sum(
            ((u - m[:, None]) / unit for u, m, unit in zip(self.usage, least, self.unit, strict=True)),
            np.zeros(self.allowed.shape),
        )
        return np.asarray(np.where(self.allowed, use, np.inf).argmin(axis=1), np.int64)

    def improved(self, start: Options) -> Options | None:
        """`start` after repair, fill and swaps; None where repair gets stuck."""
        options = self.within(start)
        return None if options is None else self._repeat(self.swap, options)

    def within(self, start: Options) -> Options | None:
        """`start` after repair and fill; None where repair gets stuck."""
        options = self._repeat(self.repair, start)
        return self._repeat(self.fill, options) if fits(options, self.usage, self.limits) else None

    def _repeat(self, step: Callable[[Options], Options | None], options: Options) -> Options:
        while (moved := step(options)) is not None:
            options, self.steps = moved, self.steps + 1
        return options

    def changes(self, options: Options) -> tuple[Floats, Floats, Floats]:
        """Change of damage (K,) and of use (R, K) of each move, and room under the limits (R,)."""
        room = [b - total(use, options) for b, use in zip(self.limits, self.usage, strict=True)]
        rows = np.arange(len(options))
        damage = self.damage - self.sensitivity[rows, options][self.row]
        return damage, self.use - self.usage[:, rows, options][:, self.row], np.array(room)

    def excess(self, use: Floats, room: Floats) -> Floats:
        """Sum over the limits of what exceeds them, each in its own unit; `use` is (R, ...)."""
        over = [np.maximum(u - free, 0.0) / unit for u, free, unit in zip(use, room, self.unit, strict=True)]
        return np.asarray(sum(over, np.zeros(use.shape[1:])))

    def moved(self, options: Options, *moves: int) -> Options:
        """`options` after some moves."""
        changed = options.copy()
        for move in moves:
            changed[self.row[move]] = self.column[move]
        return changed

    def repair(self, options: Options) -> Options | None:
        """Least damage per unit of excess removed, one row, or two where no single row helps."""
        damage, use, room = self.changes(options)
        now = float(self.excess(np.zeros((len(room), 1)), room)[0])
        if now == 0:
            return None
        gain = now - self.excess(use, room)
        if (gain > 1e-12 * now).any():
            rate = np.divide(damage, gain, out=np.full(len(gain), np.inf), where=gain > 1e-12 * now)
            return self._nearer(options, now, int(rate.argmin()))
        pair_use = use[:, self.near, None] + use[:, None, self.near]
        pair_excess = np.where(self.row[self.near, None] == self.row[self.near], np.inf, self.excess(pair_use, room))
        i, j = divmod(int(pair_excess.argmin()), len(self.near))
        if not pair_excess[i, j] < (1 - 1e-12) * now:
            return None
        return self._nearer(options, now, int(self.near[i]), int(self.near[j]))

    def _nearer(self, options: Options, now: float, *moves: int) -> Options | None:
        """`options` after moves; None where the excess falls by rounding alone, which would go on for ever."""
        changed = self.moved(options, *moves)
        room = np.array([b - total(use, changed) for b, use in zip(self.limits, self.usage, strict=True)])
        return changed if float(self.excess(np.zeros((len(room), 1)), room)[0]) < now else None

    def fill(self, options: Options) -> Options | None:
        """Most damage removed per unit of priced resource, among the moves that fit."""
        damage, use, room = self.changes(options)
        better = (damage < 0) & (use <= room[:, None]).all(axis=0)
        price = np.maximum(self.multipliers @ use if len(room) else np.zeros(len(damage)), np.finfo(float).tiny)
        with np.errstate(over="ignore"):  # a step that costs nothing: -inf, first
            rate = np.where(better, damage / price, np.inf)
        return self._first_that_holds(options, rate)

    def swap(self, options: Options) -> Options | None:
        """Two rows at once, the pair that removes most damage."""
        damage, use, room = self.changes(options)
        damage, use, row = damage[self.near], use[:, self.near], self.row[self.near]
        pairs = damage[:, None] + damage
        pairs[(pairs >= 0) | (row[:, None] == row)] = np.inf
        for u, free in zip(use, room, strict=True):
            pairs[u[:, None] + u > free] = np.inf
        return self._first_that_holds(options, pairs)

    def _first_that_holds(self, options: Options, rate: Floats) -> Options | None:
        """Make the best-rated move that lowers the damage and keeps the limits in exact arithmetic, too."""
        before = total(self.sensitivity, options)
        while rate.flat[best := int(rate.argmin())] < math.inf:
            moves = [best] if rate.ndim == 1 else [int(self.near[k]) for k in divmod(best, len(self.near))]
            changed = self.moved(options, *moves)
            if total(self.sensitivity, changed) < before and fits(changed, self.usage, self.limits):
                return changed
            rate.flat[best] = np.inf
        return None
