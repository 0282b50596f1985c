"""The interactive Pareto curve of a report: its points with their plans, its axes, and the same as a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from mpsearch.core import amounts, printing
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.display.fragments import precision_counts, table
from mpsearch.plan_search.results.result import SearchResult

#: Layers up to which the bars of a plan have gaps between them.
_APART = 150
#: Share of the curve's width that is left free on each side.
_MARGIN = 0.04
#: kind of a point -> sign, colour and words of the legend, title of the point.
_KINDS = {
    "front": ("●", "blue", "plan that none beats", "Plan of the curve"),
    "uniform": ("■", "orange", "uniform precision", "Uniform {uniform}"),
    "chosen": ("★", "ink", "chosen plan", "Chosen plan"),
}


@dataclass(frozen=True)
class Point:
    """A measured plan.

    Attributes:
        plan: with its use of every resource.
        use: of the resource of the curve.
        damage: measured on the select part.
        se: its standard error; 0 where unknown.
        kind: `front`, `uniform` or `chosen`; of several the last.
        front: no plan beats it.
        uniform: its precision, where it was measured as a uniform one.
    """

    plan: Plan
    use: float
    damage: float
    se: float
    kind: str
    front: bool
    uniform: str

    @property
    def title(self) -> str:
        """What kind of plan it is, in words."""
        return _KINDS[self.kind][3].format(uniform=self.uniform)


def points(result: SearchResult) -> list[Point]:
    """Plans of the front, uniform precisions and the chosen plan, by increasing use; a plan that is several of them once."""
    over, layers = result.front.over, tuple(result.plan)
    by_plan: dict[tuple[str, ...], Point] = {}

    def add(plan: Plan, damage: float, se: float, kind: str) -> None:
        key = tuple(str(plan[name]) for name in layers)
        known = by_plan.get(key)
        by_plan[key] = Point(
            plan,
            plan.usage[over],
            damage,
            se if math.isfinite(se) else 0.0,
            kind,
            kind == "front" or (known is not None and known.front),
            key[0] if len(set(key)) == 1 else "",
        )

    def add_all(measured: MeasuredPlans, kind: str) -> None:
        errors = [0.0] * len(measured) if measured.damage_se is None else measured.damage_se.tolist()
        for plan, damage, se in zip(measured.plans, measured.damage.tolist(), errors, strict=True):
            add(plan, damage, se, kind)

    add_all(result.front.plans, "front")
    if result.front.uniforms is not None:
        add_all(result.front.uniforms, "uniform")
    selected = result.plan.origin["search"]["select"]
    add(result.plan, selected["damage"], selected["se"], "chosen")
    return sorted(by_plan.values(), key=lambda point: (point.use, -point.damage))


def data(result: SearchResult, shown: Sequence[Point]) -> dict[str, Any]:
    """What the script of the page draws from, as JSON values."""
    over, layers = result.front.over, list(result.plan)
    used = {str(precision): precision for point in shown for precision in point.plan.values()}
    precisions = sorted(used, key=lambda name: (used[name].weight_bits, name))
    limit, tolerance = amounts.upper_limit(result.plan.budget.get(over)), result.settings.get("tolerance")
    use = [point.use for point in shown] + ([] if limit is None else [limit])
    damage = [point.damage for point in shown]
    log = min(damage) > 0
    return {
        "over": amounts.label(over) + (" (one sample)" if over == "bitops" or over.endswith("_s") else ""),
        "damage": printing.DAMAGE.get(result.settings.get("metric", ""), f"damage [{result.plans.unit}]"),
        "layers": layers,
        "precisions": precisions,
        "bits": [used[name].weight_bits for name in precisions],
        "most": max(used[name].weight_bits for name in precisions),
        "bar": bar_width(len(layers)),
        "log": log,
        "limit": limit,
        "tolerance": tolerance,
        **_axis("x", *_linear_range(use, _MARGIN), over),
        **_damage_axis(damage + ([] if tolerance is None else [tolerance]), log),
        "points": [
            {
                "kind": point.kind,
                "name": point.title,
                "text": _text(point, over, result.plans.unit),
                "use": point.use,
                "damage": point.damage,
                "se": point.se,
                "front": point.front,
                "uniform": point.uniform,
                "choice": [precisions.index(str(point.plan[name])) for name in layers],
                "plan": _rest(point),
            }
            for point in shown
        ],
    }


def bar_width(layers: int) -> float:
    """Width of the bar of one layer, of 1."""
    return 0.86 if layers <= _APART else 1.0


def legend(shown: Sequence[Point]) -> str:
    """The kinds of points that there are."""
    kinds = {point.kind for point in shown}
    items = [
        f'<li><b style="color:var(--{color})" aria-hidden="true">{sign}</b>{text}</li>'
        for kind, (sign, color, text, _) in _KINDS.items()
        if kind in kinds
    ]
    return "".join([*items, "<li>bars: ± one standard error</li>"])


def point_table(result: SearchResult, shown: Sequence[Point]) -> str:
    """Use, damage and precisions of every point."""
    over = result.front.over
    rows = [
        [
            point.title,
            amounts.text(over, point.use),
            printing.damage(point.damage, point.se),
            precision_counts(point.plan),
        ]
        for point in shown
    ]
    return table(["plan", amounts.label(over), f"damage [{result.plans.unit}]", "layers at"], rows)


def _text(point: Point, over: str, unit: str) -> str:
    return f"{amounts.label(over)} {amounts.text(over, point.use)}, damage {printing.damage(point.damage, point.se)} {unit}"


def _rest(point: Point) -> dict[str, Any]:
    """What a plan's file says beside its layers."""
    origin = point.plan.origin or {"search": {"select": {"damage": point.damage, "se": point.se}}}
    return {
        "budget": dict(point.plan.budget),
        "predicted": dict(point.plan.predicted),
        "usage": dict(point.plan.usage),
        "origin": dict(origin),
    }


def _damage_axis(damage: Sequence[float], log: bool) -> dict[str, Any]:
    """A linear axis, or a logarithmic one with ticks at 1, 2 and 5, or at powers of ten where it is long."""
    if not log:
        return _axis("y", *_linear_range(damage, 2 * _MARGIN))
    positive = [value for value in damage if value > 0]
    low, high = min(positive) / 1.4, max(positive) * 1.4
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**power for power in powers for step in ((1, 2, 5) if high < 600 * low else (1,))]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) < 3:
        return _axis("y", low, high)
    return {"y": (low, high), "yTicks": [[tick, f"{tick:.4g}"] for tick in ticks]}


def _axis(name: str, low: float, high: float, resource: str = "") -> dict[str, Any]:
    """Range, and round ticks with their labels."""
    ticks = [float(tick) for tick in MaxNLocator(7).tick_values(low, high) if low <= tick <= high]
    labels = [amounts.tick(resource, tick) if resource else f"{tick:.4g}" for tick in ticks]
    return {name: (low, high), f"{name}Ticks": list(map(list, zip(ticks, labels, strict=True)))}


def _linear_range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """The range of values with some space on both sides."""
    low, high = min(values), max(values)
    space = margin * (high - low) or 0.5 * abs(high) or 1.0
    return low - space, high + space
