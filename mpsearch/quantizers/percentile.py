"""Clipping at a percentile before rounding."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers.quantizer import Around
from mpsearch.quantizers.rounding import RoundToNearest


@dataclass(frozen=True)
class PercentileClip(Around):
    """Clip each output channel at a percentile of its absolute values, then quantize: the few outliers no longer stretch the scale.

    Attributes:
        percentile: of |w| over a channel, above 0 and up to 100; 100 clips nothing.
        quantizer: rounds what is left; with its largest value as the range, since a search would clip by itself.

    The channel's third of four sizes, 3, is its 75th percentile:

    >>> import torch
    >>> from mpsearch import Precision
    >>> PercentileClip(75)(torch.tensor([[-1.0, 2.0, 3.0, 100.0]]), Precision("3"))
    tensor([[-1.,  2.,  3.,  3.]])
    """

    percentile: float = 99.9
    quantizer: RoundToNearest = field(default=RoundToNearest(scale="max"))

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise EstimatorError(f"percentile={self.percentile}: expected a number above 0 and up to 100")

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """The weight after clipping, quantization and back; see `RoundToNearest`."""
        if not precision.quantizes_weight:
            return weight
        rows = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight.reshape(1, -1)
        place = max(1, math.ceil(self.percentile / 100 * rows.shape[1]))
        limit = rows.abs().kthvalue(place, dim=1, keepdim=True).values
        return self.quantizer(rows.clamp(-limit, limit).reshape(weight.shape), precision)
