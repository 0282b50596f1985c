"""The values of minifloats, and rounding to them.

`ml_dtypes` and torch have only the splits that are standards, with one rounding each; here is every split of 3 to 8 bits, in float32 and
float64, by one formula. Tests hold the 8-bit ones against torch bit for bit, all of them against an enumeration of their bits.
"""

import functools
import math

import torch
from torch import Tensor

from mpsearch.core.formats import number_format


@functools.cache
def _split(name: str) -> tuple[int, int, int]:
    """Exponent bits, mantissa bits, bias."""
    number = number_format(name).number
    return number.exponent, number.significand - 1, max(2 ** (number.exponent - 1) - 1, 1)


@functools.cache
def minifloat_max(name: str) -> float:
    """Greatest finite value: OCP 8-bit E4M3 keeps one code for nan (448), E5M2 a whole exponent (57344); the rest keep none.

    >>> [minifloat_max(name) for name in ("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1")]
    [448.0, 57344.0, 7.5, 28.0, 6.0]
    """
    exponent, mantissa, bias = _split(name)
    if name == "fp8_e4m3":
        return 448.0
    if name == "fp8_e5m2":
        return 57344.0
    return math.ldexp(2 - 2.0**-mantissa, 2**exponent - 1 - bias)


def round_minifloat(x: Tensor, name: str) -> Tensor:
    """Nearest value, ties to the even mantissa, subnormals kept, saturating.

    v = (-1)^s 2^(max(E, 1) - B) ([E > 0] + M / 2^m) (OCP 8-bit and microscaling specifications, 2023).

    Args:
        x: float32 or float64.
        name: the format.

    >>> round_minifloat(torch.tensor([0.24, 0.26, 2.5, 9.0]), "fp4_e2m1")
    tensor([0.0000, 0.5000, 2.0000, 6.0000])
    """
    _, mantissa, bias = _split(name)
    step = _power_of_two(x).clamp_(min=2.0 ** (1 - bias)).mul_(2.0**-mantissa)
    limit = minifloat_max(name)
    return (x / step).round_().mul_(step).clamp_(-limit, limit)


def _power_of_two(x: Tensor) -> Tensor:
    """2^floor(log2 |x|), 0 for zeros and subnormals: the exponent bits alone."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


@functools.cache
def enumerate_minifloat(name: str) -> tuple[float, ...]:
    """All finite values of at least 0, in order: the value at place i has the code i.

    >>> enumerate_minifloat("fp4_e2m1")
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """
    exponent, mantissa, bias = _split(name)
    values = [
        math.ldexp((1.0 if e else 0.0) + m / 2**mantissa, max(e, 1) - bias)
        for e in range(2**exponent)
        for m in range(2**mantissa)
    ]
    return tuple(value for value in values if value <= minifloat_max(name))
