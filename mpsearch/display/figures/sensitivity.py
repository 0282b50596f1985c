"""Picture of a table: the damage of every layer at every precision."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpsearch.core.layer import Layer
from mpsearch.core.table import Array, CostTable
from mpsearch.display.blocks import Block, blocks
from mpsearch.display.figures.depth import label_height, layer_axis, width
from mpsearch.display.figures.figure import GREY, damage_axis, empty, legend, styles, tidy, whiskers

#: Of the name of a group, that have room over a layer.
_LETTERS = 5


def sensitivity_figure(table: CostTable, *, title: str = "") -> Figure:
    """Damage of every layer at every precision, error bars of one standard error, groups bracketed.

    Up to 40 layers are named one by one. Of more, each cell is a dot and each block of the layers' names a marker at the mean of
    its cells. A cell that is not allowed is left out.

    Args:
        table: what is drawn.
        title: above the picture.
    """
    names = [layer.name for layer in table.layers]
    runs = blocks(names)
    alone = len(runs) == len(names)
    brackets = _brackets(table.layers) if alone else []
    lanes = max((lane for _, _, lane in brackets), default=-1) + 1
    figure = empty(width(len(runs)), 4.4 + label_height(runs) + 0.3 * lanes)
    if lanes:
        above, axes = figure.subplots(2, height_ratios=[0.3 * lanes, 5], sharex=True)
        _draw_brackets(above, brackets)
        above.set_title(title, loc="left", fontsize=11)
    else:
        axes = figure.subplots()
    tidy(axes, "" if lanes else title)
    for column, (precision, style) in enumerate(styles(table.precisions).items()):
        values = table.sensitivity[:, column]
        se = None if table.sensitivity_se is None else table.sensitivity_se[:, column]
        places = np.arange(len(names), dtype=np.float64)
        if not alone:
            axes.plot(
                places, values, ".", color=style.colour, markersize=4, alpha=0.5, markeredgewidth=0, rasterized=True
            )
            places, values, se = _means(runs, values, se)
        axes.errorbar(
            places, values, yerr=whiskers(se), fmt=f"{style.marker}-", color=style.colour, markersize=5, linewidth=0.8, capsize=2.5,
            elinewidth=1, label=str(precision),
        )  # fmt: skip
    damage_axis(axes.yaxis, table.sensitivity, table.unit, table.origin)
    layer_axis(axes, runs)
    groups = len({layer.group for layer in table.layers if layer.group})
    if brackets:
        axes.set_xlabel("layer; those in brackets share a precision")
    elif groups and not alone:
        axes.set_xlabel(f"{axes.get_xlabel()}; {groups} groups share a precision")
    legend(figure, [axes], "every layer at" if alone else "mean of each block at")
    return figure


def _means(runs: Sequence[Block], values: Array, se: Array | None) -> tuple[Array, Array, Array | None]:
    """Middle, mean and standard error of the mean of each block, over its allowed cells."""
    known = ~np.isnan(values)
    starts = [block.start for block in runs]
    count = np.add.reduceat(known, starts, dtype=np.float64)
    count[count == 0] = np.nan
    mean = np.add.reduceat(np.where(known, values, 0.0), starts) / count
    if se is not None:
        se = np.sqrt(np.add.reduceat(np.where(known, np.nan_to_num(se), 0.0) ** 2, starts)) / count
    return np.array([block.middle for block in runs]), mean, se


def _brackets(layers: Sequence[Layer]) -> list[tuple[str, list[int], int]]:
    """Name, members and lane of each group of several layers; groups that overlap lie in different lanes."""
    members: dict[str, list[int]] = {}
    for number, layer in enumerate(layers):
        if layer.group:
            members.setdefault(layer.group, []).append(number)
    brackets: list[tuple[str, list[int], int]] = []
    ends: list[int] = []  # of each lane
    for name, places in members.items():
        if len(places) > 1:
            lane = next((lane for lane, end in enumerate(ends) if end < places[0]), len(ends))
            ends[lane : lane + 1] = [places[-1]]
            brackets.append((name, places, lane))
    return brackets


def _draw_brackets(axes: Axes, brackets: Sequence[tuple[str, list[int], int]]) -> None:
    for name, places, lane in brackets:
        axes.plot([places[0], places[-1]], [lane, lane], "-", color=GREY, linewidth=1.2)
        axes.plot(places, [lane] * len(places), "|", color=GREY, markersize=7)
        if len(name) <= _LETTERS * (places[-1] - places[0] + 1):  # the members are named below the axis anyway
            middle = ((places[0] + places[-1]) / 2, lane)
            axes.annotate(
                name, middle, xytext=(0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=7, color=GREY
            )  # fmt: skip
    axes.set_ylim(-0.5, max(lane for _, _, lane in brackets) + 0.9)
    axes.axis("off")
