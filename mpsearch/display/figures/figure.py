"""What all pictures share: colours, an empty figure, axes with units, a legend that hides nothing, and the file."""

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mpsearch.core import amounts, printing
from mpsearch.core.precision import Precision
from mpsearch.core.table import Array
from mpsearch.errors import MpsearchError, nearest
from mpsearch.files.writing import write_atomically

#: Okabe and Ito's colours, told apart by the colour-blind too; their yellow is too pale for lines on white.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#777777"
COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "\\\\", "..", "xx", "++", "oo", "**")
#: Weight bits -> colour, so that a precision looks the same in every picture where it can.
_OF_BITS = {1: BLACK, 2: RED, 3: ORANGE, 4: GREEN, 5: SKY, 6: PINK, 8: BLUE, 16: BLACK}

ENDINGS = ("png", "svg", "pdf")
_LABELS = {
    "bitops": "BitOps (one sample)",
    "latency_s": "latency (one sample)",
    "energy_j": "energy (one sample)",
    "average_bits": "average weight bits",
    "effective_bits": "bits a weight, scales counted",
}
#: Damages below this share of the largest are drawn as if near zero, where a logarithmic axis has to hold zero too.
_NEAR_ZERO = 1e-6


class Picture(Figure):
    """A figure that a notebook shows by itself, without `%matplotlib inline` too."""

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=100)
        return data.getvalue()


def empty(width: float = 8.0, height: float = 5.0) -> Figure:
    """A figure of `width` x `height` inches, of no display and no global state."""
    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@dataclass(frozen=True)
class Style:
    """How one precision is drawn: `hatch` in bars, `marker` on lines."""

    colour: str
    marker: str
    hatch: str


def styles(precisions: Iterable[Precision]) -> dict[Precision, Style]:
    """A style for each precision: its own colour while there are enough, else one colour for all of the same weight bits.

    >>> from mpsearch.core.precision import precisions
    >>> [style.colour for style in styles(precisions("w4 w8 w4a8")).values()] == [GREEN, BLUE, RED]
    True
    """
    wanted = list(precisions)
    own = [_OF_BITS.get(precision.weight_bits, GREY) for precision in wanted]
    if len(wanted) > len(COLOURS):
        variants = [own[:number].count(colour) for number, colour in enumerate(own)]
        return {
            precision: Style(colour, MARKERS[variant % len(MARKERS)], HATCHES[variant % len(HATCHES)])
            for precision, colour, variant in zip(wanted, own, variants, strict=True)
        }
    chosen: dict[Precision, Style] = {}
    free = [colour for colour in COLOURS if colour not in own]
    for precision, colour, marker in zip(wanted, own, MARKERS[: len(wanted)], strict=True):
        taken = colour == GREY or any(style.colour == colour for style in chosen.values())
        chosen[precision] = Style(free.pop(0) if taken else colour, marker, "")
    return chosen


def kinds(precisions: Iterable[Precision]) -> list[Precision]:
    """The different precisions among these, from the least weight bits to the most."""
    return sorted(
        set(precisions), key=lambda precision: (precision.weight_bits, -precision.activation_bits, str(precision))
    )


def tidy(axes: Axes, title: str = "") -> None:
    """Light grid, no frame above and to the right, title at the left."""
    axes.grid(True, which="major", alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if title:
        axes.set_title(title, loc="left", fontsize=11)


def resource_axis(axis: Axis, resource: str, what: str = "") -> None:
    """Label and unit of a resource."""
    name = _LABELS.get(resource, amounts.label(resource))
    axis.set_label_text(f"{name}, {what}" if what else name)
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: amounts.tick(resource, value) if value >= 0 else ""))


def damage_axis(axis: Axis, values: Any, unit: str, origin: Mapping[str, Any], what: str = "damage") -> None:
    """Label and scale of a damage: logarithmic, with zero and negative values on it where there are some."""
    metric = origin.get("metric", "kl" if unit == "nats" else "own")
    metric = "own" if metric == "loss" and unit != "nats" else metric
    axis.set_label_text(f"{what}, {printing.DAMAGE[metric]}" if metric in printing.DAMAGE else f"{what} [{unit}]")
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    sizes = np.abs(finite[finite != 0])
    draw = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale  # type: ignore[attr-defined]
    if not len(sizes):
        return
    if (finite > 0).all():
        draw("log")
        return
    near = max(sizes.min(), _NEAR_ZERO * sizes.max())
    draw("symlog", linthresh=10 ** math.floor(math.log10(near)), linscale=0.5)


def whiskers(se: Array | None) -> Array | None:
    """Lengths of error bars: none where the standard error is not known."""
    return None if se is None else np.nan_to_num(se, nan=0.0)


def legend(figure: Figure, axes: Sequence[Axes], title: str = "") -> None:
    """One legend for all axes, below them, in as many columns as fit; the figure grows by its lines."""
    handles, labels = [], []
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    if not labels:
        return
    longest = max(len(label) for label in labels)
    columns = max(1, min(len(labels), int(figure.get_figwidth() / (0.5 + 0.075 * longest))))
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, title=title or None
    )


def check_ending(path: str | os.PathLike[str]) -> str:
    """The kind of picture that a file holds, by its ending.

    Raises:
        MpsearchError: for a kind that is not PNG, SVG or PDF.

    >>> check_ending("out/front.PNG")
    'png'
    """
    kind = Path(path).suffix.lower().lstrip(".")
    if kind not in ENDINGS:
        raise MpsearchError(f"{path}: a picture ends in .png, .svg or .pdf{nearest(kind, ENDINGS)}")
    return kind


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a picture, atomically.

    Args:
        figure: the picture.
        path: PNG, SVG or PDF by its ending.

    Raises:
        MpsearchError: for a kind of file that is not PNG, SVG or PDF.
        OSError: where the file cannot be written.
    """
    kind = check_ending(path)
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=150)
    write_atomically(Path(path), data.getvalue())


def written(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, saved where there is a path.

    Args:
        figure: the picture.
        path: as for `save`, or None.
    """
    if path is not None:
        save(figure, path)
    return figure
