"""Rotation of the input channels before rounding."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers.quantizer import Around
from mpsearch.quantizers.rounding import RoundToNearest


@dataclass(frozen=True)
class HadamardRotation(Around):
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
