"""The plans next to a plan: one decision changed, or two where the second pays for the first."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.problem import Problem

Floats = NDArray[np.float64]
Places = NDArray[np.int64]
#: A change is a decision and its new column; a neighbour has one or two of them.
Changes = tuple[tuple[int, int], ...]

#: Pairs of changes that are listed at once; of more, some of the changes that have to be paid for are drawn.
_PAIRS = 2**20
#: Changes whose payers are looked through for the best neighbours of one plan.
_LOOKED_THROUGH = 256


@dataclass(frozen=True, eq=False)
class Neighbours:
    """All changes of one decision of a plan, or of two where the second pays for the first, that keep the limits as solvers see them.

    The work for a plan is linear in its cells: pairs are never listed beyond a fixed number.

    Attributes:
        rows: (M,) decision of each change of one decision, whether it keeps the limits or not.
        others: (M,) its new column.
        use: (R, M) what it adds to each use that is limited.
        room: (R,) what may be added.
        alone: (A,) the changes that keep the limits by themselves.
        grows: (G,) those that do not.
        shrinks: (S,) those that use no more of anything and less of something.
    """

    rows: Places
    others: Places
    use: Floats
    room: Floats
    alone: Places
    grows: Places
    shrinks: Places

    @classmethod
    def of(cls, problem: Problem, columns: Places) -> "Neighbours":
        """The neighbours of a plan (D,)."""
        usage, decisions = problem.usage, np.arange(len(columns))
        used = usage[:, decisions, columns].sum(1)
        allowed = ~np.isnan(problem.objective)
        rows, others = np.nonzero(allowed & (np.arange(allowed.shape[1]) != columns[:, None]))
        use = usage[:, rows, others] - usage[:, rows, columns[rows]]
        room = problem.free - used
        alone = (use <= room[:, None]).all(0)
        shrinks = (use <= 0).all(0) & (use < 0).any(0)
        return cls(rows, others, use, room, np.flatnonzero(alone), np.flatnonzero(~alone), np.flatnonzero(shrinks))

    def best(self, gains: Floats) -> Iterator[Changes]:
        """The neighbours with the least sum of gains first; of equal ones those of one change, then by decision and column.

        A change that has to be paid for stands with a lower bound, the least gain of all shrinks that free enough of one use and then
        of another; its payers are looked through when that bound comes first. With one limit nearly every look is a neighbour; with
        several, the changes beyond the first `_LOOKED_THROUGH` are left out.

        Args:
            gains: (D, P) what each column adds to what is to be least.
        """
        gain = gains[self.rows, self.others]
        bounds = np.concatenate([gain[self.alone], gain[self.grows] + self._least_payment(gain)])
        payers: dict[int, list[int]] = {}  # of a change, the best last
        while len(bounds) and bounds[first := int(np.argmin(bounds))] < math.inf:
            if first < len(self.alone):
                bounds[first] = math.inf
                yield (self._change(self.alone[first]),)
                continue
            grows = self.grows[first - len(self.alone)]
            if first not in payers:
                if len(payers) == _LOOKED_THROUGH:
                    unseen = np.setdiff1d(np.arange(len(self.alone), len(bounds)), list(payers))
                    bounds[unseen] = math.inf
                    continue
                paid = self._payers(grows)
                order = np.argsort(gain[grows] + gain[paid], kind="stable")
                payers[first] = paid[order[::-1]].tolist()
            else:
                yield self._change(grows), self._change(payers[first].pop())
            rest = payers[first]
            bounds[first] = gain[grows] + gain[rest[-1]] if rest else math.inf

    def drawn(self, most: int, generator: np.random.Generator) -> list[Changes]:
        """All neighbours, or so many of them drawn at random.

        Args:
            most: neighbours.
            generator: of the draws.
        """
        grows = self.grows
        listed = max(_PAIRS // max(len(self.shrinks), 1), 1)
        if len(grows) > listed:
            grows = generator.choice(grows, listed, replace=False)
        first, second = np.nonzero(self._pays(grows))
        alone, number = len(self.alone), len(self.alone) + len(first)
        places = range(number) if number <= most else generator.choice(number, most, replace=False)
        return [
            (self._change(self.alone[place]),)
            if place < alone
            else (self._change(grows[first[place - alone]]), self._change(self.shrinks[second[place - alone]]))
            for place in places
        ]

    def _least_payment(self, gain: Floats) -> Floats:
        """(G,) no payer of a change gains less than this; infinite where none frees enough."""
        least = np.full(len(self.grows), -math.inf)
        if not len(self.shrinks):
            return np.full(len(self.grows), math.inf)
        for use, room in zip(self.use, self.room, strict=True):
            order = np.argsort(use[self.shrinks])
            enough = np.searchsorted(use[self.shrinks][order], room - use[self.grows], side="right")
            cheapest = np.minimum.accumulate(gain[self.shrinks][order])
            least = np.maximum(least, np.where(enough > 0, cheapest[enough - 1], math.inf))
        return least

    def _payers(self, grows: np.int64) -> Places:
        """The shrinks that pay for a change."""
        payers: Places = self.shrinks[self._pays(np.array([grows]))[0]]
        return payers

    def _pays(self, grows: Places) -> NDArray[np.bool_]:
        """(changes, S) whether a shrink pays for a change."""
        pays: NDArray[np.bool_] = self.rows[grows, None] != self.rows[self.shrinks]
        for use, room in zip(self.use, self.room, strict=True):
            pays &= use[grows, None] + use[self.shrinks] <= room
        return pays

    def _change(self, place: int | np.int64) -> tuple[int, int]:
        return int(self.rows[place]), int(self.others[place])


def changed(columns: Places, changes: Changes) -> Places:
    """A plan after some changes.

    >>> changed(np.array([0, 0, 0]), ((1, 2),)).tolist()
    [0, 2, 0]
    """
    plan = columns.copy()
    for row, column in changes:
        plan[row] = column
    return plan
