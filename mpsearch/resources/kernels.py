"""What a kernel is: one layer at one precision, ready to run."""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import MissingPackage

#: One run of a layer.
Kernel = Callable[[], Any]


class NoKernel(Exception):
    """Nothing installed runs the layer at the precision; says why."""


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a layer, or None."""
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, Tensor) else None


def package(name: str, engine: str) -> Any:
    """A module of an optional package.

    Raises:
        MissingPackage: where it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(
            f"latency_s with engine {engine!r} needs {name} ({error}); pip install 'mpsearch[{engine}]' brings it"
        ) from None


def unsigned_range(low: float, high: float) -> tuple[float, int]:
    """Scale and zero-point of unsigned 8 bits."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)
