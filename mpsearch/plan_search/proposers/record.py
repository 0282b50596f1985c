"""What a search knows so far: the limits, the tables, and the plans that were measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation.solving import choose
from mpsearch.core.problem import Problem
from mpsearch.estimation.surrogate import Surrogate
from mpsearch.plan_search.proposers.neighbours import Neighbours
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
        pending: plans that are about to be measured.
        surrogate: damage from the summed shifts of the output, where one-at-a-time runs were made.
    """

    problem: Problem
    tables: Mapping[str, Floats]
    generator: np.random.Generator
    measured: dict[tuple[int, ...], float] = field(default_factory=dict)
    damage: dict[tuple[int, ...], float] = field(default_factory=dict)
    surrogate: Surrogate | None = None
    pending: set[tuple[int, ...]] = field(default_factory=set)

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
        return self._keeps_limits(tuple(columns.tolist()))

    def new(self, columns: Columns) -> bool:
        """True for a plan that nobody has measured, or is about to."""
        key = tuple(columns.tolist())
        return key not in self.measured and key not in self.pending

    @property
    def fitting(self) -> list[tuple[int, ...]]:
        """The measured plans that fit."""
        return [key for key in self.measured if self._keeps_limits(key)]

    @property
    def best(self) -> Columns | None:
        """The plan with the least measured damage among those that fit; None before there is one."""
        fitting = self.fitting
        return np.array(min(fitting, key=self.measured.__getitem__)) if fitting else None

    def neighbours(self, columns: Columns) -> Neighbours:
        """The plans next to a plan that keep the limits as solvers see them."""
        return Neighbours.of(self.problem, columns)

    def _keeps_limits(self, key: tuple[int, ...]) -> bool:
        if key not in self._fits:  # asked of every measured plan, again and again
            columns = np.array(key)
            self._fits[key] = bool(self.allowed[self._rows, columns].all()) and self.problem.feasible(columns)
        return self._fits[key]
