"""Pictures of Pareto fronts: predicted, by one table or solver or several, and measured."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpsearch.core.front import Front, Measured
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.core.problem import uniform
from mpsearch.core.solution import Solution
from mpsearch.core.table import Array
from mpsearch.display.figures.figure import (
    BLACK,
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    RED,
    SKY,
    damage_axis,
    empty,
    legend,
    resource_axis,
    tidy,
    whiskers,
)
from mpsearch.errors import MpsearchError

if TYPE_CHECKING:
    from mpsearch.plan_search.results.measured_front import MeasuredFront

_MEASURED = (GREEN, PINK, SKY, BLACK)
#: Points at which the proven bound is drawn, over the whole front.
_FINE = 2000


def front_figure(
    front: Front, *, mark: Solution | Plan | None = None, measured: Sequence[Measured] = (), title: str = ""
) -> Figure:
    """Damage over a resource: one front, every uniform precision, the chosen plan, and measured plans.

    Args:
        front: the front.
        mark: the chosen plan.
        measured: with error bars of one standard error.
        title: above the picture.
    """
    name = f"best plans, predicted ({front.method}, {len(front)} point{'s' * (len(front) > 1)})"
    return fronts_figure({name: front}, mark=mark, measured=measured, title=title)


def fronts_figure(
    fronts: Mapping[str, Front],
    *,
    mark: Solution | Plan | None = None,
    measured: Sequence[Measured] = (),
    title: str = "",
) -> Figure:
    """Damage over a resource: fronts of several tables or solvers, with every table's uniform precisions.

    The shaded band reaches from a front down to what is proven that no plan lies below; an exact front is its own bound.

    Args:
        fronts: name for the legend -> front; all over one resource and in one unit.
        mark: the chosen plan, with a line down to its own bound where it is not proven optimal.
        measured: with error bars of one standard error.
        title: above the picture.

    Raises:
        MpsearchError: for no front, several resources, or several units.
    """
    drawn = list(fronts.values())
    axis = {(front.over, front.table.unit) for front in drawn}
    if len(axis) != 1:
        said = ", ".join(f"{over} in {unit}" for over, unit in sorted(axis)) or "none"
        raise MpsearchError(f"fronts over {said}: one picture takes fronts over one resource and in one unit")
    ((over, unit),) = axis
    figure = empty()
    axes = figure.add_subplot()
    everything: list[Array] = []
    banded = 0
    for number, (name, front) in enumerate(fronts.items()):
        colour = COLOURS[number % len(COLOURS)]
        banded += _draw_band(axes, front, colour)
        single = len(front) == 1
        axes.plot(
            front.usage, front.sensitivity, "x" if single else "." if front.also else "-", color=colour, linewidth=1.8,
            drawstyle="default" if front.also else "steps-post", label=name, zorder=5 if single else 3,
        )  # fmt: skip
        everything.append(front.sensitivity)
    if banded:
        colour = COLOURS[0] if len(fronts) == 1 else GREY
        axes.fill_between(
            [], [], [], color=colour, alpha=0.25, linewidth=0, label="proven: no plan lies below the band"
        )
    tables = {id(front.table): number for number, front in reversed(list(enumerate(drawn)))}
    for number in sorted(tables.values()):
        colour = ORANGE if len(tables) == 1 else COLOURS[number % len(COLOURS)]
        baseline = uniform(drawn[number].table)
        damage = np.array([totals["sensitivity"] for _, totals in baseline])
        label = "uniform precision, predicted" if len(tables) == 1 else f"uniform, {list(fronts)[number]}"
        usage = [totals[over] for _, totals in baseline]
        if baseline:
            axes.plot(usage, damage, "s", color=colour, markersize=6, label=label, zorder=4)
            everything.append(damage)
        if number == 0:
            _name(axes, [name for name, _ in baseline], usage, damage)
    plans = [series for series in measured if not series.uniform]
    for series in measured:
        colour = RED if series.uniform else _MEASURED[plans.index(series) % len(_MEASURED)]
        axes.errorbar(
            series.usage, series.damage, yerr=whiskers(np.asarray(series.se, np.float64)), color=colour, capsize=3,
            fmt="s" if series.uniform else "o", markerfacecolor="white", markersize=6.5, linewidth=1.2,
            label=series.label, zorder=5,
        )  # fmt: skip
        _name(axes, series.names, series.usage, series.damage, below=True)
        everything.append(np.asarray(series.damage, np.float64))
    if mark is not None:
        everything.append(np.array([_draw_mark(axes, mark, over)]))
    damage_axis(
        axes.yaxis,
        np.concatenate(everything),
        unit,
        drawn[0].table.origin,
        "predicted damage" if not measured else "damage",
    )
    resource_axis(axes.xaxis, over)
    axes.margins(x=0.07, y=0.08)
    tidy(axes, title)
    legend(figure, [axes])
    return figure


def measured_front_figure(
    front: "MeasuredFront", *, plans: MeasuredPlans | None = None, mark: Plan | None = None, title: str = ""
) -> Figure:
    """Measured damage over a resource: the plans that none beats, every uniform precision, the chosen plan.

    Args:
        front: the measured front.
        plans: all plans that were measured, drawn as dots behind it.
        mark: the chosen plan, of a search.
        title: above the picture.
    """
    figure = empty()
    axes = figure.add_subplot()
    over, best = front.over, front.plans
    everything = [best.damage]
    if plans is not None:
        use = [plan.usage[over] for plan in plans.plans]
        axes.plot(use, plans.damage, ".", color=GREY, alpha=0.6, label=f"all plans measured ({len(plans)})", zorder=1)
        everything.append(plans.damage)
    axes.errorbar(
        front.usage, best.damage, yerr=whiskers(best.damage_se), fmt="o-", color=BLUE, markersize=4.5, capsize=2.5,
        linewidth=1.4, drawstyle="steps-post", label=f"best plans, measured ({len(best)})", zorder=3,
    )  # fmt: skip
    if front.uniforms is not None:
        at = [plan.usage[over] for plan in front.uniforms.plans]
        axes.errorbar(
            at, front.uniforms.damage, yerr=whiskers(front.uniforms.damage_se), fmt="s--", color=ORANGE, markersize=6,
            capsize=2.5, linewidth=1, label="uniform precision, measured", zorder=2,
        )  # fmt: skip
        names = [str(next(iter(plan.values()))) for plan in front.uniforms.plans]
        _name(axes, names, at, front.uniforms.damage)
        everything.append(front.uniforms.damage)
    if mark is not None:
        damage = mark.origin["search"]["select"]["damage"]
        axes.plot([mark.usage[over]], [damage], "*", color=BLACK, markersize=15, label="chosen plan", zorder=5)
        everything.append(np.array([damage]))
    damage_axis(axes.yaxis, np.concatenate(everything), best.unit, best.origin, "measured damage")
    resource_axis(axes.xaxis, over)
    axes.margins(x=0.07, y=0.08)
    tidy(axes, title)
    legend(figure, [axes])
    return figure


def certified(front: Front) -> tuple[Array, Array, Array]:
    """Between the points of a front: the least damage found, and the bound below which no plan is proven to lie.

    A plan that fits between two points fits the right one too, so the right one's bound holds. Between the points of a hull the
    straight line holds, since each is optimal at its price.

    Returns:
        Use, damage of the best plan that fits, and bound, three arrays of one length; empty for a front over several resources,
        or one that is exact.
    """
    exact = front.method == "exact"
    if exact or front.also or len(front) < 2:
        return np.empty(0), np.empty(0), np.empty(0)
    share = np.linspace(0.0, 1.0, max(2, _FINE // len(front)))
    left, right = front.usage[:-1, None], front.usage[1:, None]
    usage = left + share * (right - left)
    damage = np.broadcast_to(front.sensitivity[:-1, None], usage.shape)
    if front.method == "hull":
        bound = damage + share * np.diff(front.sensitivity)[:, None]
    else:
        proven = front.sensitivity - np.where(front.gap > 0, front.gap * np.abs(front.sensitivity), front.gap)
        bound = np.broadcast_to(proven[1:, None], usage.shape)  # nan where the gap is not known
    return usage.ravel(), damage.ravel(), bound.ravel()


def _draw_band(axes: Axes, front: Front, colour: str) -> bool:
    """The band, where there is one; True where there is."""
    usage, damage, bound = certified(front)
    known = np.isfinite(bound)
    if (front.sensitivity > 0).all():
        bound = np.maximum(bound, front.sensitivity.min() * 1e-3)  # a logarithmic axis ends somewhere
    if known.any():
        axes.fill_between(usage, bound, damage, where=known, color=colour, alpha=0.18, linewidth=0, zorder=2)
    return bool(known.any())


def _draw_mark(axes: Axes, mark: Solution | Plan, over: str) -> float:
    """The chosen plan; returns its damage."""
    plan = mark.plan if isinstance(mark, Solution) else mark
    if plan is None or "sensitivity" not in plan.predicted:
        raise MpsearchError("the chosen plan is drawn where a table predicts it to be, and no table has predicted it")
    use, damage = float(plan.usage[over]), float(plan.predicted["sensitivity"])
    if plan.predicted.get("minimized") == "sensitivity" and plan.predicted.get("gap"):
        ends = [plan.predicted["bound"], damage]
        axes.plot([use] * 2, ends, "-_", color=BLACK, linewidth=1.4, markersize=9, label="its proven bound", zorder=5)
    axes.plot([use], [damage], "*", color=BLACK, markersize=15, label="chosen plan", zorder=6)
    return damage


def _name(
    axes: Axes, names: Sequence[str], usage: Sequence[float], damage: Sequence[float] | Array, *, below: bool = False
) -> None:
    """Names beside the first points."""
    for name, x, y in zip(names, usage[: len(names)], damage[: len(names)], strict=True):
        if math.isfinite(y):
            axes.annotate(
                name, (x, y), xytext=(6, -11 if below else 5), textcoords="offset points", fontsize=8,
                color=GREY if below else "#8a5f00", zorder=6,
            )  # fmt: skip
