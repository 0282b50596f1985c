"""Bytes of the stored model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mpsearch.errors import EstimatorError
from mpsearch.layer import Layer
from mpsearch.modules import canonical, storage_of, weight_of
from mpsearch.precision import Precision
from mpsearch.quantize import RoundToNearest, packed_bytes
from mpsearch.resources.resource import Resource


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes of the packed weights, scales and zero-points, and of everything that is left alone.

    Codes are packed without gaps and padded to whole bytes a layer; a scale has the dtype of the unquantized weight, a zero-point the bits
    of a code. A block of MX, NVFP4 and block floating point has a scale of one byte, NVFP4 a float32 more a tensor; the types of GGUF
    have their scales inside. What is not decided (biases, norms, excluded layers, buffers) counts at its stored dtype under `fixed`; a
    weight that several layers share counts once, in the first of them. Equal to the byte to `quantize.Codes.pack`. Keys and values are not
    stored with the model: `KVCacheBytes` counts them, and `Total` the sum.

    Attributes:
        quantizer: tells symmetric or not, and the granularity of the scales.

    A layer of 8 x 4 weights at w4: 16 bytes of codes, 8 scales of 4 bytes; its bias takes 32 bytes whatever the plan.

    >>> from mpsearch import precisions
    >>> model = nn.Sequential(nn.Linear(4, 8))
    >>> found = MemoryBytes()(model, [Layer("0", "linear", (8, 4))], precisions("w4 w16"))
    >>> found.usage.tolist(), found.fixed, found.reference
    ([[48.0, 128.0]], 32.0, 160.0)
    """

    quantizer: Any = RoundToNearest()  # noqa: RUF009 frozen

    def __call__(self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision]) -> Resource:
        """Count; see `Resource`.

        Raises:
            EstimatorError: where a format cannot hold the rows of a layer.
        """
        usage = np.zeros((len(layers), len(precisions)))
        seen: set[tuple[torch.device, int, int]] = set()
        for row, layer in enumerate(layers):
            if layer.is_cache:
                continue
            module = model.get_submodule(layer.name)
            weight = canonical(module)
            if storage_of(weight_of(module)) in seen:
                continue
            seen.add(storage_of(weight_of(module)))
            outputs = weight.shape[0] if weight.ndim > 1 else 1
            for column, precision in enumerate(precisions):
                try:
                    usage[row, column] = packed_bytes(
                        weight.numel(), outputs, weight.element_size(), precision, self.quantizer
                    )
                except EstimatorError as error:
                    if layer.target:  # whose rules say so
                        usage[row, column] = np.nan
                        continue
                    raise EstimatorError(f"memory_bytes of layer {layer.name!r} at {precision}: {error}") from None
        everything = {
            storage_of(tensor): tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.numel()
        }
        size = {place: tensor.numel() * tensor.element_size() for place, tensor in everything.items()}
        reference = sum(size.values())
        decided = sum(size[place] for place in seen)
        return Resource(usage, float(reference - decided), float(reference))
