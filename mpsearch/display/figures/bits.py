"""Picture of a plan: bits per layer over the depth, with parameters and MACs under it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mpsearch.core import amounts
from mpsearch.core.layer import Layer
from mpsearch.core.plan import Plan
from mpsearch.core.table import Array
from mpsearch.display.blocks import Block, blocks
from mpsearch.display.figures.depth import label_height, layer_axis, width
from mpsearch.display.figures.figure import BLACK, GREY, empty, kinds, legend, styles, tidy
from mpsearch.errors import PlanError, nearest


def plan_figure(plan: Plan, layers: Sequence[Layer] = (), *, title: str = "") -> Figure:
    """Weight bits of every layer, activation bits where the plan sets some, parameters and MACs under them.

    Of more than 40 layers the mean bits of each block of the names, weighted by parameters where they are known, are drawn over the
    bars, and parameters and MACs are those of the blocks.

    Args:
        plan: what is drawn.
        layers: those of the table or the model, which tell parameters and MACs; more than the plan has do no harm.
        title: above the picture.

    Raises:
        PlanError: for a layer of the plan that is not among `layers`.
    """
    names = list(plan)
    known = {layer.name: layer for layer in layers}
    if layers:
        for name in names:
            if name not in known:
                raise PlanError(f"the plan names {name!r}, which is no layer here{nearest(name, known)}")
    parameters = np.array([known[name].numel if layers else 0 for name in names], np.float64)
    macs = np.array([known[name].macs if layers else 0 for name in names], np.float64)
    below = [
        (label, values) for label, values in (("parameters", parameters), ("MACs\n(one sample)", macs)) if values.any()
    ]
    runs = blocks(names)
    alone = len(runs) == len(names)
    figure = empty(width(len(runs)), 3.4 + 1.4 * len(below) + label_height(runs))
    panels = figure.subplots(1 + len(below), height_ratios=[2.4] + [1] * len(below), sharex=True, squeeze=False)[:, 0]
    _draw_bits(panels[0], plan, runs, parameters if parameters.any() else np.ones(len(names)))
    tidy(panels[0], title)
    for axes, (label, values) in zip(panels[1:], below, strict=True):
        of_block = np.add.reduceat(values, [block.start for block in runs])
        widths = [0.8 if alone else 0.9 * (block.stop - block.start) for block in runs]
        axes.bar([block.middle for block in runs], of_block, width=widths, color=GREY)
        axes.set_ylabel(label)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: amounts.tick("", value)))
        tidy(axes)
    for axes in panels:
        axes.grid(False, axis="x")
        layer_axis(axes, runs, labels=axes is panels[-1])
    figure.align_ylabels(panels.tolist())
    legend(figure, [panels[0]])
    return figure


def _draw_bits(axes: Axes, plan: Plan, runs: Sequence[Block], weights: Array) -> None:
    alone = len(runs) == len(plan)
    chosen = list(plan.values())
    bits = np.array([precision.weight_bits for precision in chosen], np.float64)
    for kind, style in styles(kinds(chosen)).items():
        mine = np.array([precision == kind for precision in chosen])
        look: dict[str, Any] = {"color": style.colour, "hatch": style.hatch, "edgecolor": "white", "linewidth": 0}
        count = int(mine.sum())
        look["label"] = f"{kind}: {count} layer{'s' * (count > 1)}"
        if alone:
            axes.bar(np.flatnonzero(mine), bits[mine], width=0.8, **look)
        else:  # one shape instead of a bar for each of thousands
            axes.stairs(np.where(mine, bits, 0.0), np.arange(len(plan) + 1) - 0.5, fill=True, **look)
    quantized = [i for i, precision in enumerate(chosen) if precision.quantizes_activation]
    if quantized:
        axes.plot(
            quantized, [chosen[i].activation_bits for i in quantized], "_", color=BLACK, markeredgewidth=1.6,
            markersize=9 if alone else 3, label="activation bits",
        )  # fmt: skip
    if not alone:
        starts = [block.start for block in runs]
        total = np.add.reduceat(weights, starts)
        mean = np.add.reduceat(bits * weights, starts) / np.where(total > 0, total, np.nan)
        edges = [block.start - 0.5 for block in runs] + [runs[-1].stop - 0.5]
        axes.stairs(mean, edges, color=BLACK, linewidth=1.4, baseline=None, label="mean of the block")
    axes.set_ylabel("weight bits")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(0, None)
