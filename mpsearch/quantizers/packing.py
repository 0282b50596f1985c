"""Quantized weights as they are stored: codes, scales and zero-points, packed bit by bit, and their bytes from shapes alone."""

import functools
import math
from collections.abc import Iterator
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
from mpsearch.quantizers.formats.format import CHUNK, CHUNK_ELSEWHERE, wide


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
        """(S, 1) what the values of the grid are multiplied by, float32 or wider."""
        dtype = torch.promote_types(self.rounded.dtype, torch.float32)
        return format_named(self.precision.weight).steps(scales, self.tensor_scale, dtype)

    def _shaped(self, rows: Tensor) -> Tensor:
        """(S, n) in the shape of the weight, without padding."""
        outputs = self.weight.shape[0] if self.weight.ndim > 1 else 1
        return rows.reshape(outputs, -1)[:, : self.weight.numel() // outputs].reshape(self.weight.shape)

    def pack(self) -> "Packed":
        """The stored bytes: codes in a row, lowest bit first, then scales and zero-points; padding of groups is not stored.

        A part of the rows at a time, so that little is held beside the bytes. Where a format has a code to spare, the -0 that rounding
        leaves of a small negative weight gets it, and `Packed.unpack` gives back the same tensor bit for bit.
        """
        form, dtype = format_named(self.precision.weight), self.weight.dtype
        if self.blocks is not None:
            return Packed(self.precision, dtype, _bytes_of(self.blocks))
        if self.grid is None or self.scales is None:
            values = self.values().reshape(-1).split(CHUNK["cpu"])
            return Packed(
                self.precision, dtype, bytearray().join(_pack_bits(form.encode(part), form.bits) for part in values)
            )
        scales = self.scales.to(dtype) if form.facts.scale == "weight dtype" else self.scales
        points = None if self.zeros is None else _pack_bits(self.zeros.reshape(-1).long(), form.bits)
        codes = bytearray().join(_pack_bits(part, form.bits) for part in self._parts(self.grid))
        return Packed(self.precision, dtype, codes, scales, points, self.tensor_scale)

    def _parts(self, grid: Grid) -> Iterator[Tensor]:
        """Codes of some output channels at a time, without padding; int64, each but the last a multiple of 8."""
        assert self.scales is not None
        outputs = self.weight.shape[0] if self.weight.ndim > 1 else 1
        inner = self.weight.numel() // outputs
        steps, zeros = self._steps(self.scales), self.zeros
        groups = len(steps) // outputs  # of an output channel; 0 for one scale for the tensor
        rows = self.rounded if groups else self.rounded.reshape(outputs, -1)
        for part in _row_parts(outputs, inner, rows.device):
            some = slice(part.start * groups, part.stop * groups) if groups else slice(None)
            values = wide(rows[slice(part.start * groups, part.stop * groups) if groups else part])
            scaled = values / steps[some]
            codes = grid.encode(scaled if zeros is None else scaled.add_(zeros[some]))
            if grid.negative_zero is not None:
                codes.masked_fill_((values == 0) & torch.signbit(values), grid.negative_zero)
            yield codes.reshape(part.stop - part.start, -1)[:, :inner].reshape(-1)


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
    codes: bytearray | memoryview
    scales: Tensor | None = None
    zero_points: bytearray | memoryview | None = None
    tensor_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """All of it."""
        tensors = [tensor for tensor in (self.scales, self.tensor_scale) if tensor is not None]
        return len(self.codes) + len(self.zero_points or ()) + sum(t.numel() * t.element_size() for t in tensors)

    def unpack(self, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
        """The dequantized weight from the bytes alone.

        Args:
            shape: of the weight.
            device: to put it on; None = the processor's memory.
        """
        values = torch.empty(shape, dtype=self.dtype, device=device)
        rows = values.view(shape[0] if len(shape) > 1 else 1, -1)
        for part, some in self.parts(shape, values.device):
            rows[part] = some
        return values

    def parts(self, shape: tuple[int, ...], device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """Some output channels of the dequantized weight at a time.

        Args:
            shape: of the weight.
            device: that they are put on.

        Yields:
            which, and their (k, n) values.
        """
        form = format_named(self.precision.weight)
        outputs = shape[0] if len(shape) > 1 else 1
        inner = math.prod(shape) // outputs
        if self.scales is None:
            block_bytes = form.facts.block_bytes
            for part in _row_parts(outputs, inner, device):
                count = part.stop - part.start
                if block_bytes is not None:
                    width = len(self.codes) // outputs
                    data = np.frombuffer(self.codes, np.uint8, count * width, part.start * width).reshape(count, width)
                    codes = torch.from_numpy(data.copy()).to(device)
                else:
                    codes = _unpack_bits(self.codes, form.bits, count * inner, part.start * inner).to(device)
                yield part, form.decode(codes, self.dtype).reshape(count, inner)
            return
        number = torch.promote_types(self.dtype, torch.float32)
        steps = form.steps(self.scales.to(device), self.tensor_scale, number).to(number)
        zeros = None
        if self.zero_points is not None:
            zeros = _unpack_bits(self.zero_points, form.bits, len(steps)).to(steps).reshape(-1, 1)
        groups, size = len(steps) // outputs, group_of(self.precision) or inner
        table = _Table.of(form.name, zeros is None, number, device)
        for part in _row_parts(outputs, inner, device):
            some = slice(part.start * groups, part.stop * groups) if groups else slice(None)
            values = table.values(self.codes, part, inner)
            step, zero = steps[some], None if zeros is None else zeros[some]
            if groups and inner % size:  # the last group of a row is shorter
                values = torch.nn.functional.pad(values, (0, -inner % size))
            values = values.view(len(step), -1) if groups else values
            values = (values if zero is None else values.sub_(zero)).mul_(step)
            yield part, values.reshape(part.stop - part.start, -1)[:, :inner].to(self.dtype)


@dataclass(frozen=True, eq=False)
class _Table:
    """Values of codes, several at a time, by the bits that they take together.

    Attributes:
        bits: of a code.
        entries: (2^(bits x k), k) values of k codes.
    """

    bits: int
    entries: Tensor

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def of(name: str, symmetric: bool, dtype: torch.dtype, device: torch.device) -> "_Table":
        """Of the codes of a format."""
        grid, bits = grid_of(name, symmetric), format_named(name).bits
        known = grid.codes()
        alone = torch.zeros(1 << bits, dtype=dtype)
        alone[known] = grid.decode(known, dtype)
        if grid.negative_zero is not None:
            alone[grid.negative_zero] = -0.0
        count = _TOGETHER.get(bits, 1)
        places = torch.arange(1 << bits * count)[:, None] >> torch.arange(count) * bits
        return _Table(bits, alone[places & ((1 << bits) - 1)].contiguous().to(device))

    def values(self, codes: bytearray | memoryview, part: slice, inner: int) -> Tensor:
        """(k, inner) values of the codes of some output channels, in a tensor of their own."""
        count, together = (part.stop - part.start) * inner, self.entries.shape[1]
        places = _unpack_bits(codes, self.bits, count, part.start * inner, together)
        if together == 1:
            values = self.entries.view(-1).index_select(0, places.to(self.entries.device).int())
        elif self.entries.is_cpu:  # several times as fast as torch
            values = torch.from_numpy(self.entries.numpy().take(places.numpy(), axis=0))
        else:
            values = self.entries[places.to(self.entries.device).int()]
        return values.reshape(-1)[:count].view(-1, inner)


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


#: Widths of codes that are whole words of memory, lowest byte first.
_WORDS = {8: "<u1", 16: "<u2", 32: "<u4"}
#: Bits of a code -> codes that are looked up together: a table of their values stays in the cache.
_TOGETHER = {1: 8, 2: 4, 3: 4, 4: 2, 5: 2, 6: 2}


def _row_parts(outputs: int, inner: int, device: torch.device) -> Iterator[slice]:
    """Output channels by as many as are worked on at once; a multiple of 8, so that each part starts with a byte of its own."""
    step = max(1, CHUNK.get(device.type, CHUNK_ELSEWHERE) // max(1, inner) // 8) * 8
    return (slice(start, min(start + step, outputs)) for start in range(0, outputs, step))


def _pack_bits(codes: Tensor, bits: int) -> bytearray:
    """Codes one after the other, lowest bit first."""
    numbers = codes.cpu().numpy()
    if bits in _WORDS:
        return bytearray(numbers.astype(_WORDS[bits]).tobytes())
    size = -(-len(numbers) * bits // 8)
    if bits > 8:
        stream = (numbers[:, None] >> np.arange(bits)) & 1
        return bytearray(np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little"))
    eights = np.zeros((-(-len(numbers) // 8), 8), "<i8")
    eights.reshape(-1)[: len(numbers)] = numbers
    word = (eights << np.arange(8) * bits).sum(1).astype("<i8")  # 8 codes are as many bytes as a code has bits
    return bytearray(word.view(np.uint8).reshape(-1, 8)[:, :bits].tobytes()[:size])


def _unpack_bits(data: bytearray | memoryview, bits: int, count: int, start: int = 0, together: int = 1) -> Tensor:
    """Codes that `_pack_bits` packed, from a multiple of 8 on; `together` neighbours as one number, the first one lowest."""
    if bits in (16, 32):
        return torch.from_numpy(np.frombuffer(data, _WORDS[bits], count, start * bits // 8).astype(np.int64))
    size = -(-count * bits // 8)
    packed = np.frombuffer(data, np.uint8, size, start * bits // 8)
    if bits > 8:
        stream = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
        return torch.from_numpy((stream.astype(np.int64) << np.arange(bits)).sum(1))
    if bits * together == 8:
        return torch.from_numpy(packed.copy())
    eights = np.zeros((-(-count // 8), 8), np.uint8)
    eights[: size // bits, :bits] = packed[: size // bits * bits].reshape(-1, bits)
    eights[size // bits :, : size % bits] = packed[size // bits * bits :]
    width = bits * together
    places = (eights.view("<i8") >> np.arange(0, 8 * bits, width)) & ((1 << width) - 1)
    return torch.from_numpy(places.reshape(-1)[: -(-count // together)])


def _bytes_of(tensor: Tensor) -> bytearray:
    return bytearray(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
