"""The measured plans that none beats, over one resource."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mpsearch.core import shown
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.files.writing import csv_text, write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class MeasuredFront:
    """Plans measured on the select part, of which none is beaten in both damage and use; with every uniform precision.

    Attributes:
        over: the resource.
        plans: not dominated, by increasing use.
        uniforms: the uniform precisions that were measured, by increasing use; None without any.
    """

    over: str
    plans: MeasuredPlans
    uniforms: MeasuredPlans | None

    @property
    def usage(self) -> np.ndarray[Any, Any]:
        """(N,) use of the resource by each plan of the front."""
        return np.array([plan.usage[self.over] for plan in self.plans.plans])

    def to_frame(self) -> "pd.DataFrame":
        """One row a plan: use of every resource, damage, standard error, whether it is uniform, whether on the front."""
        import pandas as pd

        columns, rows = self._rows()
        return pd.DataFrame(rows, columns=columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows of `to_frame` as CSV."""
        write_atomically(path, self.to_csv())

    def to_csv(self) -> str:
        """The rows of `to_frame` as CSV."""
        columns, rows = self._rows()
        return csv_text([columns, *rows])

    def _rows(self) -> tuple[list[str], list[list[Any]]]:
        resources = list(self.plans.plans[0].usage)
        columns = [*resources, "damage", "damage_se", "uniform"]
        rows = []
        for measured in (self.plans, self.uniforms):
            if measured is None:
                continue
            assert measured.damage_se is not None
            for plan, damage, se in zip(
                measured.plans, measured.damage.tolist(), measured.damage_se.tolist(), strict=True
            ):
                label = "" if measured is self.plans else str(next(iter(plan.values())))
                rows.append([*(float(plan.usage[name]) for name in resources), damage, se, label])
        return columns, rows

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, mark: Plan | None = None, title: str = ""
    ) -> "Figure":
        """Draw measured damage over the resource, with every uniform precision.

        Args:
            path: .png, .svg or .pdf; without it the figure is only returned.
            mark: the chosen plan.
            title: above the picture.
        """
        figures = shown.figures()
        return figures.written(figures.measured_front_figure(self, mark=mark, title=title), path)

    def _repr_html_(self) -> str:
        return shown.html().measured_front(self)


def measured_front(plans: MeasuredPlans, over: str) -> MeasuredFront:
    """The plans that none beats in both damage and use of one resource, and the uniform ones."""
    use = np.array([plan.usage[over] for plan in plans.plans])
    best: list[int] = []
    for number in np.lexsort((plans.damage, use)):
        if not best or plans.damage[number] < plans.damage[best[-1]]:
            best.append(int(number))
    uniform = [i for i, plan in enumerate(plans.plans) if len(set(plan.values())) == 1]
    uniform.sort(key=lambda i: use[i])
    return MeasuredFront(over, _part(plans, best), _part(plans, uniform) if uniform else None)


def _part(plans: MeasuredPlans, numbers: Sequence[int]) -> MeasuredPlans:
    assert plans.damage_se is not None
    places = list(numbers)
    return replace(
        plans,
        plans=tuple(plans.plans[i] for i in places),
        damage=plans.damage[places],
        damage_se=plans.damage_se[places],
    )
