"""Enumeration of every plan: for tests and tiny tables."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mpsearch.core.solution import Choice, SolverCapabilities, Status
from mpsearch.errors import SolverError
from mpsearch.solvers.feasibility import Floats, Options, fits, total
from mpsearch.solvers.pairs import pair_blocks

if TYPE_CHECKING:
    from mpsearch.core.table import Interactions

_CHUNK = 1 << 16


@dataclass(frozen=True)
class BruteForce:
    """Least damage within any number of budgets, and with interactions, by looking at every plan.

    Attributes:
        max_plans: the most plans it is willing to look at; 10^7 of them take some seconds.

    Raises:
        SolverError: the table has more plans than that.

    >>> choice = BruteForce().choose(np.array([[4.0, 1.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0]))
    >>> choice.options.tolist(), str(choice.status), choice.stats["plans"]
    ([1, 0], 'optimal', 4)
    """

    capabilities: ClassVar[SolverCapabilities] = SolverCapabilities(exact=True, interactions=True)

    max_plans: int = 10**7

    def choose(
        self,
        sensitivity: Floats,
        usage: Floats,
        limits: Floats,
        interactions: "Interactions | None" = None,
    ) -> Choice:
        """See `Solver.choose`; `interactions` are added to the objective."""
        columns = [np.flatnonzero(row) for row in ~np.isnan(sensitivity)]
        count = math.prod(len(allowed) for allowed in columns)
        if count > self.max_plans:
            digits = sum(math.log10(len(allowed)) for allowed in columns)
            raise SolverError(
                f"{count if digits < 9 else f'about 1e{digits:.0f}'} plans, expected at most {self.max_plans} "
                "for BruteForce; use Exact, or ILP for interactions"
            )
        rows = np.arange(len(sensitivity))
        blocks = pair_blocks(interactions, sensitivity.shape[1])
        best: Options | None = None
        least = math.inf
        for start in range(0, count, _CHUNK):
            number = np.arange(start, min(start + _CHUNK, count))
            options = np.empty((len(number), len(rows)), np.int64)
            for row in reversed(rows):
                number, digit = np.divmod(number, len(columns[row]))
                options[:, row] = columns[row][digit]
            cost = sensitivity[rows, options].sum(axis=1)
            for (i, k), block in blocks.items():
                cost += block[options[:, i], options[:, k]]
            for use, limit in zip(usage, limits, strict=True):
                cells = use[rows, options]
                rounding = len(rows) * np.finfo(float).eps * np.abs(cells).sum(axis=1)
                cost[cells.sum(axis=1) > limit + rounding] = np.inf
            while cost[index := int(cost.argmin())] < least:
                if fits(options[index], usage, limits):
                    best, least = options[index], float(cost[index])
                cost[index] = np.inf
        stats = {"plans": count}
        if best is None:
            return Choice(None, Status.INFEASIBLE, math.inf, stats=stats)
        extra = interactions.total(best) if interactions is not None else 0.0
        return Choice(best, Status.OPTIMAL, total(sensitivity, best) + extra, stats=stats)
