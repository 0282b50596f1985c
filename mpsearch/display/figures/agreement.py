"""Pictures of how far tables agree: rank correlation of many, cell by cell of two."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.table import Array, CostTable
from mpsearch.display.figures.figure import damage_axis, empty, legend, styles, tidy, whiskers
from mpsearch.errors import TableError
from mpsearch.evaluation.comparing import agreement, plan_agreement

#: Brown to blue-green over white: told apart by the colour-blind too.
_COLOURS = "BrBG"


def agreement_figure(
    tables: Mapping[str, CostTable], measured: MeasuredPlans | None = None, *, title: str = ""
) -> Figure:
    """Rank correlation of every pair of tables: Spearman's above the diagonal, Kendall's tau-b below.

    With measured plans a column at the right says how well each table ranks them.

    Args:
        tables: name -> table; over the same layers and precisions.
        measured: 3 plans or more over the same layers.
        title: above the picture.

    Raises:
        TableError: for fewer than 2 tables, or tables of other layers or precisions.
        PlanError: where plans and tables do not fit.
    """
    if len(tables) < 2:
        raise TableError(f"{len(tables)} table{'s' * (len(tables) != 1)}, expected 2 or more to compare")
    names, parts = list(tables), list(tables.values())
    values = np.eye(len(parts))
    for i, a in enumerate(parts):
        for j in range(i):
            cells = agreement(parts[j], a)[0]
            values[j, i], values[i, j] = cells["spearman"], cells["kendall"]
    side = 1.5 + (0.62 if len(parts) <= 12 else 0.36) * len(parts) + 0.06 * max(map(len, names))
    figure = empty(max(5.0, side + (1.6 if measured else 0.6)), max(4.0, side))
    columns = 1 if measured is None else 2
    panels = figure.subplots(1, columns, width_ratios=[len(parts), 1][:columns], squeeze=False)[0].tolist()
    image = _draw_matrix(panels[0], values, names)
    panels[0].set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    panels[0].set_xlabel("cells: Spearman above the diagonal, Kendall below")
    if measured is not None:
        agreements = [plan_agreement(table, measured)[0] for table in parts]
        _draw_matrix(panels[1], np.array([[agreement["spearman"]] for agreement in agreements]), names)
        panels[1].set_xticks([])
        panels[1].set_yticks([])
        panels[1].set_xlabel(f"{len(measured)} measured\nplans: Spearman")
    if title:
        panels[0].set_title(title, loc="left", fontsize=11)
    figure.colorbar(image, ax=panels, label="rank correlation", shrink=0.8, aspect=30)
    return figure


def _draw_matrix(axes: Axes, values: Array, names: Sequence[str]) -> AxesImage:
    image = axes.imshow(values, cmap=_COLOURS, vmin=-1, vmax=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    size = 8 if len(names) <= 12 else 6.5
    for (i, j), value in np.ndenumerate(values):
        text = f"{value:.2f}".replace("-0", "-").removeprefix("0") if abs(value) < 0.995 else f"{value:.0f}"
        axes.text(j, i, "?" if np.isnan(value) else text, ha="center", va="center", fontsize=size,
                  color="white" if abs(value) > 0.55 else "black")  # fmt: skip
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def cells_figure(
    a: CostTable, b: CostTable, names: tuple[str, str] = ("first table", "second table"), *, title: str = ""
) -> Figure:
    """Every cell of two tables, one over the other, coloured by precision; rank correlation in the title.

    Args:
        a: across.
        b: up; over the same layers and precisions.
        names: of the two.
        title: in front of the correlation.

    Raises:
        TableError: where layers or precisions differ.
    """
    cells = agreement(a, b)[0]
    columns = [b.precisions.index(precision) for precision in a.precisions]
    other = b.sensitivity[:, columns]
    figure = empty(7.0, 6.0)
    axes = figure.add_subplot()
    for column, (precision, style) in enumerate(styles(a.precisions).items()):
        se_a = None if a.sensitivity_se is None else whiskers(a.sensitivity_se[:, column])
        se_b = None if b.sensitivity_se is None else whiskers(b.sensitivity_se[:, columns[column]])
        axes.errorbar(
            a.sensitivity[:, column], other[:, column], xerr=se_a, yerr=se_b, fmt=style.marker, color=style.colour, markersize=4.5,
            elinewidth=0.6, alpha=0.8, label=str(precision),
        )  # fmt: skip
    damage_axis(axes.xaxis, a.sensitivity, a.unit, a.origin, f"{names[0]}: damage")
    damage_axis(axes.yaxis, other, b.unit, b.origin, f"{names[1]}: damage")
    said = f"Spearman {cells['spearman']:.2f}, Kendall {cells['kendall']:.2f} over {cells['count']} cells"
    tidy(axes, f"{title}: {said}" if title else said)
    legend(figure, [axes], "layers at")
    return figure
