"""The axis of layers: names where they fit, blocks of the names where they do not."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from mpsearch.core import printing
from mpsearch.display.blocks import Block


def width(ticks: int) -> float:
    """Inches that so many labels need beside each other."""
    return min(14.0, max(7.0, 2.5 + 0.27 * ticks))


def label_height(runs: Sequence[Block]) -> float:
    """Inches that the labels need below the axis."""
    return 0.07 * max(len(_label(block)) for block in runs)


def _label(block: Block) -> str:
    return printing.short(block.label, 36)


def layer_axis(axes: Axes, runs: Sequence[Block], *, labels: bool = True) -> None:
    """Ticks of the blocks, every other one shaded where they hold several layers.

    Args:
        axes: whose horizontal axis is the number of the layer.
        runs: the blocks.
        labels: write the names; False for an axis that shares those of another.
    """
    axes.set_xlim(-0.7, runs[-1].stop - 0.3)
    axes.set_xticks([block.middle for block in runs])
    if labels:
        axes.set_xticklabels([_label(block) for block in runs], rotation=90, fontsize=8)
        several = runs[-1].stop > len(runs)
        axes.set_xlabel(f"{runs[-1].stop} layers, by block" if several else "layer")
    else:
        axes.tick_params(axis="x", labelbottom=False)
    if runs[-1].stop > len(runs):
        for block in runs[1::2]:
            axes.axvspan(block.start - 0.5, block.stop - 0.5, color="black", alpha=0.05, linewidth=0, zorder=0)
        axes.grid(False, axis="x")
