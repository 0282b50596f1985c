"""Integers, minifloats and codebooks: values on a grid, under a scale in the dtype of the weight."""

# ruff: noqa: D102 - the methods are those of `Grid` and `Format`, and told there

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.core.formats import NumberFormat
from mpsearch.quantizers.formats.format import Fit, Format, Grid, StoredScales, in_blocks, nearest_places, pieces, wide
from mpsearch.quantizers.formats.minifloats import enumerate_minifloat, minifloat_max, round_minifloat


@dataclass(frozen=True)
class SymmetricIntegers(Grid):
    """-2^(b-1)+1 .. 2^(b-1)-1, b >= 2; stored as the value + 2^(b-1).

    >>> grid = SymmetricIntegers.of(3)
    >>> grid.encode(torch.tensor([-3.0])), grid.values().tolist()
    (tensor([1]), [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    """

    negative_zero: ClassVar[int | None] = 0

    @classmethod
    def of(cls, bits: int) -> "SymmetricIntegers":
        """Of a number of bits."""
        return cls(bits, 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)

    def round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        del zero
        return (x / scale).round_().clamp_(self.low, self.high).mul_(scale)

    def encode(self, values: Tensor) -> Tensor:
        return values.round().long() + (1 << (self.bits - 1))

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return (codes - (1 << (self.bits - 1))).to(dtype)

    def codes(self) -> Tensor:
        return torch.arange(1, 1 << self.bits)


@dataclass(frozen=True)
class Signs(Grid):
    """-1 and 1, of 0 the second."""

    def round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        del zero
        return torch.where(x >= 0, scale, -scale)

    def encode(self, values: Tensor) -> Tensor:
        return ((values + 1) / 2).round().long()

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return (2 * codes - 1).to(dtype)


@dataclass(frozen=True)
class AsymmetricIntegers(Grid):
    """0 .. 2^b-1 around an integer zero-point; the range is widened to contain 0."""

    asymmetric: ClassVar[bool] = True

    @classmethod
    def of(cls, bits: int) -> "AsymmetricIntegers":
        """Of a number of bits."""
        return cls(bits, 0, 2**bits - 1)

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (self.high - self.low)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, self.zero_point(low, scale)

    def zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        return (-low.clamp(max=0) / scale).round().clamp(self.low, self.high)

    def round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (x / scale).round_().add_(zero).clamp_(self.low, self.high).sub_(zero).mul_(scale)

    def encode(self, values: Tensor) -> Tensor:
        return values.round().long()

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return codes.to(dtype)


@dataclass(frozen=True)
class Minifloats(Grid):
    """Sign, exponent and mantissa from the highest bit down.

    >>> import torch
    >>> from mpsearch.core.formats import number_format
    >>> grid = Minifloats.of(number_format("fp4_e2m1"))
    >>> grid.encode(torch.tensor([0.5, -6.0])), grid.decode(torch.tensor([1, 15]), torch.float32)
    (tensor([ 1, 15]), tensor([ 0.5000, -6.0000]))

    Attributes:
        name: the format.
    """

    signed_magnitude: ClassVar[bool] = True
    name: str

    @classmethod
    def of(cls, facts: NumberFormat) -> "Minifloats":
        """Of a format."""
        return cls(facts.bits, -minifloat_max(facts.name), minifloat_max(facts.name), facts.name)

    def round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        del zero
        return round_minifloat(x / scale, self.name).mul_(scale)

    def encode(self, values: Tensor) -> Tensor:
        magnitude = nearest_places(values.abs(), enumerate_minifloat(self.name))
        return magnitude | (torch.signbit(values).long() << (self.bits - 1))

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        half = 1 << (self.bits - 1)
        magnitude = torch.tensor(enumerate_minifloat(self.name), dtype=dtype, device=codes.device)[codes % half]
        return torch.where(codes < half, magnitude, -magnitude)

    def codes(self) -> Tensor:
        magnitudes = torch.arange(len(enumerate_minifloat(self.name)))  # the rest are infinities and nan
        return torch.cat([magnitudes, magnitudes + (1 << (self.bits - 1))])


@dataclass(frozen=True)
class Codebook(Grid):
    """A list of values in ascending order, looked up; the scale brings the largest weight to the largest size among them.

    Attributes:
        table: the values by code.
    """

    searched: ClassVar[bool] = False
    table: tuple[float, ...]

    @classmethod
    def of(cls, facts: NumberFormat) -> "Codebook":
        """Of a format."""
        return cls(facts.bits, min(facts.values), max(map(abs, facts.values)), facts.values)

    def round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        del zero
        return torch.tensor(self.table, dtype=x.dtype, device=x.device)[nearest_places(x / scale, self.table)] * scale

    def encode(self, values: Tensor) -> Tensor:
        return nearest_places(values, self.table)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.tensor(self.table, dtype=dtype, device=codes.device)[codes]

    def codes(self) -> Tensor:
        return torch.arange(len(self.table))


@functools.cache
def grid_from(facts: NumberFormat, symmetric: bool) -> Grid:
    """The grid of an integer format, a minifloat or a codebook; the last two have no zero-point in either case."""
    if facts.family == "minifloat":
        return Minifloats.of(facts)
    if facts.family == "codebook":
        return Codebook.of(facts)
    if not symmetric:
        return AsymmetricIntegers.of(facts.bits)
    return SymmetricIntegers.of(facts.bits) if facts.bits > 1 else Signs(1, -1, 1)


@dataclass(frozen=True)
class ScaledFormat(Format):
    """Values on a grid under a scale that the quantizer fits, kept in the dtype of the weight."""

    def grid(self, symmetric: bool = True) -> Grid:
        return grid_from(self.facts, symmetric)

    def encode(self, values: Tensor) -> Tensor:
        return self.grid().encode(values)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self.grid().decode(codes, dtype)

    def round_rows(self, rows: Tensor, out: Tensor, fit: Fit, symmetric: bool, largest: Tensor) -> StoredScales:
        del largest
        grid = self.grid(symmetric)
        scales, zeros = fit(rows, grid)
        for columns, target in zip(pieces(rows), pieces(out), strict=True):
            target.copy_(grid.round(wide(columns), scales, zeros))
        return StoredScales(scales, zeros if grid.asymmetric else None)

    def round_inputs(self, rows: Tensor, fit: Fit) -> Tensor:
        if self.facts.block is None:
            grid = self.grid(symmetric=False)
            return grid.round(rows, *grid.fit(*rows.aminmax(dim=1, keepdim=True)))
        grid, blocks = self.grid(), in_blocks(rows, self.facts.block)
        return grid.round(blocks, *fit(blocks, grid)).reshape(len(rows), -1)[:, : rows.shape[1]]
