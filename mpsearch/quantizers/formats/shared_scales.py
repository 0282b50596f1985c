"""Microscaling, NVFP4 and block floating point: elements of a block under a scale of one byte."""

# ruff: noqa: D102 - the methods are those of `Grid` and `Format`, and told there

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.core.formats import number_format
from mpsearch.quantizers.formats.format import Fit, Format, Grid, StoredScales, in_blocks
from mpsearch.quantizers.formats.minifloats import round_minifloat
from mpsearch.quantizers.formats.scaled import grid_from


@dataclass(frozen=True)
class SharedScaleFormat(Format):
    """Blocks with a power of two as their scale, or NVFP4's E4M3 under one float32 a tensor."""

    @functools.cached_property
    def elements(self) -> Grid:
        """The values of an element before scaling."""
        assert self.facts.element is not None
        return grid_from(number_format(self.facts.element), True)

    def grid(self, symmetric: bool = True) -> Grid:
        del symmetric
        return self.elements

    def encode(self, values: Tensor) -> Tensor:
        return self.elements.encode(values)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return self.elements.decode(codes, dtype)

    def round_rows(self, rows: Tensor, out: Tensor, fit: Fit, symmetric: bool, largest: Tensor) -> StoredScales:
        del fit, symmetric
        values, scales, tensor_scale = self.round_blocks(rows, largest)
        out.copy_(values)
        return StoredScales(scales, None, tensor_scale)

    def round_inputs(self, rows: Tensor, fit: Fit) -> Tensor:
        del fit
        assert self.facts.block is not None
        values = self.round_blocks(in_blocks(rows, self.facts.block))[0]
        return values.reshape(len(rows), -1)[:, : rows.shape[1]]

    def round_blocks(self, blocks: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, stored scales and scale of the tensor; see `fit_blocks`.

        >>> from mpsearch.quantizers.formats import FORMATS
        >>> FORMATS["mxfp4"].round_blocks(torch.tensor([[5.0, 0.3, -1.9]]))
        (tensor([[ 4.0000,  0.5000, -2.0000]]), tensor([[127]], dtype=torch.uint8), None)
        """
        scales, tensor_scale = self.fit_blocks(blocks, largest)
        steps = self.steps(scales, tensor_scale, blocks.dtype)
        return self.elements.round(blocks, steps, torch.zeros_like(steps)), scales, tensor_scale

    def fit_blocks(self, blocks: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The stored scales of blocks.

        MX (OCP microscaling, 2023, section 6.3) and block floating point: 2^(floor(log2 max|x|) - emax), as E8M0, the exponent
        plus 127; an integer element counts as a fraction with one digit before the point. NVFP4: max|x| / 6 in E4M3, at least its
        smallest positive value, under one float32 scale for the tensor, max|x| / (6 * 448).

        Args:
            blocks: (S, size), float32 or float64.
            largest: max|x| of the tensor, where these are a part of its blocks.

        Returns:
            (S, 1) uint8, and the scale of the tensor, (1,) float32, or None.
        """
        top = blocks.abs().amax(1, keepdim=True)
        if self.facts.scale == "fp8_e4m3":
            bytes_of = _scale_grid()
            most = self.elements.high
            whole = ((top.max() if largest is None else largest) / (most * bytes_of.high)).float().reshape(1)
            whole = torch.where(whole > 0, whole, torch.ones_like(whole))
            scales = round_minifloat(top / most / whole.to(top.dtype), self.facts.scale)
            scales = torch.where(top > 0, scales.clamp(min=2.0**-9), scales)
            return bytes_of.encode(scales).to(torch.uint8), whole
        greatest = 0 if self._fraction_digits is not None else math.frexp(self.elements.high)[1] - 1
        _, power = torch.frexp(top)
        exponent = torch.where(top > 0, power - 1 - greatest, -127)
        return (exponent.clamp(-127, 127) + 127).to(torch.uint8), None

    def steps(self, scales: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The step by which the elements of each block are multiplied; 1 for a step of 0, a block of zeros."""
        if tensor_scale is not None:
            steps = _scale_grid().decode(scales.long(), dtype) * tensor_scale.to(dtype)
            return torch.where(steps > 0, steps, torch.ones_like(steps))
        return torch.ldexp(torch.ones_like(scales, dtype=dtype), scales.int() - 127 - (self._fraction_digits or 0))

    @property
    def _fraction_digits(self) -> int | None:
        """Integers of b bits have b - 2 digits after the point; None for minifloats."""
        return self.bits - 2 if self.facts.number.bits else None


def _scale_grid() -> Grid:
    """The values of NVFP4's scales."""
    return grid_from(number_format("fp8_e4m3"), True)
