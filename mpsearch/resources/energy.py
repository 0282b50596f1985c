"""Energy of arithmetic and memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from mpsearch.core.formats import Number
from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.models.running import Batch, samples
from mpsearch.quantizers.packing import ScaleLayout
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources.arithmetic import number
from mpsearch.resources.calls import bytes_moved, calls_of
from mpsearch.resources.resource import Resource, ResourceCapabilities


@dataclass(frozen=True)
class OperationEnergy:
    """Joules of an operation, at two widths each; between and beyond them a power law of the product of the operands' bits.

    The defaults are those of 45 nm at 0.9 V (Horowitz, "Computing's energy problem", ISSCC 2014, figure 1.1.9).

    Attributes:
        int8_multiply: 8 x 8 bits.
        int32_multiply: 32 x 32 bits.
        int32_add: the accumulator of integers.
        fp16_multiply: significands of 11 x 11 bits.
        fp32_multiply: 24 x 24 bits.
        fp32_add: the accumulator of floating point.
        memory_byte: a byte from or to DRAM: 1.3 nJ for 64 bits, the lower of the two numbers given.

    >>> round(OperationEnergy().mac(number("8", ""), number("8", "")) * 1e12, 3)   # pJ: 0.2 + 0.1
    0.3
    >>> round(OperationEnergy().mac(number("16", "float32"), number("16", "float32")) * 1e12, 3)   # 3.7 + 0.9
    4.6
    """

    int8_multiply: float = 0.2e-12
    int32_multiply: float = 3.1e-12
    int32_add: float = 0.1e-12
    fp16_multiply: float = 1.1e-12
    fp32_multiply: float = 3.7e-12
    fp32_add: float = 0.9e-12
    memory_byte: float = 1.3e-9 / 8

    def mac(self, weight: Number, activation: Number) -> float:
        """Joules of one multiply-accumulate; a weight and an input of different kinds meet in the wider floating-point format.

        Args:
            weight: format of the weight.
            activation: format of the input.
        """
        if weight.bits and activation.bits:
            product = weight.bits * activation.bits
            return _power_law(product, (64, self.int8_multiply), (1024, self.int32_multiply)) + self.int32_add
        significand = max(weight.significand, activation.significand)
        product = significand * significand
        return _power_law(product, (121, self.fp16_multiply), (576, self.fp32_multiply)) + self.fp32_add


def _power_law(x: float, low: tuple[float, float], high: tuple[float, float]) -> float:
    slope = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
    return float(low[1] * (x / low[0]) ** slope)


@dataclass(frozen=True)
class Energy:
    """Joules for one sample: MACs x energy of a multiply-accumulate + bytes moved x energy of a byte (Horowitz, ISSCC 2014).

    Weights are read once a call, inputs once, outputs written once, keys and values written and read once, all in memory outside the
    chip. Numbers tell layers and formats apart; a device of today needs less. What no decision touches is not counted.

    Attributes:
        operations: joules of single operations.
        quantizer: tells the bytes of scales and zero-points.

    2 x 2 weights, one row: 4 MACs of 4.6 pJ, 16 + 8 + 8 bytes of 162.5 pJ.

    >>> import torch
    >>> from mpsearch import layers, precisions
    >>> model, row = nn.Sequential(nn.Linear(2, 2, bias=False)), torch.ones(1, 2)
    >>> resource = Energy()(model, layers(model, row), precisions("w16"), example=row)
    >>> round(float(resource.usage[0, 0]) * 1e12, 3)
    5218.4
    """

    capabilities: ClassVar[ResourceCapabilities] = ResourceCapabilities(
        unit="J", column="energy_j", example=True, quantizer=True, on_meta=True, reference="plan"
    )

    operations: OperationEnergy = OperationEnergy()
    quantizer: ScaleLayout = RoundToNearest()  # noqa: RUF009 frozen

    def __call__(
        self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision], *, example: Batch
    ) -> Resource:
        """Estimate; see `Resource`. `reference` is the unquantized model."""
        calls = calls_of(model, [layer.name for layer in layers], example)
        count = samples(example)
        columns = [*precisions, Precision("16")]
        joules = np.zeros((len(layers), len(columns)))
        for row, layer in enumerate(layers):
            for column, precision in enumerate(columns):
                moved = sum(bytes_moved(layer, sizes, precision, self.quantizer) for sizes in calls[layer.name]) / count
                facing = "16" if layer.is_cache else precision.activation
                mac = self.operations.mac(number(precision.weight, layer.dtype), number(facing, layer.dtype))
                joules[row, column] = layer.macs * mac + moved * self.operations.memory_byte
        return Resource(joules[:, :-1], 0.0, float(joules[:, -1].sum()))
