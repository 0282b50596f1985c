"""Options that a layer may not have, or that its target cannot carry out: not allowed in the table, left as they are in the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.errors import TableError
from mpsearch.export.targets import TARGETS
from mpsearch.layer import Layer
from mpsearch.precision import Precision
from mpsearch.quantize import stored_bytes


def refused_options(layers: Sequence[Layer], options: Sequence[Precision]) -> NDArray[np.bool_]:
    """(L, P) True where a precision is none of `Layer.allowed`, or `Layer.target` cannot give it, of a layer or one of its group.

    Raises:
        TableError: where a decision has no option left, with the reasons.

    >>> from mpsearch import precisions
    >>> refused_options([Layer("fc", "linear", (8, 64), target="onnxruntime")], precisions("w3g32 w4g32 w16"))
    array([[ True, False, False]])
    """
    reasons = [[_reason(layer, option) for option in options] for layer in layers]
    refused = np.array([[reason is not None for reason in row] for row in reasons], bool)
    rows: dict[str, list[int]] = {}
    for row, layer in enumerate(layers):
        rows.setdefault(layer.group or f"{layer.name} alone", []).append(row)
    for members in rows.values():
        refused[members] = refused[members].any(axis=0)
        if refused[members[0]].all():
            why = list(dict.fromkeys(reason for row in members for reason in reasons[row] if reason))
            reason = "; ".join(why[:3])
            raise TableError(
                f"{reason}; of {', '.join(map(str, options))} nothing is left for {layers[members[0]].name!r}"
                + (f" and its group {layers[members[0]].group!r}" if len(members) > 1 else "")
                + ": add an option that all of them can have, such as w16, or exclude the layer"
            )
    return refused


def _reason(layer: Layer, option: Precision) -> str | None:
    """Why a layer cannot have an option; None where it can."""
    if layer.allowed and option not in layer.allowed:
        return f"{layer.name!r} may be {' or '.join(map(str, layer.allowed))} alone"
    return TARGETS[layer.target].refusal(layer, option) if layer.target else None


@dataclass(frozen=True)
class OnlyAllowed:
    """A quantizer that leaves a weight as it is where the target refuses the precision, so that nothing is spent on it.

    Attributes:
        quantizer: for all else.
        refused: layer -> precisions.
    """

    quantizer: Any
    refused: Mapping[str, frozenset[Precision]]

    def of_layer(self, name: str) -> Callable[[Tensor, Precision], Tensor]:
        """The quantizer of one layer."""
        of_layer = getattr(self.quantizer, "of_layer", None)
        inner = self.quantizer if of_layer is None else of_layer(name)
        return _OfLayer(inner, self.refused.get(name, frozenset()))

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """As the quantizer within."""
        return stored_bytes(self.quantizer, layer, precision)

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """As the quantizer within."""
        found: Tensor = self.quantizer(weight, precision)
        return found


@dataclass(frozen=True)
class _OfLayer:
    quantizer: Any
    refused: frozenset[Precision]

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        found: Tensor = weight if precision in self.refused else self.quantizer(weight, precision)
        return found


def only_allowed(
    quantizer: Any, layers: Sequence[Layer], options: Sequence[Precision], refused: NDArray[np.bool_]
) -> Any:
    """The quantizer, kept from what is refused; itself where nothing is."""
    if not refused.any():
        return quantizer
    columns = [np.flatnonzero(row) for row in refused]
    return OnlyAllowed(
        quantizer,
        {
            layer.name: frozenset(options[int(p)] for p in row)
            for layer, row in zip(layers, columns, strict=True)
            if len(row)
        },
    )
