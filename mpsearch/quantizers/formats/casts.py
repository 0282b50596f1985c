"""Formats in which a weight is cast, not scaled."""

# ruff: noqa: D102 - the methods are those of `Grid` and `Format`, and told there

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.quantizers.formats.format import Fit, Format, StoredScales, wide

#: The dtype of each.
CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class CastFormat(Format):
    """Through bfloat16, float16 (saturating) or float32 and back."""

    @property
    def dtype(self) -> torch.dtype:
        """That the values are cast to."""
        return CASTS[self.name]

    def encode(self, values: Tensor) -> Tensor:
        bits = torch.int16 if self.bits == 16 else torch.int32
        return values.to(self.dtype).view(bits).long() & ((1 << self.bits) - 1)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        signed = torch.where(codes < 1 << (self.bits - 1), codes, codes - (1 << self.bits))
        return signed.to(torch.int16 if self.bits == 16 else torch.int32).view(self.dtype).to(dtype)

    def round_rows(self, rows: Tensor, out: Tensor, fit: Fit, symmetric: bool, largest: Tensor) -> StoredScales:
        del fit, symmetric, largest
        out.copy_(self.cast(wide(rows)))
        return StoredScales()

    def round_inputs(self, rows: Tensor, fit: Fit) -> Tensor:
        del fit
        return self.cast(rows)

    def cast(self, x: Tensor) -> Tensor:
        """A tensor of any shape through the format and back, saturating."""
        limit = torch.finfo(self.dtype).max
        return x.clamp(-limit, limit).to(self.dtype).to(x.dtype)
