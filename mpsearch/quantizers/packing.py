"""Quantized weights as they are stored: codes, scales and zero-points, packed bit by bit, and their bytes from shapes alone."""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mpsearch.core.formats import number_format
from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers import ggml
from mpsearch.quantizers.formats import Grid, format_named, grid_of


class ScaleLayout(Protocol):
    """What of a quantizer decides how many scales and zero-points are stored."""

    @property
    def symmetric(self) -> bool:
        """There are no zero-points."""
        ...

    @property
    def granularity(self) -> Literal["channel", "tensor"]:
        """Where there are no groups: a scale for each output channel, or one for the tensor."""
        ...


def group_of(precision: Precision) -> int | None:
    """Consecutive weights that share a scale; None where a whole row does, or the format packs rows by itself.

    Raises:
        EstimatorError: where the format defines another size.

    >>> group_of(Precision("mxfp4")), group_of(Precision("4")), group_of(Precision.parse("wnf4g128"))
    (32, None, 128)
    """
    facts, size = number_format(precision.weight), precision.group_size
    if size is not None and facts.fixed_block and (facts.block_bytes is not None or size != facts.block):
        raise EstimatorError(
            f"{facts.name} has blocks of {facts.block} by definition: write w{facts.name}, without g{size}"
        )
    if facts.block_bytes is not None:
        return None
    return facts.block if size is None else size


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantized weight: what is stored, and what it means.

    Attributes:
        precision: its weight format and group size.
        weight: the weight itself.
        rounded: (S, n) values, one row a scale.
        scales: (S, 1) scales of the grid, or a byte a block; None for casts and GGUF types.
        zeros: (S, 1) integer zero-points, or None.
        grid: what the codes mean, or None.
        tensor_scale: (1,) NVFP4's second scale, or None.
        blocks: the bytes of a GGUF type, or None.
    """

    precision: Precision
    weight: Tensor
    rounded: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    grid: Grid | None = None
    tensor_scale: Tensor | None = None
    blocks: Tensor | None = None

    def values(self) -> Tensor:
        """The dequantized weight, in the weight's own shape and dtype."""
        return self._shaped(self.rounded).to(self.weight.dtype)

    def steps_and_zeros(self) -> tuple[Tensor, Tensor]:
        """Scale and zero-point of every element, in the shape of the weight.

        Raises:
            EstimatorError: for a format without scaled codes.
        """
        if self.scales is None:
            raise EstimatorError(f"{self.precision.weight} has no scales apart from its codes")
        zeros = torch.zeros_like(self.rounded) if self.zeros is None else self.zeros
        steps = self._steps(self.scales).expand_as(self.rounded)
        return self._shaped(steps), self._shaped(zeros.expand_as(self.rounded))

    def _steps(self, scales: Tensor) -> Tensor:
        """(S, 1) what the values of the grid are multiplied by."""
        return format_named(self.precision.weight).steps(scales, self.tensor_scale, self.rounded.dtype)

    def _shaped(self, rows: Tensor) -> Tensor:
        """(S, n) in the shape of the weight, without padding."""
        outputs = self.weight.shape[0] if self.weight.ndim > 1 else 1
        return rows.reshape(outputs, -1)[:, : self.weight.numel() // outputs].reshape(self.weight.shape)

    def pack(self) -> "Packed":
        """The stored bytes: codes in a row, lowest bit first, then scales and zero-points; padding of groups is not stored."""
        form, dtype = format_named(self.precision.weight), self.weight.dtype
        if self.blocks is not None:
            return Packed(self.precision, dtype, _bytes_of(self.blocks))
        if self.grid is None or self.scales is None:
            return Packed(self.precision, dtype, _pack_bits(form.encode(self.values()).reshape(-1), form.bits))
        scales = self.scales.to(dtype) if form.facts.scale == "weight dtype" else self.scales
        codes = self.grid.encode(self.rounded / self._steps(self.scales) + (0 if self.zeros is None else self.zeros))
        bits = form.bits
        points = None if self.zeros is None else _pack_bits(self.zeros.reshape(-1).long(), bits)
        return Packed(
            self.precision, dtype, _pack_bits(self._shaped(codes).reshape(-1), bits), scales, points, self.tensor_scale
        )


@dataclass(frozen=True, eq=False)
class Packed:
    """The bytes of a quantized weight: the truth that `memory_bytes` is held against.

    Attributes:
        precision: weight format and group size.
        dtype: of the weight.
        codes: bit-packed codes; for a GGUF type its blocks, scales included.
        scales: in the dtype of the weight, or a byte a block; None where the codes hold all.
        zero_points: bit-packed zero-points, or None.
        tensor_scale: NVFP4's second scale, float32, or None.
    """

    precision: Precision
    dtype: torch.dtype
    codes: bytes
    scales: Tensor | None = None
    zero_points: bytes | None = None
    tensor_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """All of it."""
        tensors = [tensor for tensor in (self.scales, self.tensor_scale) if tensor is not None]
        return len(self.codes) + len(self.zero_points or b"") + sum(t.numel() * t.element_size() for t in tensors)

    def unpack(self, shape: tuple[int, ...]) -> Tensor:
        """The dequantized weight from the bytes alone.

        Args:
            shape: of the weight.
        """
        form = format_named(self.precision.weight)
        bits = form.bits
        outputs = shape[0] if len(shape) > 1 else 1
        inner = math.prod(shape) // outputs
        if self.scales is None:
            if form.facts.block_bytes is not None:
                data = torch.frombuffer(bytearray(self.codes), dtype=torch.uint8).reshape(outputs, -1)
            else:
                data = _unpack_bits(self.codes, bits, outputs * inner)
            return form.decode(data, self.dtype).reshape(shape)
        wide = torch.promote_types(self.dtype, torch.float32)
        steps = form.steps(self.scales, self.tensor_scale, wide).to(wide)
        grid = grid_of(form.name, self.zero_points is None)
        values = grid.decode(_unpack_bits(self.codes, bits, outputs * inner).to(steps.device), wide)
        size = group_of(self.precision) or inner
        groups = torch.arange(outputs)[:, None] * -(-inner // size) + torch.arange(inner) // size
        place = groups.reshape(-1).clamp(max=len(steps) - 1).to(steps.device)  # one scale for the tensor: place 0
        if self.zero_points is not None:
            values = values - _unpack_bits(self.zero_points, bits, len(steps)).to(values)[place]
        return (values * steps[place, 0]).reshape(shape).to(self.dtype)


def row_misfit(layer: Layer, precision: Precision) -> str | None:
    """Why a format cannot hold the rows of a layer; None where it can, and for unknown shapes.

    A group that is wider than a row ends with it, and so does a block of MX; the types of GGUF have whole blocks alone.

    Args:
        layer: with the shape of its weight.
        precision: of any format.

    >>> row_misfit(Layer("fc", "linear", (8, 4)), Precision("q8_0"))
    'q8_0 packs rows in multiples of 32 weights, the weight has 4'
    >>> row_misfit(Layer("fc", "linear", (8, 4)), Precision.parse("w4g64"))
    """
    facts, shape = number_format(precision.weight), layer.weight_shape
    if facts.block is None or facts.block_bytes is None or len(shape) < 2 or layer.is_cache:
        return None
    width, block = math.prod(shape[1:]), facts.block
    return f"{facts.name} packs rows in multiples of {block} weights, the weight has {width}" if width % block else None


def packed_bytes(numel: int, outputs: int, dtype_bytes: int, precision: Precision, quantizer: ScaleLayout) -> int:
    """Bytes of a packed weight, from numbers alone: codes padded to whole bytes, scales, zero-points.

    Args:
        numel: weights.
        outputs: output channels.
        dtype_bytes: of the unquantized weight, and of a scale.
        precision: its format and group size.
        quantizer: tells whether there are zero-points, and how many scales.

    Raises:
        EstimatorError: where the format cannot hold rows of this length.

    >>> from mpsearch.quantizers.rounding import RoundToNearest
    >>> packed_bytes(1000, 10, 2, Precision.parse("w4g128"), RoundToNearest())   # 500 of codes, 10 scales of 2
    520
    >>> packed_bytes(4096 * 4096, 4096, 2, Precision("q4_k"), RoundToNearest()) * 8 / 4096**2
    4.5
    """
    if not precision.quantizes_weight:
        return numel * dtype_bytes
    facts, size = number_format(precision.weight), group_of(precision)
    if facts.block is not None and facts.block_bytes is not None:
        ggml.check_width(numel // outputs, facts.name)
        return numel // facts.block * facts.block_bytes
    codes = -(-numel * facts.bits // 8)
    rows = outputs if quantizer.granularity == "channel" else 1
    scales = rows if size is None else outputs * -(-(numel // outputs) // size)
    zeros = -(-scales * facts.bits // 8) if facts.family == "integer" and not quantizer.symmetric else 0
    return codes + scales * facts.scale_bytes(dtype_bytes) + facts.tensor_scale_bytes + zeros


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


#: Widths of codes that are whole words of memory, lowest byte first.
_WORDS = {8: "<u1", 16: "<u2", 32: "<u4"}


def _pack_bits(values: Tensor, bits: int) -> bytes:
    """Codes one after the other, lowest bit first."""
    if bits in _WORDS:
        words: bytes = values.cpu().numpy().astype(_WORDS[bits]).tobytes()
        return words
    stream = (values.cpu()[:, None] >> torch.arange(bits)) & 1
    return np.packbits(stream.to(torch.uint8).numpy().reshape(-1), bitorder="little").tobytes()


def _unpack_bits(data: bytes, bits: int, count: int) -> Tensor:
    """The codes that `_pack_bits` packed, int64."""
    if bits in _WORDS:
        return torch.from_numpy(np.frombuffer(data, _WORDS[bits], count).astype(np.int64))
    stream = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    return (torch.from_numpy(stream).reshape(count, bits).long() << torch.arange(bits)).sum(1)
