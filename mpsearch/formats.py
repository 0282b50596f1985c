"""Number formats: integers, minifloats, blocks with shared scales, NF4."""

import functools
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

_MINIFLOAT = re.compile(r"fp(\d)_e(\d)m(\d)")
#: The 16 values of NF4 (QLoRA, 2305.14314, appendix E).
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: Block formats: elements that share a scale, element format, greatest element exponent.
_BLOCKS = {
    "mxfp4": (32, "fp4_e2m1", 2),
    "mxfp6_e2m3": (32, "fp6_e2m3", 2),
    "mxfp6_e3m2": (32, "fp6_e3m2", 4),
    "mxfp8": (32, "fp8_e4m3", 8),
    "mxint8": (32, "int8", 0),
    "nvfp4": (16, "fp4_e2m1", 2),
}


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


def grid_of(name: str, symmetric: bool) -> Grid:
    """The grid of an integer format, a minifloat or NF4; the last two are symmetric always.

    >>> grid_of("4", True).high, grid_of("4", False).high, grid_of("fp8_e4m3", True).high, grid_of("fp4_e2m1", True).high
    (7, 15, 448.0, 6.0)
    """
    if name.isdecimal():
        bits = int(name)
        if not symmetric:
            return Grid(name, 0, 2**bits - 1, True)
        return Grid(name, -max(1, 2 ** (bits - 1) - 1), max(1, 2 ** (bits - 1) - 1), False)
    if name == "nf4":
        return Grid(name, -1.0, 1.0, False)
    return Grid(name, -minifloat_max(name), minifloat_max(name), False)


def round_to_grid(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Nearest value of a grid, saturating: s (clip(round(x / s) + z) - z) for integers."""
    if grid.asymmetric:
        return ((x / scale).round() + zero).clamp(grid.low, grid.high).sub(zero).mul(scale)
    if grid.name == "1":
        return torch.where(x >= 0, scale, -scale)
    if grid.name.isdecimal():
        return (x / scale).round().clamp(grid.low, grid.high) * scale
    if grid.name == "nf4":
        levels = torch.tensor(_NF4, dtype=x.dtype, device=x.device)
        edges = (levels[1:] + levels[:-1]) / 2
        return levels[torch.bucketize(x / scale, edges)] * scale
    return round_minifloat(x / scale, grid.name) * scale


@functools.cache
def _split(name: str) -> tuple[int, int, int]:
    """Exponent bits, mantissa bits, bias."""
    match = _MINIFLOAT.fullmatch(name)
    if match is None:
        raise ValueError(f"{name} is no minifloat")
    exponent, mantissa = int(match[2]), int(match[3])
    return exponent, mantissa, max(2 ** (exponent - 1) - 1, 1) if exponent > 1 else 1


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

    >>> round_minifloat(torch.tensor([0.24, 0.26, 2.5, 9.0]), "fp4_e2m1")
    tensor([0.0000, 0.5000, 2.0000, 6.0000])
    """
    _, mantissa, bias = _split(name)
    _, power = torch.frexp(x)  # |x| = f 2^power, f in [1/2, 1)
    step = torch.ldexp(torch.ones_like(x), (power - 1).clamp(min=1 - bias) - mantissa)
    limit = minifloat_max(name)
    return ((x / step).round() * step).clamp(-limit, limit)


def cast_float(x: Tensor, name: str) -> Tensor:
    """Through bfloat16, float16 (saturating) or float32 and back."""
    if name == "bf16":
        return x.to(torch.bfloat16).to(x.dtype)
    if name == "fp16":
        return x.clamp(-65504, 65504).to(torch.float16).to(x.dtype)
    return x.float().to(x.dtype)


def block_size(name: str) -> int | None:
    """Elements that share a scale by definition of the format; None where the scale is a free choice."""
    if name == "nf4":
        return 64
    return _BLOCKS[name][0] if name in _BLOCKS else None


def zero_point_bits(name: str, symmetric: bool) -> int:
    """Bits of a stored zero-point."""
    return int(name) if name.isdecimal() and not symmetric else 0


def quantize_blocks(rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Values and scales of a block format.

    MX (OCP microscaling, 2023, section 6.3): scale 2^(floor(log2 max|x|) - emax), E8M0. NVFP4: scale max|x| / 6 in E4M3 under one
    float32 scale for the tensor, max|x| / (6 * 448). NF4: scale max|x|.

    Args:
        rows: (S, block) or (N, n) with n cut into blocks, the last one short.
        name: the format.

    Returns:
        Values of the shape of `rows`, and (blocks, 1) scales.
    """
    size = block_size(name)
    if size is None:
        raise ValueError(f"{name} is no block format")
    width = rows.shape[1]
    blocks = torch.nn.functional.pad(rows, (0, -width % size)).reshape(-1, size)
    top = blocks.abs().amax(1, keepdim=True)
    if name == "nf4":
        scale = torch.where(top > 0, top, torch.ones_like(top))
        values = round_to_grid(blocks, scale, torch.zeros_like(scale), grid_of(name, True))
    elif name == "nvfp4":
        tensor_scale = top.max() / (6.0 * 448.0)
        tensor_scale = torch.where(tensor_scale > 0, tensor_scale, torch.ones_like(tensor_scale))
        scale = round_minifloat(top / 6.0 / tensor_scale, "fp8_e4m3") * tensor_scale
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        values = round_minifloat(blocks / scale, "fp4_e2m1") * scale
    else:
        _, element, emax = _BLOCKS[name]
        _, power = torch.frexp(torch.where(top > 0, top, torch.ones_like(top)))
        exponent = (power - 1 - emax).clamp(-127, 127)
        scale = torch.ldexp(torch.ones_like(top), exponent)
        if element == "int8":
            values = (blocks / scale * 64).round().clamp(-127, 127) / 64 * scale
        else:
            values = round_minifloat(blocks / scale, element) * scale
    return values.reshape(len(rows), -1)[:, :width], scale


def enumerate_minifloat(name: str) -> list[float]:
    """All finite values of at least 0, in order.

    >>> enumerate_minifloat("fp4_e2m1")
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    exponent, mantissa, bias = _split(name)
    values = [
        math.ldexp((1.0 if e else 0.0) + m / 2**mantissa, max(e, 1) - bias)
        for e in range(2**exponent)
        for m in range(2**mantissa)
    ]
    return [value for value in values if value <= minifloat_max(name)]
