"""HTML of tables, plans, fronts and results: what Jupyter shows of them. Every name is escaped."""

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from mpsearch.core import amounts, printing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpsearch.core.evaluation import Evaluation
    from mpsearch.core.front import Front
    from mpsearch.core.layer import Layer
    from mpsearch.core.measured_plans import MeasuredPlans
    from mpsearch.core.plan import Plan
    from mpsearch.core.solution import Solution
    from mpsearch.core.table import CostTable
    from mpsearch.plan_search.results.compared import Compared
    from mpsearch.plan_search.results.measured_front import MeasuredFront
    from mpsearch.plan_search.results.result import SearchResult

#: Rows that are shown of a longer table, half of them from its end.
_SHOWN = 20


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, caption: str = "") -> str:
    """An accessible table of escaped text.

    Args:
        header: names of the columns.
        rows: cells.
        left: so many columns are aligned to the left, the others to the right.
        caption: above the table.

    >>> table(["layer", "bits"], [["<fc>", "4"]]).count("&lt;fc&gt;")
    1
    """
    sides = [f'style="text-align:{"left" if i < left else "right"}"' for i in range(len(header))]
    heads = "".join(f'<th scope="col" {side}>{escape(text)}</th>' for side, text in zip(sides, header, strict=True))
    body = "\n".join(
        f'<tr><th scope="row" {sides[0]}>{escape(row[0])}</th>'
        + "".join(f"<td {side}>{escape(cell)}</td>" for side, cell in zip(sides[1:], row[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>"


def cost_table(shown: "CostTable") -> str:
    """Sensitivity of every layer at every precision, what is shared, and what plans can cost."""
    from mpsearch.core.problem import attainable

    facts: dict[str, Callable[[Layer], str]] = {
        "layer": lambda layer: layer.name,
        "kind": lambda layer: layer.kind,
        "group": lambda layer: layer.group,
        "parameters": lambda layer: f"{layer.numel:,}" if layer.numel else "",
    }
    known = [name for name, fact in facts.items() if any(map(fact, shown.layers))]
    rows = [
        [*(facts[name](layer) for name in known), *map(printing.damage, shown.sensitivity[number].tolist())]
        for number, layer in _ends(shown.layers)
    ]
    header = [*known, *map(str, shown.precisions)]
    origin = shown.origin.get("estimator")
    title = f"Sensitivity [{shown.unit}]" + (f" by {origin}" if isinstance(origin, str) else "")
    ranges = [
        f"{amounts.label(name)} {amounts.text(name, low)} to {amounts.text(name, high)}"
        for name, (low, high) in attainable(shown).items()
    ]
    left = len([name for name in known if name != "parameters"])
    return _block(table(header, _cut(rows, len(shown.layers)), left=left, caption=title), "; ".join(ranges))


def plan(shown: "Plan") -> str:
    """The precision of every layer, with bars for weight bits."""
    most = max(precision.weight_bits for precision in shown.values())
    rows = [
        [name, str(precision), _bar(precision.weight_bits, most, 12)]
        for _, (name, precision) in _ends(list(shown.items()))
    ]
    counts = Counter(str(precision) for precision in shown.values())
    ordered = sorted(counts, key=lambda name: next(p.weight_bits for p in shown.values() if str(p) == name))
    total = f"{len(shown)} layers: " + ", ".join(f"{counts[name]} at {name}" for name in ordered)
    return _block(table(["layer", "precision", "weight bits"], _cut(rows, len(shown)), left=3), total, _costs(shown))


def solution(shown: "Solution") -> str:
    """How good it is, what it costs, and the plan."""
    if shown.plan is None:
        return _block("", f"{shown.status}: no plan")
    unit = shown.plan.predicted.get("unit", "")
    return _block("", f"predicted damage {printing.damage(shown.sensitivity)} {unit}, {proof(shown.gap)}") + plan(
        shown.plan
    )


def proof(gap: float | None) -> str:
    """What is known of the distance from the optimum.

    >>> proof(0.0), proof(0.0123), proof(None)
    ('proven optimal', 'within 1.2 % of the optimum', 'no bound known')
    """
    if gap is None or math.isnan(gap):
        return "no bound known"
    return "proven optimal" if gap <= 0 else f"within {100 * gap:.2g} % of the optimum"


def front(shown: "Front") -> str:
    """A picture, and the points."""
    rows = [
        [
            amounts.text(shown.over, float(shown.usage[number])),
            printing.damage(float(shown.sensitivity[number])),
            f"{shown.gap[number]:.2g}",
        ]
        for number, _ in _ends(shown.usage.tolist())
    ]
    header = [amounts.label(shown.over), f"damage [{shown.table.unit}]", "gap"]
    caption = f"{len(shown)} points, {shown.method}"
    return _picture(shown.plot(), caption) + _block(table(header, _cut(rows, len(shown)), caption=caption))


def measured_front(shown: "MeasuredFront") -> str:
    """A picture, and the points with standard errors."""
    return _picture(shown.plot(), f"{len(shown.plans)} measured plans") + _block(
        table(
            [amounts.label(shown.over), f"damage [{shown.plans.unit}]"],
            _cut(
                [
                    [amounts.text(shown.over, use), _with_se(shown.plans, number)]
                    for number, use in _ends(shown.usage.tolist())
                ],
                len(shown.plans),
            ),
        )
    )


def measured_plans(shown: "MeasuredPlans") -> str:
    """Damage and use of every plan."""
    resources = list(shown.plans[0].usage)
    rows = [
        [
            str(number),
            _with_se(shown, number),
            *(amounts.text(name, plan.usage.get(name, math.nan)) for name in resources),
            precision_counts(plan),
        ]
        for number, plan in _ends(shown.plans)
    ]
    header = ["plan", f"damage [{shown.unit}]", *(amounts.label(name) for name in resources), "layers at"]
    return _block(table(header, _cut(rows, len(shown)), caption=f"{len(shown)} measured plans"))


def evaluation(shown: "Evaluation") -> str:
    """What was measured, beside the unquantized model."""
    before = shown.reference
    rows = []
    for name, title, text in shown.kinds:
        whole = "-" if before is None else text(getattr(before, name), getattr(before, f"{name}_se") or None)
        title = printing.DAMAGE["kl"] if name == "kl" else title
        rows.append([title, text(getattr(shown, name), getattr(shown, f"{name}_se")), whole])
    header = [f"{shown.num_samples} samples", "plan", "unquantized"]
    return _block(table(header, rows), "± one standard error", shown.measured)


def search_result(shown: "SearchResult") -> str:
    """Verdict, comparison, plan."""
    tail = "; ".join(filter(None, [shown.spent, "± one standard error", shown.settings.get("measured", "")]))
    head = f"<p><strong>{escape(shown.verdict)}</strong></p>"
    return head + _block(comparison(shown), tail) + plan(shown.plan)


def comparison(shown: "SearchResult") -> str:
    """The plan, uniform precisions and the best plan of one table on the report part, and the unquantized model."""
    resources = [name for name in shown.comparison[0].usage if name != "average_bits"]
    kinds = shown.measured.kinds
    unit = shown.plans.unit
    header = ["held-out data", "average bits", *map(amounts.label, resources), *(title for _, title, _ in kinds)]
    rows = [
        [
            _row_name(row, shown.beyond),
            amounts.text("average_bits", row.usage.get("average_bits", math.nan)),
            *(amounts.text(name, row.usage[name]) for name in resources),
            *(text(getattr(row.evaluation, name), getattr(row.evaluation, f"{name}_se")) for name, _, text in kinds),
            "" if row.role == "plan" else printing.damage(row.difference, row.difference_se),
        ]
        for row in shown.comparison
    ]
    before = shown.measured.reference
    if before is not None:
        reference = shown.tables["posterior"].reference_usage
        rows.append(
            [
                "unquantized",
                "",
                *(amounts.text(name, reference.get(name, math.nan)) for name in resources),
                *(text(getattr(before, name), getattr(before, f"{name}_se") or None) for name, _, text in kinds),
                "",
            ]
        )
    return table([*header, f"damage above the plan's [{unit}]"], rows)


def _row_name(row: "Compared", beyond: str) -> str:
    return {"plan": "plan", "uniform": f"uniform {row.name}", "uniform above": f"uniform {row.name} ({beyond})"}.get(
        row.role, row.name
    )


def _with_se(measured: "MeasuredPlans", number: int) -> str:
    se = None if measured.damage_se is None else float(measured.damage_se[number])
    return printing.damage(float(measured.damage[number]), se)


def precision_counts(shown: "Plan") -> str:
    """How many layers have each precision, the most frequent first."""
    counts = Counter(map(str, shown.values()))
    return ", ".join(f"{name} × {count}" for name, count in counts.most_common())


def _costs(shown: "Plan") -> str:
    """Use of every resource beside its limit."""
    return ", ".join(
        f"{amounts.label(name)} {amounts.text(name, value)}"
        + (f" of {amounts.limit_text(name, shown.budget[name])}" if name in shown.budget else "")
        for name, value in shown.usage.items()
    )


def _ends(items: Sequence[Any]) -> list[tuple[int, Any]]:
    """The first and the last ones of a long sequence, with their numbers."""
    if len(items) <= _SHOWN:
        return list(enumerate(items))
    half = _SHOWN // 2
    places = [*range(half), *range(len(items) - half, len(items))]
    return [(number, items[number]) for number in places]


def _cut(rows: list[list[str]], count: int) -> list[list[str]]:
    """A row that says how many are left out."""
    if len(rows) == count:
        return rows
    half = len(rows) // 2
    gap = [f"… {count - len(rows):,} more …", *("" for _ in rows[0][1:])]
    return [*rows[:half], gap, *rows[half:]]


def _picture(figure: "Figure", text: str) -> str:
    """An image in the page."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=100)
    source = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{escape(text)}" style="max-width:34rem;width:100%" src="data:image/png;base64,{source}">'


def _block(content: str, *notes: str) -> str:
    lines = "".join(f"<div>{escape(note)}</div>" for note in notes if note)
    return f'<div style="overflow-x:auto">{content}{lines}</div>'


def _bar(bits: float, most: float, width: int) -> str:
    """A bar for a number of bits.

    >>> _bar(4, 8, 8)
    '████'
    """
    return "█" * max(1, round(width * bits / most)) if bits else ""
