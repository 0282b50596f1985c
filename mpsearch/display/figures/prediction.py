"""Picture of a table against the truth: predicted and measured damage of plans."""

import numpy as np
from matplotlib.figure import Figure

from mpsearch.core import printing
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.problem import usage_of
from mpsearch.core.table import CostTable
from mpsearch.display.figures.figure import BLUE, GREY, ORANGE, damage_axis, empty, legend, tidy, whiskers
from mpsearch.evaluation.comparing import plan_agreement


def prediction_figure(table: CostTable, measured: MeasuredPlans, *, title: str = "") -> Figure:
    """Measured damage of plans over what a table predicts; on the line the table is right, where both are in nats.

    Error bars are one standard error of the measurement; Spearman's rank correlation stands in the title.

    Args:
        table: that predicts.
        measured: 3 plans or more over the table's layers.
        title: in front of the correlation.

    Raises:
        PlanError: where plans and table do not fit.
        TableError: for fewer than 3 plans.
    """
    ranks = plan_agreement(table, measured)[0]
    predicted = np.array([usage_of(table, options)["sensitivity"] for options in measured.options(table)])
    se = whiskers(measured.damage_se)
    figure = empty(6.6, 6.0)
    axes = figure.add_subplot()
    uniform = np.array([len(set(plan.values())) == 1 for plan in measured.plans])
    for chosen, colour, marker, label in (
        (~uniform, BLUE, "o", "mixed precision"),
        (uniform, ORANGE, "s", "uniform precision"),
    ):
        if chosen.any():
            axes.errorbar(
                predicted[chosen], measured.damage[chosen], yerr=None if se is None else se[chosen], fmt=marker,
                color=colour, markersize=5, elinewidth=0.8, capsize=2, alpha=0.85, label=f"{label} ({chosen.sum()} plans)",
            )  # fmt: skip
    for number in np.flatnonzero(uniform).tolist():
        name = str(next(iter(measured.plans[number].values())))
        at = (predicted[number], measured.damage[number])
        axes.annotate(name, at, xytext=(6, -10), textcoords="offset points", fontsize=8, color="#8a5f00")
    damage_axis(axes.xaxis, predicted, table.unit, table.origin, "predicted damage")
    damage_axis(axes.yaxis, measured.damage, measured.unit, measured.origin, "measured damage")
    if table.unit == measured.unit != "relative":
        low = min(predicted.min(), measured.damage.min())
        high = max(predicted.max(), measured.damage.max())
        axes.plot([low, high], [low, high], "--", color=GREY, linewidth=1, label="predicted = measured", zorder=1)
    said = f"Spearman {printing.damage(ranks['spearman'], ranks['spearman_se'])}, {len(measured)} plans"
    tidy(axes, f"{title}: {said}" if title else said)
    legend(figure, [axes])
    return figure
