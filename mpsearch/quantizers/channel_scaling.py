"""Rounding under a scale of each input channel, which SmoothQuant and AWQ choose."""

import torch
from torch import Tensor

from mpsearch.core.precision import Precision
from mpsearch.quantizers.quantizer import WeightFunction


def rounded_under_scale(
    weight: Tensor, scale: Tensor, groups: int, precision: Precision, quantizer: WeightFunction
) -> Tensor:
    """Q(w s) / s.

    Args:
        weight: (out, channels / groups, ...).
        scale: (channels,) s of each input channel.
        groups: of a convolution.
        precision: `w16` leaves the weight as it is.
        quantizer: Q.
    """
    if not precision.quantizes_weight:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    by_row = scale.to(wide).reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    by_row = by_row.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    return (quantizer((wide * by_row).to(weight.dtype), precision).to(wide) / by_row).to(weight.dtype)
