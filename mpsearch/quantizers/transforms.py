"""Quantizers around a quantizer: what some methods do to a weight before and after rounding, without data."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers.rounding import RoundToNearest


@dataclass(frozen=True)
class PercentileClip:
    """Clip each output channel at a percentile of its absolute values, then quantize: the few outliers no longer stretch the scale.

    Attributes:
        percentile: of |w| over a channel, above 0 and up to 100; 100 clips nothing.
        quantizer: rounds what is left; with its largest value as the range, since a search would clip by itself.

    The channel's third of four sizes, 3, is its 75th percentile:

    >>> PercentileClip(75)(torch.tensor([[-1.0, 2.0, 3.0, 100.0]]), Precision("3"))
    tensor([[-1.,  2.,  3.,  3.]])
    """

    percentile: float = 99.9
    quantizer: RoundToNearest = field(default=RoundToNearest(scale="max"))

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise EstimatorError(f"percentile={self.percentile}: expected a number above 0 and up to 100")

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """As of `quantizer`."""
        return self.quantizer.stored_bytes(layer, precision)

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """The weight after clipping, quantization and back; see `RoundToNearest`."""
        rows = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight.reshape(1, -1)
        place = max(1, math.ceil(self.percentile / 100 * rows.shape[1]))
        limit = rows.abs().kthvalue(place, dim=1, keepdim=True).values
        return self.quantizer(rows.clamp(-limit, limit).reshape(weight.shape), precision)


@dataclass(frozen=True)
class HadamardRotation:
    """Rotate the input channels by a randomized Hadamard matrix, quantize, and rotate back (QuaRot, 2404.00456; QuIP#, 2402.04396).

    w' = Q(w R) R^T with R = D H / sqrt(b) on blocks of b channels, D random signs. Inputs are rotated the same way, x' = Q(x R) R^T, so
    that the product of the rotated pair is what hardware computes. Outliers are spread over their block; scales fit better.

    A rotated input has another range than the calibrated one: inputs need scales taken on the spot, of tokens or of blocks.

    Attributes:
        quantizer: rounds the rotated weight, kept in the weight's own dtype.
        block: the most channels that are mixed; the greatest power of two up to it that divides the channels is taken.
        seed: of the signs.

    An outlier among 4 channels is spread evenly, and comes back exactly:

    >>> HadamardRotation()(torch.tensor([[0.0, 8.0, 0.0, 0.0]]), Precision("2"))
    tensor([[0., 8., 0., 0.]])
    """

    quantizer: RoundToNearest = field(default=RoundToNearest())
    block: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block < 1:
            raise EstimatorError(f"block={self.block}: expected 1 or more")

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """As of `quantizer`: the signs come from the seed."""
        return self.quantizer.stored_bytes(layer, precision)

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """The weight after rotation, quantization and back; see `RoundToNearest`."""
        if not precision.quantizes_weight:
            return weight
        axis = 1 if weight.ndim > 1 else 0
        wide = weight.movedim(axis, -1).to(torch.promote_types(weight.dtype, torch.float32))
        rotation = self._rotation(wide)
        rotated = _by_blocks(wide, rotation).movedim(-1, axis).to(weight.dtype)
        back = self.quantizer(rotated, precision).movedim(axis, -1).to(wide.dtype)
        return _by_blocks(back, rotation.T).movedim(-1, axis).to(weight.dtype)

    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor:
        """An input after rotation, quantization and back; see `RoundToNearest.activation_values`.

        Raises:
            EstimatorError: where its scale would have to be calibrated.
        """
        if not self.quantizer.scales_on_the_spot(name):
            raise EstimatorError(
                f"the calibrated range {low:.3g} to {high:.3g} is that of the input before rotation; use "
                "RoundToNearest(activation='token') or a block format"
            )
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rotation = self._rotation(wide)
        values = self.quantizer.activation_values(_by_blocks(wide, rotation), name, math.nan, math.nan)
        return _by_blocks(values, rotation.T).to(x.dtype)

    def _rotation(self, like: Tensor) -> Tensor:
        """(b, b) orthonormal."""
        channels = like.shape[-1]
        size = math.gcd(channels, 1 << (self.block.bit_length() - 1))  # the greatest power of two in both
        signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(self.seed)) * 2 - 1
        matrix = torch.ones(1, 1)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return (signs * matrix / math.sqrt(size)).to(like)


def _by_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    return (x.reshape(-1, len(matrix)) @ matrix).reshape(x.shape)
