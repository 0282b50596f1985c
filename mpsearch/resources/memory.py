"""Bytes of the stored model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.decisions.model_bytes import every_tensor, holders, left_alone_bytes
from mpsearch.errors import EstimatorError, warn
from mpsearch.quantizers.packing import row_misfit
from mpsearch.quantizers.quantizer import checked_quantizer, stored_bytes
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources.resource import Resource, ResourceCapabilities
from mpsearch.targets.rules import TARGETS
from mpsearch.targets.storage import PACKED, Storage


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes of the packed weights, scales and zero-points, and of everything that is left alone, as the target stores them.

    Where the layers name a target, the bytes are those of its files and objects (`export.TARGETS[...].storage`): wider codes, padding,
    codes of its own for each layer that shares a weight, norms of another dtype. Without one, codes are packed without gaps and padded to
    whole bytes a layer; a scale has the dtype of the unquantized weight, a zero-point the bits of a code. A block of MX, NVFP4 and block
    floating point has a scale of one byte, NVFP4 a float32 more a tensor; the types of GGUF have their scales inside. That is equal to the
    byte to `quantizers.packing.Codes.pack`; a quantizer of one's own that stores more has a method `stored_bytes(layer, precision)`.

    What is not decided (biases, norms, excluded layers, buffers) counts at its stored dtype under `fixed`; a weight that several layers
    share counts once, in the first of them. Keys and values are not stored with the model: `KVCacheBytes` counts them, and `Total` the sum.

    Attributes:
        quantizer: tells symmetric or not, and the granularity of the scales, or its bytes.

    A layer of 8 x 4 weights at w4: 16 bytes of codes, 8 scales of 4 bytes; its bias takes 32 bytes whatever the plan. torchao keeps the
    codes in 32 bytes, and 8 zero-points.

    >>> from mpsearch import precisions
    >>> model = nn.Sequential(nn.Linear(4, 8))
    >>> resource = MemoryBytes()(model, [Layer("0", "linear", (8, 4))], precisions("w4 w16"))
    >>> resource.usage.tolist(), resource.fixed, resource.reference
    ([[48.0, 128.0]], 32.0, 160.0)
    >>> MemoryBytes()(model, [Layer("0", "linear", (8, 4), target="torchao")], precisions("w4 w16")).usage.tolist()
    [[72.0, 128.0]]
    """

    capabilities: ClassVar[ResourceCapabilities] = ResourceCapabilities(
        unit="bytes", column="memory_bytes", quantizer=True, monotone=True, on_meta=True, reference="stored bytes"
    )

    quantizer: Any = RoundToNearest()  # noqa: RUF009 frozen

    def __call__(self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision]) -> Resource:
        """Count; see `Resource`.

        Raises:
            EstimatorError: where a format cannot hold the rows of a layer.
        """
        usage = np.zeros((len(layers), len(precisions)))
        storage = next((TARGETS[layer.target].storage for layer in layers if layer.target), None)
        quantizer = checked_quantizer(self.quantizer)
        if storage is None and quantizer.bytes_from == "assumed":
            warn(f"memory_bytes are those of RoundToNearest: {quantizer.name} has no stored_bytes(layer, precision)")
        rows = {layer.name: row for row, layer in enumerate(layers)}
        holding = holders(model, layers)
        for holder in holding:
            for column, precision in enumerate(precisions):
                if holder.counts(precision, storage):
                    usage[rows[holder.layer.name], column] = self._bytes(holder.layer, precision)
        reference = sum(tensor.numel() * tensor.element_size() for tensor in every_tensor(model).values())
        left_alone = left_alone_bytes(model, {holder.place for holder in holding}, storage)
        return Resource(usage, float(left_alone), float(reference), self._counted(layers, storage))

    def _counted(self, layers: Sequence[Layer], storage: Storage | None) -> str:
        if storage is not None:
            return f"as {next(layer.target for layer in layers if layer.target)} stores it: {storage.text}"
        quantizer = checked_quantizer(self.quantizer)
        if quantizer.bytes_from == "told":
            return f"as {quantizer.name} tells; with target=... (--target) as that tool stores it"
        return f"{PACKED.text}; with target=... (--target) as that tool stores it"

    def _bytes(self, layer: Layer, precision: Precision) -> float:
        if row_misfit(layer, precision) is not None:
            return np.nan
        quantizer = checked_quantizer(self.quantizer)
        try:
            if layer.target:
                return TARGETS[layer.target].stored_bytes(layer, precision, symmetric=quantizer.symmetric)
            return stored_bytes(quantizer, layer, precision)
        except EstimatorError as error:
            if layer.target or precision not in (layer.allowed or (precision,)):  # it may not have it anyway
                return np.nan
            raise EstimatorError(f"memory_bytes of layer {layer.name!r} at {precision}: {error}") from None
