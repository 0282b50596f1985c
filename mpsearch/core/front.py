"""The Pareto front: plans of which none is better in one respect without being worse in another."""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.core import amounts, shown
from mpsearch.core.budget import Budget, inequality, reference
from mpsearch.core.plan import Plan
from mpsearch.core.problem import Problem
from mpsearch.core.solution import Choice, Solution, Status
from mpsearch.core.table import Array, CostTable
from mpsearch.core.totals import DERIVED
from mpsearch.errors import BudgetError, InfeasibleError, nearest
from mpsearch.files.writing import csv_text, write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Measured:
    """Measured damage of some plans.

    Attributes:
        label: for the legend.
        usage: of the resource on the axis.
        damage: measured, in nats.
        se: standard errors of `damage`.
        names: a name for each point, or none.
        uniform: True for uniform precisions.
    """

    label: str
    usage: Sequence[float]
    damage: Sequence[float]
    se: Sequence[float]
    names: Sequence[str] = ()
    uniform: bool = False


@dataclass(frozen=True, eq=False)
class Front(Sequence[Solution]):
    """Solutions sorted by one resource, none dominated; each is made when it is asked for.

    Attributes:
        table: the table that it belongs to.
        over: the resource on the horizontal axis.
        usage: (N,) use of it, fixed part included, increasing.
        sensitivity: (N,) damage, decreasing.
        gap: (N,) relative gap of each point: 0 where it is proven that no plan of its size does less damage.
        method: `exact` (all non-dominated points), `epsilon ...`, `hull`, or the solver that was swept.
        problem: the table as rows.
        points: (N,) the options of each row at each point.
        also: further resources in which no point is dominated; then damage need not fall along the front.
        also_usage: (N, len(also)) use of them.
    """

    table: CostTable
    over: str
    usage: Array
    sensitivity: Array
    gap: Array
    method: str
    problem: Problem
    points: Sequence[NDArray[Any]]
    also: tuple[str, ...] = ()
    also_usage: Array | None = None

    def __len__(self) -> int:
        return len(self.usage)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"point {index} of a front of {len(self)}")
        index %= len(self)
        gap = float(self.gap[index])
        value = float(self.sensitivity[index])
        bound = value - gap * abs(value) if math.isfinite(gap) else -math.inf
        status = Status.OPTIMAL if gap == 0 else Status.FEASIBLE
        options = np.asarray(self.points[index], np.int64)
        return self.problem.solution(Choice(options, status, bound), self.method, 0.0)

    def __iter__(self) -> Iterator[Solution]:
        return (self[i] for i in range(len(self)))

    def at(self, budget: Budget | float | str) -> Solution:
        """The point with the least damage within a budget.

        Args:
            budget: a budget on any resources, or an amount of the one that the front is over.

        Raises:
            InfeasibleError: where no point of the front fits.
            BudgetError: where the budget does not fit the table.
        """
        if not isinstance(budget, Budget):
            whole = None if self.over in DERIVED else reference(self.table, self.over)
            budget = Budget(**{self.over: amounts.parse(self.over, budget, whole)})
        limits = budget.bounds(self.table)
        least, most = limits.get(self.over, (-math.inf, math.inf))
        fitting = np.flatnonzero((least <= self.usage) & (self.usage <= most))
        for index in fitting[np.argsort(self.sensitivity[fitting], kind="stable")].tolist():  # the least damage first
            if len(limits) == (self.over in limits):
                return self[index]  # type: ignore[no-any-return]
            point: Solution = self[index]
            totals = {**point.usage, "sensitivity": point.sensitivity}
            if all(low <= totals[name] <= high for name, (low, high) in limits.items()):
                return point
        wanted = " and ".join(inequality(name, limit) for name, limit in limits.items())
        raise InfeasibleError(f"no point of the front has {wanted}: the least {self.over} is {self.usage[0]:.6g}")

    def to_frame(self) -> "pd.DataFrame":
        """One row a point: the resource, sensitivity, gap, and the precision of every layer."""
        import pandas as pd

        rows = list(self._rows())
        return pd.DataFrame(rows[1:], columns=rows[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the front as CSV, atomically; columns as in `to_frame`."""
        write_atomically(path, csv_text(self._rows()))

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        mark: Solution | Plan | None = None,
        measured: "Sequence[Measured]" = (),
        title: str = "",
    ) -> "Figure":
        """Draw the front with the uniform precisions beside it, as in `mpsearch.display.figures.front_figure`.

        Args:
            path: .png, .svg or .pdf; without it the figure is only returned.
            mark: the chosen plan.
            measured: `mpsearch.display.figures.Measured` damages, with error bars.
            title: above the picture.
        """
        figures = shown.figures()
        return figures.written(figures.front_figure(self, mark=mark, measured=measured, title=title), path)

    def _repr_html_(self) -> str:
        return shown.html().front(self)

    def _rows(self) -> Iterator[list[Any]]:
        yield [self.over, *self.also, "sensitivity", "gap", *(layer.name for layer in self.table.layers)]
        names = [str(precision) for precision in self.table.precisions]
        for index in range(len(self)):
            options = np.asarray(self.points[index], np.int64)[self.problem.row_of_layer]
            more = [] if self.also_usage is None else self.also_usage[index].tolist()
            head = [float(self.usage[index]), *more, float(self.sensitivity[index]), float(self.gap[index])]
            yield [*head, *(names[p] for p in options)]


def check_over(table: CostTable, over: str) -> None:
    """Refuse a resource that cannot be the axis of a front.

    Raises:
        BudgetError: for an unknown resource, or one that is a peak.
    """
    known = (*table.usage, *DERIVED)
    if over in table.peaks:
        raise BudgetError(f"{over} is a peak over steps; limit it by budget= and take the front over a sum")
    if over not in known:
        raise BudgetError(f"the table has no resource {over!r}{nearest(over, known)}")
