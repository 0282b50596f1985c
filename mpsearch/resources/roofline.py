"""Latency from the peak numbers of a device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import TableError, nearest
from mpsearch.models.running import Batch, samples
from mpsearch.quantizers.packing import ScaleLayout
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources.arithmetic import number
from mpsearch.resources.calls import CallSizes, bytes_moved, calls_of
from mpsearch.resources.devices import DEVICES, Device
from mpsearch.resources.resource import Resource, ResourceCapabilities


@dataclass(frozen=True)
class Roofline:
    """Seconds for one sample: of each call the longer of arithmetic and memory, plus an overhead (Williams et al., 2009).

    t = max(MACs / rate(weight format, activation format), bytes / bandwidth) + overhead. Bytes are the packed weight, read once a call (of
    an embedding the rows looked up), and input and output, in the batch of the example; of a cache of keys or values, what is written and
    read. The weight is widened to the format of the
    input, or both to one that the device multiplies; what is left alone (`16`) has the dtype in which it is stored: cast a model to
    bfloat16 to see half precision. A pair that nothing on the device holds is nan: not allowed.

    A lower bound, and not monotone in bits: H100 has no int4 units, and a small layer is all overhead. What no decision
    touches (norms, attention products) is not counted.

    Attributes:
        device: a name among `DEVICES`, or a device of one's own.
        quantizer: tells the bytes of scales and zero-points.

    Raises:
        TableError: for an unknown device.

    64 x 64 weights and one row of 64 inputs on a device of 1 MAC and 1000 bytes a second:

    >>> import torch
    >>> from mpsearch import layers, precisions
    >>> from mpsearch.resources.devices import Processor
    >>> model, row = nn.Sequential(nn.Linear(64, 64, bias=False)), torch.ones(1, 64)
    >>> slow = Processor({"fp32": 2.0}, bytes_per_s=1000.0, overhead_s=0.5, source="by hand")
    >>> Roofline(slow)(model, layers(model, row), precisions("w16"), example=row).usage   # 4096 MACs; 16896 bytes
    array([[4096.5]])
    """

    capabilities: ClassVar[ResourceCapabilities] = ResourceCapabilities(
        unit="s", example=True, on_meta=True, reference="plan"
    )

    device: str | Device = "a100"
    quantizer: ScaleLayout = RoundToNearest()  # noqa: RUF009 frozen

    def __post_init__(self) -> None:
        if isinstance(self.device, str) and self.device not in DEVICES:
            raise TableError(f"unknown device profile {self.device!r}{nearest(self.device, DEVICES)}")

    def __call__(
        self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision], *, example: Batch
    ) -> Resource:
        """Estimate; see `Resource`. `reference` is the unquantized model."""
        device = DEVICES[self.device] if isinstance(self.device, str) else self.device
        calls = calls_of(model, [layer.name for layer in layers], example)
        count = samples(example)
        columns = [*precisions, Precision("16")]
        seconds = np.array(
            [
                [self._layer(layer, calls[layer.name], precision, device, count) for precision in columns]
                for layer in layers
            ]
        )
        return Resource(seconds[:, :-1], 0.0, float(seconds[:, -1].sum()))

    def _layer(self, layer: Layer, calls: list[CallSizes], precision: Precision, device: Device, count: int) -> float:
        """Seconds for one sample."""
        facing = "16" if layer.is_cache else precision.activation
        weight, facing_number = number(precision.weight, layer.dtype), number(facing, layer.dtype)
        rate = device.macs_per_s(weight, facing_number) if layer.macs else math.inf  # an embedding multiplies nothing
        if math.isnan(rate) or not calls:
            return rate if calls else 0.0
        macs = layer.macs * count / len(calls)
        total = 0.0
        for sizes in calls:
            moved = bytes_moved(layer, sizes, precision, self.quantizer)
            total += float(np.maximum(macs / rate, moved / device.bytes_per_s)) + device.overhead_s  # nan stays nan
        return total / count
