"""Rounding between the least and the greatest value, operation for operation as torchao does it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.core.formats import number_format
from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers.quantizer import Around
from mpsearch.quantizers.rounding import RoundToNearest


@dataclass(frozen=True)
class MinMax(Around):
    """The quantizer of torchao's `IntxWeightOnlyConfig`, and of inputs by its `Int8DynamicActivationIntxWeightConfig`.

    With it `evaluate` and `search` measure what torchao will run.

    Codes are -2^(b-1) .. 2^(b-1)-1. Asymmetric: s = (max - min) / (2^b - 1) with the range widened to contain 0, and
    z = -2^(b-1) - round(min / s); symmetric: s = 2 max|w| / (2^b - 1) and z = 0, so that the greatest weight is clipped.
    w' = s (clip(round(w (1/s)) + z) - z), in the dtype of the weight; s is at least its smallest normal number. Inputs are
    asymmetric, with a range for each token, taken on the spot.

    Attributes:
        symmetric: no zero-point for weights.

    >>> MinMax()(torch.tensor([[-1.0, 0.4, 2.0]]), Precision("2"))
    tensor([[-1.,  0.,  2.]])
    """

    symmetric: bool = False

    @property
    def quantizer(self) -> RoundToNearest:
        """What counts its bytes."""
        return RoundToNearest(symmetric=self.symmetric)

    @property
    def rounding(self) -> RoundToNearest:
        """The default one: torchao has no cache."""
        return RoundToNearest()

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """Bytes of packed codes, scales and zero-points; torchao itself keeps codes in int8, `TARGETS["torchao"]` counts that."""
        return RoundToNearest(symmetric=self.symmetric).stored_bytes(layer, precision)

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """The weight after quantization and back; (out, ...), same shape, dtype and device.

        Raises:
            EstimatorError: for a format that is no integer.
        """
        if not precision.quantizes_weight:
            return weight
        if number_format(precision.weight).family != "integer":
            raise EstimatorError(f"MinMax rounds to integers, got w{precision.weight}; take RoundToNearest for it")
        bits = precision.weight_bits
        least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        rows = weight.reshape(-1, precision.group_size or weight[0].numel())
        low, high = rows.amin(1, keepdim=True).clamp(max=0), rows.amax(1, keepdim=True).clamp(min=0)
        tiny = torch.finfo(weight.dtype).smallest_normal
        if self.symmetric:
            scale = (torch.maximum(-low, high) / (float(most - least) / 2)).clamp(min=tiny)
            zero = torch.zeros_like(scale)
        else:
            scale = ((high - low) / float(most - least)).clamp(min=tiny)
            zero = (least - (low / scale).round()).clamp(least, most)
        codes = ((rows * (1.0 / scale)).round() + zero).clamp(least, most)
        return ((codes - zero) * scale).reshape(weight.shape)

    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor:
        """An input after quantization and back; the calibrated range is not used; see `RoundToNearest.activation_values`."""
        return MinMax()(x.reshape(-1, x.shape[-1]), Precision(name)).reshape(x.shape) if x.numel() else x
