"""The block types of GGUF files as formats."""

# ruff: noqa: D102 - the methods are those of `Grid` and `Format`, and told there

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.quantizers import ggml
from mpsearch.quantizers.formats.format import Fit, Format, StoredScales, wide


@dataclass(frozen=True)
class GgufFormat(Format):
    """Whole blocks with their scales inside; rows are of a multiple of their size."""

    def encode(self, values: Tensor) -> Tensor:
        return ggml.quantize(values, self.name)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return ggml.dequantize(codes, self.name).to(dtype)

    def round_rows(self, rows: Tensor, out: Tensor, fit: Fit, symmetric: bool, largest: Tensor) -> StoredScales:
        del fit, symmetric, largest
        blocks = ggml.quantize(wide(rows), self.name)
        out.copy_(ggml.dequantize(blocks, self.name))
        return StoredScales(blocks=blocks)

    def round_inputs(self, rows: Tensor, fit: Fit) -> Tensor:
        del fit
        return ggml.dequantize(ggml.quantize(rows, self.name), self.name)
