"""What a search knows so far: the limits, the tables, and the plans that were measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation.solving import choose
from mpsearch.core.problem import Problem
from mpsearch.estimation.surrogate import Surrogate
from mpsearch.solvers import Exact

Floats = NDArray[np.float64]
#: (D,) a plan: the column of a table that each decision takes.
Columns = NDArray[np.int64]

#: Ended by counts and not by a clock, so that the same seed gives the same search on a busy machine.
_EXACT = Exact(time_limit_s=math.inf, gap=1e-6, max_states=50_000, max_nodes=2_000)


@dataclass(eq=False)
class Record:
    """What proposers know.

    Attributes:
        problem: rows (decisions), columns (precisions), limits; its objective says by nan what is not allowed.
        tables: name of a signal -> (D, P) damage, at least 0.
        generator: of all random draws.
        measured: plan -> what is to be least: its damage, with that between the samples where it is measured there too.
        damage: plan -> damage on the whole part, measured or, for a plan that was dropped early, estimated.
        surrogate: damage from the summed shifts of the output, where one-at-a-time runs were made.
    """

    problem: Problem
    tables: Mapping[str, Floats]
    generator: np.random.Generator
    measured: dict[tuple[int, ...], float] = field(default_factory=dict)
    damage: dict[tuple[int, ...], float] = field(default_factory=dict)
    surrogate: Surrogate | None = None

    def __post_init__(self) -> None:
        self.allowed = ~np.isnan(self.problem.objective)
        self._rows = np.arange(len(self.problem.objective))
        self._fits: dict[tuple[int, ...], bool] = {}

    def exact(self, costs: Floats) -> Columns | None:
        """The plan within the limits with the least sum of costs (D, P); None where the solver finds none."""
        problem = replace(self.problem, objective=np.where(self.allowed, costs, np.nan), interactions=None)
        return choose(_EXACT, problem).options

    def fits(self, columns: Columns) -> bool:
        """True where a plan is allowed and keeps the limits."""
        key = tuple(columns.tolist())
        if key not in self._fits:  # asked of every measured plan, again and again
            self._fits[key] = bool(self.allowed[self._rows, columns].all()) and self.problem.feasible(columns)
        return self._fits[key]

    def new(self, columns: Columns) -> bool:
        """True for a plan that nobody has measured."""
        return tuple(columns.tolist()) not in self.measured

    @property
    def best(self) -> Columns | None:
        """The plan with the least measured damage among those that fit; None before there is one."""
        fitting = [key for key in self.measured if self.fits(np.array(key))]
        return np.array(min(fitting, key=self.measured.__getitem__)) if fitting else None

    def neighbours(self, columns: Columns) -> list[tuple[tuple[int, int], ...]]:
        """All changes of one decision, or of two where the second pays for the first, that keep the limits as solvers see them.

        Returns:
            of each neighbour its changes, (decision, new column).
        """
        usage, free = self.problem.usage, self.problem.free
        used = usage[:, self._rows, columns].sum(1)
        rows, others = np.nonzero(self.allowed & (np.arange(self.allowed.shape[1]) != columns[:, None]))
        change = usage[:, rows, others] - usage[:, rows, columns[rows]]  # (R, M)
        room = (free - used)[:, None]
        alone = (change <= room).all(0)
        moves: list[tuple[tuple[int, int], ...]] = [((int(rows[m]), int(others[m])),) for m in np.flatnonzero(alone)]
        grows, shrinks = np.flatnonzero(~alone), np.flatnonzero((change <= 0).all(0) & (change < 0).any(0))
        for m in grows:
            paid = shrinks[(change[:, m, None] + change[:, shrinks] <= room).all(0) & (rows[shrinks] != rows[m])]
            moves += [((int(rows[m]), int(others[m])), (int(rows[k]), int(others[k]))) for k in paid]
        return moves


def changed(columns: Columns, changes: tuple[tuple[int, int], ...]) -> Columns:
    """A plan after some changes.

    >>> changed(np.array([0, 0, 0]), ((1, 2),)).tolist()
    [0, 2, 0]
    """
    plan = columns.copy()
    for row, column in changes:
        plan[row] = column
    return plan
