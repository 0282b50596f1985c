"""The result of a search as one HTML page that needs no network: verdict, plan, comparison, curve, layers, proof."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from mpsearch.allocation.ties import ties_text
from mpsearch.core import amounts, printing
from mpsearch.core.plan import Plan
from mpsearch.display import curve, fragments
from mpsearch.files.writing import write_atomically
from mpsearch.plan_search.results.result import SearchResult

_COLUMN = {"name": "name", "kind": "text", "group": "name", "precision": "text"}
_OUTCOME = {True: "wins", False: "loses", None: "level"}


def write(result: SearchResult, path: str | os.PathLike[str]) -> None:
    """Write the page, atomically.

    Raises:
        OSError: where the folder does not exist or cannot be written.
    """
    write_atomically(path, page(result))


def page(result: SearchResult) -> str:
    """The whole page as text."""
    points = curve.points(result)
    fields = {
        "title": escape(f"mpsearch: {result.verdict}"),
        "outcome": _OUTCOME[result.wins],
        "verdict": escape(result.verdict[:1].upper() + result.verdict[1:]),
        "facts": _facts(result),
        "plan": _plan(result),
        "comparison": _comparison(result),
        "curve": _curve(result),
        "legend": curve.legend(points),
        "points": _scroll(curve.point_table(result, points), "points of the curve"),
        "layers": _layers(result),
        "proof": _proof(result),
        "passes": _passes(result),
        "settings": _settings(result),
        "environment": _environment(result),
        "data": json.dumps(curve.data(result, points)).replace("<", "\\u003c"),
    }
    template = files("mpsearch.display").joinpath("report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: fields[match[1]], template)


def _facts(result: SearchResult) -> str:
    """The numbers that are looked for first."""
    usage, whole = result.plan.usage, result.tables["posterior"].reference_usage
    evaluation, before = result.measured, result.measured.reference
    facts = []
    for name, title, text in evaluation.kinds:
        plain = None if before is None else getattr(before, name)
        compared = f"unquantized {text(plain)}" if plain else "to the unquantized model, on held-out data"
        facts.append((title, text(getattr(evaluation, name), getattr(evaluation, f"{name}_se")), compared))
    for name, value in usage.items():
        share = f"{100 * value / whole[name]:.3g} % of the unquantized model" if whole.get(name) else ""
        facts.append((amounts.label(name), amounts.text(name, value), share))
    facts.append(
        ("spent", f"{result.passes:.4g} passes", f"plans measured: {len(result.plans)}, in {result.seconds:.3g} s")
    )
    return "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in facts
    )


def _plan(result: SearchResult) -> str:
    """Bits over the depth, and how much of the model each precision has."""
    plan, table = result.plan, result.tables["posterior"]
    numel = {layer.name: layer.numel for layer in table.layers}
    total = sum(numel.values())
    rows = []
    for precision in sorted(set(plan.values()), key=lambda one: (one.weight_bits, one.activation_bits, str(one))):
        members = [name for name, chosen in plan.items() if chosen == precision]
        size = sum(numel[name] for name in members)
        share = f"{100 * size / total:.1f} %" if total else "-"
        rows.append([str(precision), str(len(members)), f"{size:,}", share])
    shares = fragments.table(["precision", "layers", "parameters", "of all parameters"], rows)
    ends = '<div class="ends"><span>first layer</span><span>last layer</span></div>'
    return f"{_bars(plan)}{ends}{_scroll(shares, 'layers and parameters of each precision')}"


def _bars(plan: Plan) -> str:
    """A bar for the weight bits of each layer, and a line for activation bits where they are quantized."""
    count, most = len(plan), _most(plan)
    levels = sorted({0, *(precision.weight_bits for precision in plan.values())})
    marks = "".join(
        f'<i style="bottom:{100 * bits / most:.4g}%"></i><span style="bottom:{100 * bits / most:.4g}%">{bits}</span>'
        for bits in levels
    )
    bars = "".join(
        f'<rect x="{number}" y="{most - precision.weight_bits}" width="{curve.bar_width(count)}" height="{precision.weight_bits}">'
        f"<title>{escape(name)}: {precision}</title></rect>"
        for number, (name, precision) in enumerate(plan.items())
    )
    line, legend = "", "Weight bits of each layer, in the order of the model"
    if any(precision.quantizes_activation for precision in plan.values()):
        steps = "".join(
            f"{'M' if number == 0 else 'L'}{number},{most - precision.activation_bits}h1"
            for number, precision in enumerate(plan.values())
        )
        line, legend = f'<path class="activation" d="{steps}"/>', f"{legend}; the line is the bits of its input"
    return (
        f'<p class="note">{legend}.</p><div class="bits">{marks}'
        f'<svg viewBox="0 0 {count} {most}" preserveAspectRatio="none" role="img" aria-label="{legend}">{bars}{line}</svg></div>'
    )


def _most(plan: Plan) -> int:
    """The top of the axis of bits."""
    activations = [precision.activation_bits for precision in plan.values() if precision.quantizes_activation]
    return max([precision.weight_bits for precision in plan.values()] + activations)


def _comparison(result: SearchResult) -> str:
    shown = fragments.comparison(result)
    note = (
        "Measured on data that the search never saw, on the same samples for every row; ± is one standard error. "
        "The last column is the difference from the plan sample by sample: what the samples have in common cancels."
    )
    if result.uniform is None:
        note = f"No uniform precision fits what was asked for. {note}"
    return f'{_scroll(shown, "comparison with uniform precision")}<p class="note">{note}</p>'


def _curve(result: SearchResult) -> str:
    over = amounts.label(result.front.over)
    return escape(
        f"Of {len(result.plans)} measured plans those that no other beats in both damage and {over}: {len(result.front.plans)}. "
        f"Measured on the {result.plans.origin['samples']} samples that plans were selected on. "
        "Point at one to see its plan, click to download it; arrow keys and Enter do the same."
    )


def _layers(result: SearchResult) -> str:
    """A sortable row for each layer, with what its precision costs and is predicted to damage."""
    table, plan = result.tables["posterior"], result.plan
    resources = list(table.usage)
    header = [
        "#", "name", "kind", "group", "precision", "parameters", *map(amounts.label, resources), f"sensitivity [{table.unit}]",
    ]  # fmt: skip
    heads = "".join(
        f'<th scope="col" class="{_COLUMN.get(name, "number")}"><button type="button">{escape(name)}</button></th>'
        for name in header
    )
    rows = []
    for number, layer in enumerate(table.layers):
        precision = plan[layer.name]
        option = table.precisions.index(precision)
        costs = [(float(table.usage[name][number, option]), name) for name in resources]
        damage = float(table.sensitivity[number, option])
        rows.append(
            f'<tr><td data-value="{number}">{number + 1}</td>'
            f'<th scope="row" class="name">{_breakable(layer.name)}</th>'
            f'<td class="text">{escape(layer.kind)}</td><td class="name">{_breakable(layer.group)}</td>'
            f'<td class="text" data-value="{precision.weight_bits + precision.activation_bits / 100}">{precision}</td>'
            + _number(layer.numel or math.nan, f"{layer.numel:,}" if layer.numel else "-")
            + "".join(_number(value, amounts.text(name, value)) for value, name in costs)
            + _number(damage, printing.damage(damage))
            + "</tr>"
        )
    note = (
        "Sensitivity is the damage at the chosen precision as the search learned it from "
        "measured plans. Click a heading to sort."
    )
    note += "".join(f"<br>{escape(line)}." for line in ties_text(result.plan.predicted).splitlines())
    for fact in filter(None, [result.undecided, result.counted, result.outdone]):
        note += f" {escape(fact)}."
    return (
        f'<p class="note">{note}</p><div class="scroll tall" role="region" aria-label="layers" tabindex="0">'
        f'<table id="layers"><thead><tr>{heads}</tr></thead>\n<tbody>' + "\n".join(rows) + "</tbody></table></div>"
    )


def _breakable(name: str) -> str:
    """A name that a browser may break after a dot."""
    return escape(name).replace(".", ".<wbr>")


def _number(value: float, text: str) -> str:
    """A cell that sorts by its number; an unknown one last."""
    return f'<td data-value="{repr(value) if math.isfinite(value) else ""}">{escape(text)}</td>'


def _proof(result: SearchResult) -> str:
    predicted, table = result.predicted, result.tables["posterior"]
    unit = predicted.get("unit", table.unit)
    selected = result.plan.origin["search"]["select"]
    bound, gap = predicted.get("bound"), predicted.get("gap")
    rows = [
        ("predicted damage of the plan", f"{printing.damage(predicted['sensitivity'])} {unit}"),
        (
            "no plan within the budget has less than",
            "not known" if bound is None else f"{printing.damage(bound)} {unit}",
        ),
        ("gap", "not known" if gap is None else f"{100 * gap:.2g} %"),
        ("relative to", str(table.origin.get("estimator", "the posterior table"))),
        (
            "measured where plans were selected",
            f"{printing.damage(selected['damage'], selected['se'])} {selected['unit']}",
        ),
        ("measured on held-out data", _held_out(result)),
    ]
    note = (
        "The bound is a proof about the table that the search learned from its measured plans: no choice of precisions "
        "within the budget has a smaller sum there. It is no statement about the network; what the network does was measured."
    )
    if result.settings.get("tolerance") is not None:
        note += " With a tolerance the use of a resource is made least, and of that no bound is known."
    return f'{_keys(rows)}<p class="note">{note}</p>'


def _held_out(result: SearchResult) -> str:
    row = next(row for row in result.comparison if row.role == "plan")
    return f"{printing.damage(row.damage, row.damage_se)} {result.plans.unit}"


def _passes(result: SearchResult) -> str:
    stages: Mapping[str, float] = result.settings.get("stages", {})
    total = sum(stages.values())
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{value:.4g}</td>'
        f'<td><span class="share" style="--part:{100 * value / total if total else 0:.3g}%"></span></td></tr>'
        for name, value in stages.items()
    )
    head = '<thead><tr><th scope="col">stage</th><th scope="col">passes</th><th scope="col">share</th></tr></thead>'
    limit = result.settings.get("max_passes")
    allowed = "" if limit is None else f" of {limit:.4g} allowed"
    return (
        f"<p>{result.passes:.4g} forward-pass equivalents{allowed}, in {result.seconds:.3g} s. One is a run of the model over "
        "all data; a backward pass counts 2.</p>"
        f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    )


def _settings(result: SearchResult) -> str:
    known = {k: v for k, v in result.settings.items() if k not in ("stages", "environment") and v is not None}
    rows = [(name.replace("_", " "), _readable(value)) for name, value in known.items()]
    depends = _keys([(name, value) for name, value in result.identity.items()])
    return f"{_keys(rows)}<details><summary>What the measurements depend on</summary>{depends}</details>"


def _environment(result: SearchResult) -> str:
    recorded: Mapping[str, str] = result.settings.get("environment", {})
    if not recorded:
        return '<p class="note">Not recorded in this result.</p>'
    return _keys(list(recorded.items()))


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_readable(part)}" for name, part in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(map(_readable, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _keys(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<div class="scroll"><table class="keys"><tbody>{body}</tbody></table></div>'


def _scroll(content: str, label: str) -> str:
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">{content}</div>'
