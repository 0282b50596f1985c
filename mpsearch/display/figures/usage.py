"""Picture of a budget: what a plan uses of it, where, and what is left."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpsearch.core import amounts
from mpsearch.core.budget import Budget
from mpsearch.core.plan import Plan
from mpsearch.core.table import Array, CostTable
from mpsearch.core.totals import DERIVED, total_of
from mpsearch.display.blocks import blocks
from mpsearch.display.figures.depth import label_height, layer_axis, width
from mpsearch.display.figures.figure import BLACK, GREY, Style, empty, kinds, legend, resource_axis, styles, tidy
from mpsearch.errors import BudgetError, PlanError, nearest

_FIXED, _LEFT = Style(GREY, "", ""), Style("none", "", "////")


def usage_figure(table: CostTable, plan: Plan, resource: str | None = None, *, title: str = "") -> Figure:
    """Use of a resource by a plan: stacked over the whole model by precision, and over the depth by layer or block.

    The fixed part is what no decision touches; what is left of the budget is drawn where the plan has a limit on the resource.

    Args:
        table: that tells what every option uses.
        plan: over the table's layers.
        resource: a sum of the table, not a peak, or `average_bits`; by default what the plan has a limit on, else the memory.
        title: above the picture.

    Raises:
        BudgetError: for a resource that the table does not have as a sum.
        PlanError: for a plan over other layers or with options that are not the table's.
    """
    sums = (*table.usage, *DERIVED)
    if resource is None:
        resource = next((name for name in (*plan.budget, "memory_bytes") if name in sums), "average_bits")
    if resource not in sums:
        raise BudgetError(f"no resource {resource!r} that adds up over layers{nearest(resource, sums)}")
    names = [layer.name for layer in table.layers]
    total = total_of(table, resource)
    use = _used(table, plan, total.cells[0] / total.divisor)
    budget = (
        Budget(**{resource: plan.budget[resource]}).bounds(table)[resource][1] if resource in plan.budget else math.inf
    )
    runs = blocks(names)
    figure = empty(width(len(runs)), 4.8 + label_height(runs))
    whole, depth = figure.subplots(2, height_ratios=[1, 3.4])
    start = _part(whole, 0.0, table.fixed_usage.get(resource, 0.0), _FIXED, "fixed part", resource)
    edges = [block.start for block in runs]
    height = np.zeros(len(runs))
    places = [block.middle for block in runs]
    widths = [0.8 if len(runs) == len(names) else 0.9 * (block.stop - block.start) for block in runs]
    for kind, style in styles(kinds(plan[name] for name in names)).items():
        chosen = np.array([plan[name] == kind for name in names])
        start = _part(whole, start, float(use[chosen].sum()), style, str(kind), resource)
        part = np.add.reduceat(np.where(chosen, use, 0.0), edges)
        depth.bar(
            places, part, width=widths, bottom=height, color=style.colour, hatch=style.hatch, edgecolor="white", linewidth=0.3
        )  # fmt: skip
        height += part
    if math.isfinite(budget):
        _part(whole, start, budget - start, _LEFT, "left of the budget", resource)
        whole.axvline(budget, color=BLACK, linewidth=1.6, label=f"budget, {amounts.text(resource, budget)}")
    whole.set_yticks([])
    whole.set_ylim(-0.5, 0.5)
    whole.margins(x=0.02)
    resource_axis(whole.xaxis, resource, "whole model")
    resource_axis(depth.yaxis, resource, "each layer" if len(runs) == len(names) else "each block")
    tidy(whole, title)
    tidy(depth)
    layer_axis(depth, runs)
    legend(figure, [whole])
    return figure


def _used(table: CostTable, plan: Plan, cells: Array) -> Array:
    """(L,) of the (L, P) uses of all cells, those of the plan."""
    column = {precision: p for p, precision in enumerate(table.precisions)}
    amounts_used = []
    for row, layer in enumerate(table.layers):
        if layer.name not in plan:
            raise PlanError(f"the plan says nothing of layer {layer.name!r} of the table")
        if plan[layer.name] not in column:
            options = " ".join(map(str, table.precisions))
            raise PlanError(f"the plan has {layer.name!r} at {plan[layer.name]}, the table has {options}")
        amounts_used.append(cells[row, column[plan[layer.name]]])
    return np.array(amounts_used)


def _part(axes: Axes, start: float, size: float, style: Style, label: str, resource: str) -> float:
    """One part of the stacked bar; returns where it ends."""
    if size > 0:
        edge = GREY if style is _LEFT else "white"
        said = f"{label}, {amounts.text(resource, size)}"
        axes.barh(0, size, left=start, height=0.7, color=style.colour, hatch=style.hatch, edgecolor=edge, label=said)
    return start + size
