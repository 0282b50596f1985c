"""Options that a layer may not have, is too small for, or that its target cannot carry out: not allowed, left as they are in the model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.core.printing import without_option
from mpsearch.errors import TableError, warn
from mpsearch.quantizers.packing import Codes, row_misfit
from mpsearch.quantizers.quantizer import Around, Quantizer
from mpsearch.targets.rules import TARGETS


def refused_options(layers: Sequence[Layer], options: Sequence[Precision]) -> NDArray[np.bool_]:
    """(L, P) True where a layer, or one of its group, cannot have a precision: `Layer.allowed`, its target, or its rows are against it.

    >>> from mpsearch import precisions
    >>> refused_options([Layer("fc", "linear", (8, 64), target="onnxruntime")], precisions("w3g32 w4g32 w16"))
    array([[ True, False, False]])
    >>> refused_options([Layer("fc", "linear", (8, 64))], precisions("wq4_k wq8_0"))
    array([[ True, False]])
    """
    refused = np.array([[_reason(layer, option) is not None for option in options] for layer in layers], bool)
    for members in _groups(layers):
        refused[members] = refused[members].any(axis=0)
    return refused


def decidable(layers: Sequence[Layer], options: Sequence[Precision]) -> tuple[list[Layer], dict[str, str]]:
    """The layers that have an option, and why the others have none: those are left alone, and a warning names them.

    Raises:
        TableError: where no layer is left, or each layer of a group has options, but they have none in common.

    >>> from mpsearch import precisions
    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     left, reasons = decidable([Layer("gate", "linear", (4, 4)), Layer("fc", "linear", (4, 256))], precisions("wq4_k"))
    >>> [layer.name for layer in left], reasons
    (['fc'], {'gate': 'q4_k packs rows in multiples of 256 weights, the weight has 4'})
    """
    alone = np.array([[_reason(layer, option) is None for option in options] for layer in layers], bool)
    reasons: dict[str, str] = {}
    for members in _groups(layers):
        if alone[members].all(axis=0).any():
            continue
        told = dict.fromkeys(_reason(layers[row], option) or "" for row in members for option in options)
        reason = "; ".join(list(filter(None, told))[:3])
        if len(members) > 1 and alone[members].any(axis=1).all():
            raise TableError(
                f"{reason}; of {', '.join(map(str, options))} nothing is left for {layers[members[0]].name!r} and its group "
                f"{layers[members[0]].group!r}: add an option that all of them can have, such as w16, or exclude them"
            )
        reasons.update((layers[row].name, reason) for row in members)
    if len(reasons) == len(layers):
        name, reason = next(iter(reasons.items()))
        raise TableError(
            f"{reason}; of {', '.join(map(str, options))} nothing is left for {name!r}, nor for any other layer: add an option that "
            "fits, such as w16"
        )
    if reasons:
        warn(without_option(reasons))
    return [layer for layer in layers if layer.name not in reasons], reasons


def _reason(layer: Layer, option: Precision) -> str | None:
    """Why a layer cannot have an option; None where it can."""
    if layer.allowed and option not in layer.allowed:
        return f"{layer.name!r} may be {' or '.join(map(str, layer.allowed))} alone"
    return TARGETS[layer.target].refusal(layer, option) if layer.target else row_misfit(layer, option)


def _groups(layers: Sequence[Layer]) -> list[list[int]]:
    """Rows of the layers that share a precision."""
    rows: dict[tuple[str, str], list[int]] = {}
    for row, layer in enumerate(layers):
        rows.setdefault(layer.decision, []).append(row)
    return list(rows.values())


@dataclass(frozen=True)
class OnlyAllowed(Around):
    """A quantizer that leaves a weight as it is where a precision is refused, so that nothing is spent on it.

    Attributes:
        quantizer: for all else.
        refused: layer -> precisions.
    """

    quantizer: Quantizer
    refused: Mapping[str, frozenset[Precision]]

    def of_layer(self, name: str) -> Quantizer:
        """The quantizer of one layer."""
        return _OfLayer(self.quantizer.of_layer(name), self.refused.get(name, frozenset()))


@dataclass(frozen=True)
class _OfLayer(Around):
    quantizer: Quantizer
    refused: frozenset[Precision]

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        return weight if precision in self.refused else self.quantizer(weight, precision)

    def encoded(self, weight: Tensor, precision: Precision) -> Codes | None:
        return None if precision in self.refused else self.quantizer.encoded(weight, precision)


def leaves_alone(quantizer: Quantizer, name: str, precision: Precision) -> bool:
    """True where a quantizer leaves the weight of a layer as it is, since the precision is refused or `w16`."""
    refused = quantizer.refused.get(name, frozenset()) if isinstance(quantizer, OnlyAllowed) else frozenset()
    return not precision.quantizes_weight or precision in refused


def only_allowed(
    quantizer: Quantizer, layers: Sequence[Layer], options: Sequence[Precision], refused: NDArray[np.bool_]
) -> Quantizer:
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
