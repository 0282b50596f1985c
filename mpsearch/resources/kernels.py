"""What a kernel is: one layer at one precision, ready to run."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

#: One run of a layer.
Kernel = Callable[[], Any]


class NoKernel(Exception):
    """Nothing installed runs the layer at the precision; says why."""


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a layer, or None."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def unsigned_range(low: float, high: float) -> tuple[float, int]:
    """Scale and zero-point of unsigned 8 bits."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)
