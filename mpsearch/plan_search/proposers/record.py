"""What a search knows so far: the limits, the tables, and the plans that were measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation.solving import choose
from mpsearch.core.problem import Problem
from mpsearch.solvers import Exact

Floats = NDArray[np.float64]
Options = NDArray[np.int64]

#: Ended by counts and not by a clock, so that the same seed gives the same search on a busy machine.
_EXACT = Exact(time_limit_s=math.inf, gap=1e-6, max_states=50_000, max_nodes=2_000)


@dataclass(eq=False)
class Record:
    """Shared by the proposers of a search.

    Attributes:
        problem: rows (units), options, limits; its objective says by nan what is not allowed.
        tables: name of a signal -> (U, P) damage in nats, at least 0.
        generator: of all random draws.
        measured: plan -> what is made least: its damage, with that between the samples where it is measured there too.
        damage: plan -> damage on the whole part, measured or, for a plan that was dropped early, estimated.
    """

    problem: Problem
    tables: Mapping[str, Floats]
    generator: np.random.Generator
    measured: dict[tuple[int, ...], float] = field(default_factory=dict)
    damage: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.allowed = ~np.isnan(self.problem.objective)
        self._rows = np.arange(len(self.problem.objective))
        self._fits: dict[tuple[int, ...], bool] = {}

    def exact(self, costs: Floats) -> Options | None:
        """The plan within the limits with the least sum of costs (U, P); None where the solver finds none."""
        problem = replace(self.problem, objective=np.where(self.allowed, costs, np.nan), interactions=None)
        return choose(_EXACT, problem).options

    def fits(self, options: Options) -> bool:
        """True where a plan is allowed and keeps the limits."""
        key = tuple(options.tolist())
        if key not in self._fits:  # asked of every measured plan, again and again
            self._fits[key] = bool(self.allowed[self._rows, options].all()) and self.problem.feasible(options)
        return self._fits[key]

    def new(self, options: Options) -> bool:
        """True for a plan that nobody has measured."""
        return tuple(options.tolist()) not in self.measured

    @property
    def best(self) -> Options:
        """The plan with the least measured damage among those that fit."""
        fitting = [key for key in self.measured if self.fits(np.array(key))]
        return np.array(min(fitting, key=self.measured.__getitem__))

    def neighbours(self, options: Options) -> list[tuple[tuple[int, int], ...]]:
        """All changes of one unit, or of two where the second pays for the first, that keep the limits.

        Returns:
            of each neighbour its changes, (unit, new column).
        """
        usage, free = self.problem.usage, self.problem.free
        used = usage[:, self._rows, options].sum(1)
        units, columns = np.nonzero(self.allowed & (np.arange(self.allowed.shape[1]) != options[:, None]))
        change = usage[:, units, columns] - usage[:, units, options[units]]  # (R, M)
        room = (free - used)[:, None]
        alone = (change <= room).all(0)
        found: list[tuple[tuple[int, int], ...]] = [((int(units[m]), int(columns[m])),) for m in np.flatnonzero(alone)]
        grows, shrinks = np.flatnonzero(~alone), np.flatnonzero((change <= 0).all(0) & (change < 0).any(0))
        for m in grows:
            paid = shrinks[(change[:, m, None] + change[:, shrinks] <= room).all(0) & (units[shrinks] != units[m])]
            found += [((int(units[m]), int(columns[m])), (int(units[k]), int(columns[k]))) for k in paid]
        return found


def changed(options: Options, changes: tuple[tuple[int, int], ...]) -> Options:
    """A plan after some changes."""
    found = options.copy()
    for unit, column in changes:
        found[unit] = column
    return found
