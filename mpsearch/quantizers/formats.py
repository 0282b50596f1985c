"""Number formats: integers, minifloats, NF4, and blocks with a shared scale."""

import functools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.core.precision import format_bits

_MINIFLOAT = re.compile(r"fp(\d)_e(\d)m(\d)")
#: The 16 values of NF4 (QLoRA, 2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: Block formats of a fixed size: elements that share a scale, format of an element.
_BLOCKS = {
    "mxfp4": (32, "fp4_e2m1"),
    "mxfp6_e2m3": (32, "fp6_e2m3"),
    "mxfp6_e3m2": (32, "fp6_e3m2"),
    "mxfp8": (32, "fp8_e4m3"),
    "mxfp8_e5m2": (32, "fp8_e5m2"),
    "mxint8": (32, "8"),
    "nvfp4": (16, "fp4_e2m1"),
}
#: Formats in which a weight is cast, not scaled.
CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Grid:
    """The values of a format before scaling.

    Attributes:
        name: the format.
        low: least code of an integer.
        high: greatest value.
        asymmetric: with a zero-point.
    """

    name: str
    low: float
    high: float
    asymmetric: bool

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero-point that cover a range; a range of nothing gets scale 1."""
        if self.asymmetric:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / (self.high - self.low)
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            return scale, self.zero_point(low, scale)
        scale = torch.maximum(low.abs(), high.abs()) / self.high
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, torch.zeros_like(scale)

    def zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """The integer code of 0."""
        return (-low.clamp(max=0) / scale).round().clamp(self.low, self.high)

    def encode(self, values: Tensor) -> Tensor:
        """The stored code, int64 from 0, of values of the grid (asymmetric integers: of the code itself).

        Minifloats: sign, exponent and mantissa from the highest bit down; signed integers: the value + 2^(b-1).

        >>> grid_of("fp4_e2m1", True).encode(torch.tensor([0.5, -6.0])), grid_of("3", True).encode(torch.tensor([-3.0]))
        (tensor([ 1, 15]), tensor([1]))
        """
        if self.asymmetric:
            return values.round().long()
        bits = format_bits(self.name)
        if self.name == "1":
            return ((values + 1) / 2).round().long()
        if self.name.isdecimal():
            return values.round().long() + (1 << (bits - 1))
        if self.name == "nf4":
            return _nearest(values, _NF4)
        magnitude = _nearest(values.abs(), enumerate_minifloat(self.name))
        return magnitude | (torch.signbit(values).long() << (bits - 1))

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of codes; see `encode`.

        >>> grid_of("fp4_e2m1", True).decode(torch.tensor([1, 15]), torch.float32)
        tensor([ 0.5000, -6.0000])
        """
        if self.asymmetric:
            return codes.to(dtype)
        bits = format_bits(self.name)
        if self.name == "1":
            return (2 * codes - 1).to(dtype)
        if self.name.isdecimal():
            return (codes - (1 << (bits - 1))).to(dtype)
        if self.name == "nf4":
            return torch.tensor(_NF4, dtype=dtype, device=codes.device)[codes]
        half = 1 << (bits - 1)
        magnitude = torch.tensor(enumerate_minifloat(self.name), dtype=dtype, device=codes.device)[codes % half]
        return torch.where(codes < half, magnitude, -magnitude)


def is_integer(name: str) -> bool:
    """True for a format of plain integers.

    >>> is_integer("4"), is_integer("int16"), is_integer("mxint8")
    (True, True, False)
    """
    return name.isdecimal() or name == "int16"


@functools.cache
def grid_of(name: str, symmetric: bool) -> Grid:
    """The grid of an integer format, a minifloat or NF4; the last two are symmetric always.

    `int16` is the integer of 16 bits, since `16` means left alone.

    >>> grid_of("4", True).high, grid_of("4", False).high, grid_of("fp8_e4m3", True).high, grid_of("fp4_e2m1", True).high
    (7, 15, 448.0, 6.0)
    """
    if is_integer(name):
        name = name.removeprefix("int")
        bits = int(name)
        if not symmetric:
            return Grid(name, 0, 2**bits - 1, True)
        return Grid(name, -max(1, 2 ** (bits - 1) - 1), max(1, 2 ** (bits - 1) - 1), False)
    if name == "nf4":
        return Grid(name, -1.0, 1.0, False)
    return Grid(name, -minifloat_max(name), minifloat_max(name), False)


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Nearest value of a grid, saturating: s (clip(round(x / s) + z) - z) for integers."""
    scaled = x / scale
    if grid.asymmetric:
        return scaled.round_().add_(zero).clamp_(grid.low, grid.high).sub_(zero).mul_(scale)
    if grid.name == "1":
        return torch.where(x >= 0, scale, -scale)
    if grid.name.isdecimal():
        return scaled.round_().clamp_(grid.low, grid.high).mul_(scale)
    if grid.name == "nf4":
        return torch.tensor(_NF4, dtype=x.dtype, device=x.device)[_nearest(scaled, _NF4)] * scale
    return round_minifloat(scaled, grid.name).mul_(scale)


def _nearest(x: Tensor, values: tuple[float, ...]) -> Tensor:
    """Index of the nearest of sorted values; the lower one of two that are equally near."""
    levels = torch.tensor(values, dtype=x.dtype, device=x.device)
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)


@functools.cache
def _split(name: str) -> tuple[int, int, int]:
    """Exponent bits, mantissa bits, bias."""
    match = _MINIFLOAT.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no minifloat")
    exponent, mantissa = int(match[2]), int(match[3])
    return exponent, mantissa, max(2 ** (exponent - 1) - 1, 1)


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


def block_size(name: str) -> int | None:
    """Elements that share a scale by definition or custom of the format; None where there is neither.

    >>> block_size("mxfp4"), block_size("nf4"), block_size("bfp4"), block_size("4")
    (32, 64, 16, None)
    """
    if name in _BLOCKS:
        return _BLOCKS[name][0]
    if name == "nf4":
        return 64
    return 16 if name.startswith("bfp") else None


def has_fixed_block(name: str) -> bool:
    """True where the format defines the size of its blocks."""
    return name in _BLOCKS


def element_of(name: str) -> str | None:
    """Format of an element of a block format whose scale is a byte; None for any other format.

    >>> element_of("mxfp8"), element_of("bfp5"), element_of("nf4")
    ('fp8_e4m3', '5', None)
    """
    if name in _BLOCKS:
        return _BLOCKS[name][1]
    return name.removeprefix("bfp") if name.startswith("bfp") else None


def fit_blocks(blocks: Tensor, name: str, largest: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The stored scales of a block format.

    MX (OCP microscaling, 2023, section 6.3) and block floating point: 2^(floor(log2 max|x|) - emax), as E8M0, the exponent
    plus 127; an integer element counts as a fraction with one digit before the point. NVFP4: max|x| / 6 in E4M3, at least its
    smallest positive value, under one float32 scale for the tensor, max|x| / (6 * 448).

    Args:
        blocks: (S, size), float32 or float64.
        name: the format.
        largest: max|x| of the tensor, where these are a part of its blocks.

    Returns:
        (S, 1) uint8, and the scale of the tensor, (1,) float32, or None.
    """
    top = blocks.abs().amax(1, keepdim=True)
    if name == "nvfp4":
        whole = ((top.max() if largest is None else largest) / (6.0 * 448.0)).float().reshape(1)
        whole = torch.where(whole > 0, whole, torch.ones_like(whole))
        kept = round_minifloat(top / 6.0 / whole.to(top.dtype), "fp8_e4m3")
        kept = torch.where(top > 0, kept.clamp(min=2.0**-9), kept)
        return grid_of("fp8_e4m3", True).encode(kept).to(torch.uint8), whole
    element = element_of(name)
    assert element is not None
    greatest = 0 if element.isdecimal() else math.frexp(minifloat_max(element))[1] - 1
    _, power = torch.frexp(top)
    exponent = torch.where(top > 0, power - 1 - greatest, -127)
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8), None


def block_scales(stored: Tensor, whole: Tensor | None, name: str, dtype: torch.dtype) -> Tensor:
    """The step by which the elements of each block are multiplied, from what `fit_blocks` gave; 1 for a step of 0, a block of zeros."""
    if whole is not None:
        steps = grid_of("fp8_e4m3", True).decode(stored.long(), dtype) * whole.to(dtype)
        return torch.where(steps > 0, steps, torch.ones_like(steps))
    element = element_of(name)
    assert element is not None
    shift = int(element) - 2 if element.isdecimal() else 0  # integers of b bits: b - 2 digits after the point
    return torch.ldexp(torch.ones_like(stored, dtype=dtype), stored.int() - 127 - shift)


def quantize_blocks(blocks: Tensor, name: str, largest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, stored scales and scale of the tensor of a block format; see `fit_blocks`.

    >>> quantize_blocks(torch.tensor([[5.0, 0.3, -1.9]]), "mxfp4")
    (tensor([[ 4.0000,  0.5000, -2.0000]]), tensor([[127]], dtype=torch.uint8), None)
    """
    element = element_of(name)
    assert element is not None
    stored, whole = fit_blocks(blocks, name, largest)
    steps = block_scales(stored, whole, name, blocks.dtype)
    return round_to_grid(blocks, steps, torch.zeros_like(steps), grid_of(element, True)), stored, whole
