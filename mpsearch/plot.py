"""Pictures, drawn without a display and without global state."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from mpsearch import report
from mpsearch.errors import MpsearchError, nearest
from mpsearch.files import write_atomically
from mpsearch.front import Front
from mpsearch.plan import Plan
from mpsearch.problem import uniform
from mpsearch.solution import Solution

if TYPE_CHECKING:
    from mpsearch.search_result import MeasuredFront

#: Okabe and Ito's colours: told apart by the colour-blind too.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777"
PLANS = (GREEN, "#CC79A7", "#56B4E9", "black")

_LABELS = {
    "memory_bytes": "memory",
    "bitops": "BitOps (one sample)",
    "latency_s": "latency (one sample)",
    "average_bits": "average weight bits",
}


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


def front(
    path: Path,
    drawn: Front,
    *,
    mark: Solution | None = None,
    measured: Sequence[Measured] = (),
    title: str = "",
) -> None:
    """Damage over a resource: the front, every uniform precision, the chosen plan, and measured plans.

    Args:
        path: `.png`, `.svg` or `.pdf`.
        drawn: the front.
        mark: the chosen plan.
        measured: with error bars of one standard error.
        title: above the picture.

    Raises:
        MpsearchError: for another kind of file.
    """
    figure, axes = _empty()
    over, unit = drawn.over, drawn.table.unit
    axes.plot(
        drawn.usage,
        _visible(drawn.sensitivity),
        "." if drawn.also else "-",
        drawstyle="default" if drawn.also else "steps-post",
        color=BLUE,
        linewidth=1.8,
        label=f"best plans, predicted ({drawn.method}, {len(drawn)} points)",
        zorder=2,
    )
    baseline = uniform(drawn.table)
    if baseline:
        usage = [totals[over] for _, totals in baseline]
        damage = _visible([totals["sensitivity"] for _, totals in baseline])
        axes.plot(usage, damage, "s", color=ORANGE, markersize=6, label="uniform precision, predicted", zorder=3)
        for (name, _), x, y in zip(baseline, usage, damage, strict=True):
            if math.isfinite(y):
                axes.annotate(name, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color="#8a5f00")
    plans = [series for series in measured if not series.uniform]
    for series in measured:
        color = RED if series.uniform else PLANS[plans.index(series) % len(PLANS)]
        axes.errorbar(
            series.usage,
            _visible(series.damage),
            yerr=series.se,
            fmt="s" if series.uniform else "o",
            markerfacecolor="white",
            markersize=6.5,
            color=color,
            capsize=3,
            linewidth=1.2,
            label=series.label,
            zorder=4,
        )
        for name, x, y in zip(series.names, series.usage, series.damage, strict=False):
            axes.annotate(name, (x, y), xytext=(6, -11), textcoords="offset points", fontsize=8, color=GREY)
    if mark is not None:
        axes.plot(
            [mark.usage[over]],
            _visible([mark.sensitivity]),
            "*",
            color="black",
            markersize=15,
            label="chosen plan",
            zorder=5,
        )
    if (drawn.sensitivity > 0).any():
        axes.set_yscale("log")
    axes.set_ylabel("damage, KL to the unquantized model [nats]" if unit == "nats" else "damage [relative]")
    _frame(axes, over, title)
    save(figure, path)


def measured_front(path: Path, drawn: "MeasuredFront", *, mark: Plan | None = None, title: str = "") -> None:
    """Measured damage over a resource: all plans that none beats, every uniform precision, the chosen plan.

    Args:
        path: `.png`, `.svg` or `.pdf`.
        drawn: the measured front.
        mark: the chosen plan.
        title: above the picture.

    Raises:
        MpsearchError: for another kind of file.
    """
    figure, axes = _empty()
    over, best = drawn.over, drawn.plans
    use = drawn.usage
    axes.errorbar(
        use, _visible(best.damage), yerr=best.damage_se, fmt="o-", color=BLUE, markersize=4.5, capsize=2.5, linewidth=1.4,
        drawstyle="steps-post", label=f"best plans, measured ({len(best)})", zorder=3,
    )  # fmt: skip
    if drawn.uniforms is not None:
        at = [plan.usage[over] for plan in drawn.uniforms.plans]
        damage = _visible(drawn.uniforms.damage)
        axes.errorbar(
            at, damage, yerr=drawn.uniforms.damage_se, fmt="s--", color=ORANGE, markersize=6, capsize=2.5, linewidth=1,
            label="uniform precision, measured", zorder=2,
        )  # fmt: skip
        for plan, x, y in zip(drawn.uniforms.plans, at, damage, strict=True):
            if math.isfinite(y):
                name = str(next(iter(plan.values())))
                axes.annotate(name, (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8, color="#8a5f00")
    if mark is not None:
        at_plan = mark.origin["search"]["select"]["damage"]
        axes.plot(
            [mark.usage[over]], _visible([at_plan]), "*", color="black", markersize=15, label="chosen plan", zorder=5
        )
    if (best.damage > 0).any():
        axes.set_yscale("log")
    unit = "KL to the unquantized model [nats]" if best.unit == "nats" else "[relative]"
    axes.set_ylabel(f"measured damage, {unit}")
    _frame(axes, over, title)
    save(figure, path)


def _empty() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _frame(axes: Axes, over: str, title: str) -> None:
    """The axis of the resource, grid, title and legend."""
    axes.set_xlabel(_LABELS.get(over, over))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: report.amount(over, value) if value >= 0 else ""))
    axes.grid(True, which="major", alpha=0.25)
    axes.margins(x=0.07)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="best")


def save(figure: Figure, path: Path) -> None:
    """Write a picture, atomically.

    Raises:
        MpsearchError: for a kind of file that is not PNG, SVG or PDF.
    """
    kinds = ("png", "svg", "pdf")
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in kinds:
        raise MpsearchError(f"{path}: a picture ends in .png, .svg or .pdf{nearest(kind, kinds)}")
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=150)
    write_atomically(path, data.getvalue())


def _visible(values: Any) -> np.ndarray[Any, Any]:
    """What a log axis can show: values that are not positive are left out."""
    array = np.asarray(values, np.float64)
    return np.where(array > 0, array, np.nan) if (array > 0).any() else array
