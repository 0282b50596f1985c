"""The reference quantizers: round to nearest, with scales by largest value or by least squared error."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision, format_bits
from mpsearch.errors import EstimatorError
from mpsearch.quantizers import ggml
from mpsearch.quantizers.formats import (
    CASTS,
    Grid,
    block_scales,
    block_size,
    element_of,
    grid_of,
    has_fixed_block,
    is_integer,
    quantize_blocks,
    round_to_grid,
)

#: Shrink factors of the largest value that the search for the scale tries; 1 first, so that ties keep the full range.
_FACTORS = tuple(1 - 0.01 * step for step in range(80))
#: Distances from the full-range scale, in machine epsilons, at which the scale of weights on a grid may lie.
_NEIGHBOURS = (0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0)
#: Elements worked on at once: few enough for the cache of a processor, enough to fill a graphics card.
_CHUNK = {"cpu": 1 << 17}
_CHUNK_ELSEWHERE = 1 << 23
#: Fewer are not worth the calls.
_LEAST_CHUNK = 1 << 16
#: Every so many factors the search looks whether smaller ones can still win.
_CHECK = 5
#: Elements of a row that a scale must meet exactly before the rest is looked at.
_PROBE = 32


@dataclass(frozen=True)
class RoundToNearest:
    """Round weights and inputs to the nearest value of a format.

    Integers of b bits: symmetric codes -2^(b-1)+1 .. 2^(b-1)-1 (one bit: -1 and 1), w' = s round(w / s); or asymmetric codes 0 .. 2^b-1,
    w' = s (round(w / s) + z clipped - z) with an integer zero-point z, range widened to contain 0. Scales are kept in the weight's own
    dtype. `scale="mse"` tries 80 shrink factors of the range and keeps the least squared error for each scale; the full
    range is among them, so it is never worse than `max`. Minifloats are scaled and searched the same way.

    Block formats (MX, NVFP4, block floating point), NF4 and the types of GGUF have scales of their own definition; NF4 has
    blocks of 64, block floating point of 16, where the group size does not say otherwise.

    Attributes:
        symmetric: no zero-point.
        scale: `mse` or `max`.
        granularity: a scale for each output channel (or group, with `w4g128`), or one for the tensor.
        activation: inputs with one calibrated range for the tensor, or one for each token, taken on the spot.

    >>> RoundToNearest(scale="max")(torch.tensor([[-3.0, 1.2, 0.4]]), Precision("3"))
    tensor([[-3.,  1.,  0.]])
    """

    symmetric: bool = True
    scale: Literal["mse", "max"] = "mse"
    granularity: Literal["channel", "tensor"] = "channel"
    activation: Literal["tensor", "token"] = "tensor"

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """The weight after quantization and back.

        Args:
            weight: (out, ...) output channels first.
            precision: its weight format and group size.

        Returns:
            Same shape, dtype and device.

        Raises:
            EstimatorError: where the weight is not finite, its scale or a rounded weight does not fit its dtype, a block format
                meets another group size, or a row is no multiple of the blocks of a GGUF type.
        """
        if not precision.quantizes_weight:
            return weight
        return self._codes(weight, precision, weight.dtype).values()

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """Bytes of the packed weight of a layer; see `packed_bytes`."""
        outputs = layer.weight_shape[0] if len(layer.weight_shape) > 1 else 1
        return packed_bytes(layer.numel, outputs, layer.dtype_bytes, precision, self)

    def codes(self, weight: Tensor, precision: Precision) -> "Codes":
        """Codes, scales and zero-points of a weight; see `__call__`."""
        return self._codes(weight, precision, torch.promote_types(weight.dtype, torch.float32))

    def _codes(self, weight: Tensor, precision: Precision, kept: torch.dtype) -> "Codes":
        """The same with rounded values in the dtype `kept`; a part of the rows at a time, so that little is held beside them."""
        greatest = _check_finite(weight)
        name, size = precision.weight, group_of(precision)
        flat = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight.reshape(1, -1)
        scaled = name not in CASTS and name not in ggml.TYPES
        if size is None and self.granularity == "tensor" and scaled:
            flat = flat.reshape(1, -1)
        groups = 1 if size is None else -(-flat.shape[1] // size)
        rounded = flat.new_empty((len(flat) * groups, size or flat.shape[1]), dtype=kept)
        element = element_of(name)
        grid = grid_of(element or name, self.symmetric or element is not None) if scaled else None
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        blocks: Tensor | None = None
        if name in ggml.TYPES:
            kind = ggml.TYPES[name]
            blocks = flat.new_empty((len(flat), flat.shape[1] // kind.size * kind.nbytes), dtype=torch.uint8)
        whole: Tensor | None = None
        at, step = 0, _chunk(weight) // (1 if blocks is None else 2)  # GGUF types take more beside them
        for part in flat.split(max(1, step // max(1, flat.shape[1]))) if weight.numel() else ():
            rows = part if size is None else _blocks(_wide(part), size)
            out = rounded[at : at + len(rows)]
            at += len(rows)
            if name in CASTS:
                out.copy_(_cast(_wide(rows), name))
            elif blocks is not None:
                made = ggml.quantize(_wide(rows), name)
                blocks[at - len(rows) : at] = made
                out.copy_(ggml.dequantize(made, name))
            elif element is not None:
                values, stored, whole = quantize_blocks(rows, name, greatest)
                out.copy_(values)
                scales.append(stored)
            else:
                assert grid is not None
                scale, zero = self._search(rows, grid, weight.dtype)
                for columns, target in zip(_pieces(rows), _pieces(out), strict=True):
                    target.copy_(round_to_grid(_wide(columns), scale, zero, grid))
                scales.append(scale)
                zeros.append(zero)
        found = Codes(
            precision,
            weight,
            rounded,
            torch.cat(scales) if scales else None,
            torch.cat(zeros) if grid is not None and grid.asymmetric and zeros else None,
            grid,
            whole,
            blocks,
        )
        if weight.numel() and not torch.isfinite(torch.stack(rounded.aminmax()).to(weight.dtype)).all():
            raise EstimatorError(
                f"weights from {float(weight.min()):.3g} to {float(weight.max()):.3g} overflow: the scale or a rounded "
                f"weight is beyond the greatest number of {str(weight.dtype).removeprefix('torch.')}, "
                f"{torch.finfo(weight.dtype).max:.3g}"
            )
        return found

    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor:
        """An input after quantization and back.

        Args:
            x: any shape, channels last; blocks lie along the channels, and a token is all but them.
            name: the format.
            low: least calibrated value, for one range a tensor; nan where no calibration data reached the layer.
            high: greatest.

        Returns:
            Same shape, dtype and device.

        Raises:
            EstimatorError: where the format needs a calibrated range and there is none.

        >>> RoundToNearest().activation_values(torch.tensor([-1.0, 0.2, 5.0]), "2", -1.0, 2.0)
        tensor([-1.,  0.,  2.])
        """
        if not x.numel():
            return x
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if name in CASTS:
            return _cast(wide, name).to(x.dtype)
        if self.scales_on_the_spot(name):
            return self._input_rows(wide.reshape(-1, x.shape[-1]), name).reshape(x.shape).to(x.dtype)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise EstimatorError(
                "no calibrated range: no calibration batch reached the layer; give data that does, or use "
                "RoundToNearest(activation='token')"
            )
        grid = grid_of(name, symmetric=False)
        scale, zero = grid.fit(wide.new_tensor(low), wide.new_tensor(high))
        return round_to_grid(wide, scale, zero, grid).to(x.dtype)

    def scales_on_the_spot(self, name: str) -> bool:
        """True where inputs in a format need no calibrated range.

        >>> RoundToNearest().scales_on_the_spot("8"), RoundToNearest().scales_on_the_spot("mxfp8")
        (False, True)
        """
        return self.activation == "token" or name in ggml.TYPES or block_size(name) is not None

    def _input_rows(self, rows: Tensor, name: str) -> Tensor:
        """(N, K) values under scales that are taken on the spot: of blocks, or of each row."""
        if name in ggml.TYPES:
            return ggml.dequantize(ggml.quantize(rows, name), name)
        size = block_size(name)
        if size is None:
            grid = grid_of(name, symmetric=False)
            scales, zeros = grid.fit(*rows.aminmax(dim=1, keepdim=True))
            return round_to_grid(rows, scales, zeros, grid)
        blocks = _blocks(rows, size)
        if element_of(name) is not None:
            values = quantize_blocks(blocks, name)[0]
        else:
            grid = grid_of(name, True)
            values = round_to_grid(blocks, *self._search(blocks, grid, rows.dtype), grid)
        return values.reshape(len(rows), -1)[:, : rows.shape[1]]

    def _search(self, rows: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales as they are stored, and zero-points."""
        low, high = (_wide(extreme) for extreme in rows.aminmax(dim=1, keepdim=True))
        full, _ = grid.fit(low, high)
        scales, zeros = _stored(full, low, grid, dtype)
        best = _error(rows, scales, zeros, grid, dtype)
        searched = self.scale == "mse" and grid.name != "nf4"  # NF4 is defined by its largest value
        for place, factor in enumerate(_FACTORS[1:] if searched else ()):
            scale, _ = grid.fit(low * factor, high * factor)
            if place % _CHECK == 0:  # smaller scales clip more: stop where clipping alone costs more than the best
                clipping = _clipping(rows, low * factor, high * factor, scale, grid, dtype)
                if ((clipping > best) | (best == 0)).all():
                    break
            s, z = _stored(scale, low * factor, grid, dtype)
            error = _error(rows, s, z, grid, dtype)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, s, scales), torch.where(better, z, zeros)
        for candidate in _neighbours(full, grid, dtype):
            s, z = _stored(candidate, low, grid, dtype)
            if not ((_error(rows[:, :_PROBE], s, z, grid, dtype) == 0) & (best > 0)).any():
                continue
            exact = (_error(rows, s, z, grid, dtype) == 0) & (best > 0)
            best = torch.where(exact, torch.zeros_like(best), best)
            scales, zeros = torch.where(exact, s, scales), torch.where(exact, z, zeros)
        return scales, zeros


def group_of(precision: Precision) -> int | None:
    """Consecutive weights that share a scale; None where a whole row does, or the format packs rows by itself.

    Raises:
        EstimatorError: where the format defines another size.

    >>> group_of(Precision("mxfp4")), group_of(Precision("4")), group_of(Precision.parse("wnf4g128"))
    (32, None, 128)
    """
    name, size, own = precision.weight, precision.group_size, block_size(precision.weight)
    if size is None:
        return own
    if name in ggml.TYPES or (has_fixed_block(name) and size != own):
        own = ggml.TYPES[name].size if name in ggml.TYPES else own
        raise EstimatorError(f"{name} has blocks of {own} by definition: write w{name}, without g{size}")
    return size


def _check_finite(weight: Tensor) -> Tensor:
    """The greatest magnitude of a weight, float32 or wider.

    Raises:
        EstimatorError: where a weight is not finite.
    """
    if not weight.numel():
        return weight.new_zeros((), dtype=torch.float32)
    greatest = torch.stack(weight.aminmax()).abs().max()  # no copy of a large layer
    if not torch.isfinite(greatest):
        raise EstimatorError(f"{int((~torch.isfinite(weight)).sum())} of {weight.numel()} weights are not finite")
    return _wide(greatest)


def _chunk(weight: Tensor) -> int:
    """Elements worked on at once: what is held beside them stays small against the weight."""
    most = _CHUNK.get(weight.device.type, _CHUNK_ELSEWHERE)
    return max(_LEAST_CHUNK, min(most, weight.numel() * weight.element_size() // 32))


def _pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """(S, n) cut along long rows."""
    pieces: tuple[Tensor, ...] = rows.split(_CHUNK.get(rows.device.type, _CHUNK_ELSEWHERE), dim=1)
    return pieces


def _wide(x: Tensor) -> Tensor:
    """In float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(flat: Tensor, size: int) -> Tensor:
    """(N, K) cut into rows of `size`, the last ones filled up with zeros."""
    short = -flat.shape[1] % size
    return (torch.nn.functional.pad(flat, (0, short)) if short else flat).reshape(-1, size)


def _cast(x: Tensor, name: str) -> Tensor:
    """Through bfloat16, float16 (saturating) or float32 and back."""
    limit = torch.finfo(CASTS[name]).max
    return x.clamp(-limit, limit).to(CASTS[name]).to(x.dtype)


def _stored(scale: Tensor, low: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A scale as its dtype keeps it, and the zero-point under it.

    Below the normal numbers of the dtype the scale is rounded up: there the nearest number may be 0, or clip much of the range.
    """
    info = torch.finfo(dtype)
    unit = info.smallest_normal * info.eps
    kept = torch.where(scale < info.smallest_normal, (scale / unit).ceil() * unit, scale).to(dtype).to(scale.dtype)
    return kept, grid.zero_point(low, kept) if grid.asymmetric else torch.zeros_like(kept)


def _error(rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """(S, 1) squared error of the values as they are stored."""
    total = torch.zeros_like(scale, dtype=torch.float64)
    for piece in map(_wide, _pieces(rows)):
        gap = round_to_grid(piece, scale, zero, grid).to(dtype) - piece
        total += gap.double().square_().sum(1, keepdim=True)
    return total


def _clipping(rows: Tensor, low: Tensor, high: Tensor, scale: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """(S, 1) squared error by clipping alone, at least, of this range and all inside it: elements beyond the outermost values."""
    info = torch.finfo(dtype)
    scale = scale.clamp(min=info.smallest_normal)
    if grid.asymmetric:
        margin = scale * (1 + (grid.high - grid.low) * info.eps)  # zero-point and stored scale are rounded
        low, high = low.clamp(max=0) - margin, high.clamp(min=0) + margin
    else:
        high = scale * grid.high * (1 + 2 * info.eps)
        low = -high
    total = torch.zeros_like(scale, dtype=torch.float64)
    for piece in map(_wide, _pieces(rows)):
        total += (piece - piece.clamp(low, high)).double().square_().sum(1, keepdim=True)
    return total


def _neighbours(full: Tensor, grid: Grid, dtype: torch.dtype) -> Iterator[Tensor]:
    """Scales near the full-range one, which may miss the scale of weights that lie on a grid.

    (7 s) / 7 may miss s by a last bit; and the greatest codes stay unused where a stored scale came out larger than the range needs.
    """
    eps = torch.finfo(dtype).eps
    levels = grid.high - grid.low
    unused = 2 + math.ceil(levels * eps / 2) if grid.asymmetric else 1
    for count in range(min(unused, int(levels))):
        scale = full * (levels / (levels - count))
        for step in ((0.0,) if count else ()) + _NEIGHBOURS:
            yield scale + scale * (step * eps)


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
        name = self.precision.weight
        return scales if element_of(name) is None else block_scales(scales, self.tensor_scale, name, self.rounded.dtype)

    def _shaped(self, rows: Tensor) -> Tensor:
        """(S, n) in the shape of the weight, without padding."""
        outputs = self.weight.shape[0] if self.weight.ndim > 1 else 1
        return rows.reshape(outputs, -1)[:, : self.weight.numel() // outputs].reshape(self.weight.shape)

    def pack(self) -> "Packed":
        """The stored bytes: codes in a row, lowest bit first, then scales and zero-points; padding of groups is not stored."""
        name, dtype = self.precision.weight, self.weight.dtype
        if self.blocks is not None:
            return Packed(self.precision, dtype, _bytes_of(self.blocks))
        if self.grid is None or self.scales is None:
            return Packed(self.precision, dtype, _bytes_of(self.values().to(CASTS[name])))
        kept = self.scales.to(dtype) if element_of(name) is None else self.scales
        codes = self.grid.encode(self.rounded / self._steps(self.scales) + (0 if self.zeros is None else self.zeros))
        bits = self.precision.weight_bits
        points = None if self.zeros is None else _pack_bits(self.zeros.reshape(-1).long(), bits)
        return Packed(
            self.precision, dtype, _pack_bits(self._shaped(codes).reshape(-1), bits), kept, points, self.tensor_scale
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
        name = self.precision.weight
        outputs = shape[0] if len(shape) > 1 else 1
        inner = math.prod(shape) // outputs
        if self.scales is None:
            data = torch.frombuffer(bytearray(self.codes), dtype=CASTS.get(name, torch.uint8)).reshape(outputs, -1)
            values = data if name in CASTS else ggml.dequantize(data, name)
            return values.reshape(shape).to(self.dtype)
        wide = torch.promote_types(self.dtype, torch.float32)
        element = element_of(name)
        steps = self.scales.to(wide) if element is None else block_scales(self.scales, self.tensor_scale, name, wide)
        grid = grid_of(element or name, self.zero_points is None)
        bits = self.precision.weight_bits
        values = grid.decode(_unpack_bits(self.codes, bits, outputs * inner).to(steps.device), wide)
        size = group_of(self.precision) or inner
        groups = torch.arange(outputs)[:, None] * -(-inner // size) + torch.arange(inner) // size
        place = groups.reshape(-1).clamp(max=len(steps) - 1).to(steps.device)  # one scale for the tensor: place 0
        if self.zero_points is not None:
            values = values - _unpack_bits(self.zero_points, bits, len(steps)).to(values)[place]
        return (values * steps[place, 0]).reshape(shape).to(self.dtype)


@runtime_checkable
class StoresBytes(Protocol):
    """A quantizer that tells the bytes of what it stores: codes, scales, and all else that its weight is made of again."""

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """Bytes of the weight of a layer (its `weight_shape`, `dtype`) at a precision."""
        ...


def stored_bytes(quantizer: Any, layer: Layer, precision: Precision) -> int:
    """Bytes of the weight of a layer as a quantizer stores it; as `RoundToNearest` does where it does not tell.

    Args:
        quantizer: any; `StoresBytes` tells.
        layer: with the shape and dtype of its weight.
        precision: w16 is the weight as it is.

    Raises:
        EstimatorError: where the format cannot hold such rows, or the quantizer tells no whole number of bytes.

    >>> stored_bytes(RoundToNearest(symmetric=False), Layer("fc", "linear", (8, 4)), Precision("4"))   # 16 + 8 x 4 + 8 / 2
    52
    """
    if not precision.quantizes_weight or not isinstance(quantizer, StoresBytes):
        return RoundToNearest(symmetric=is_symmetric(quantizer)).stored_bytes(layer, precision)
    size: Any = quantizer.stored_bytes(layer, precision)
    try:
        whole = int(size)
    except (TypeError, ValueError, OverflowError):
        whole = -1
    if whole < 0 or whole != size:
        raise EstimatorError(
            f"{type(quantizer).__name__}.stored_bytes returned {size!r}, expected a whole number of bytes, 0 or more"
        )
    return whole


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
    name, shape = precision.weight, layer.weight_shape
    if name not in ggml.TYPES or len(shape) < 2 or layer.is_cache:
        return None
    width, block = math.prod(shape[1:]), ggml.TYPES[name].size
    return f"{name} packs rows in multiples of {block} weights, the weight has {width}" if width % block else None


def is_symmetric(quantizer: Any) -> bool:
    """False for a quantizer with zero-points; True where it does not tell.

    >>> is_symmetric(RoundToNearest(symmetric=False)), is_symmetric(None)
    (False, True)
    """
    return bool(getattr(getattr(quantizer, "quantizer", quantizer), "symmetric", True))


def packed_bytes(numel: int, outputs: int, dtype_bytes: int, precision: Precision, quantizer: object) -> int:
    """Bytes of a packed weight, from numbers alone: codes padded to whole bytes, scales, zero-points.

    Args:
        numel: weights.
        outputs: output channels.
        dtype_bytes: of the unquantized weight, and of a scale.
        precision: its format and group size.
        quantizer: tells symmetric and granularity, where it is a `RoundToNearest` or around one; else symmetric, per channel.

    Raises:
        EstimatorError: where the format cannot hold rows of this length.

    >>> packed_bytes(1000, 10, 2, Precision.parse("w4g128"), RoundToNearest())   # 500 of codes, 10 scales of 2
    520
    >>> packed_bytes(4096 * 4096, 4096, 2, Precision("q4_k"), RoundToNearest()) * 8 / 4096**2
    4.5
    """
    name = precision.weight
    if not precision.quantizes_weight:
        return numel * dtype_bytes
    size = group_of(precision)
    if name in ggml.TYPES:
        ggml.check_width(numel // outputs, name)
        return numel // ggml.TYPES[name].size * ggml.TYPES[name].nbytes
    bits = format_bits(name)
    codes = -(-numel * bits // 8)
    if name in CASTS:
        return codes
    if size is not None:
        scales = outputs * -(-(numel // outputs) // size)
    else:
        inner = getattr(quantizer, "quantizer", quantizer)
        scales = outputs if getattr(inner, "granularity", "channel") == "channel" else 1
    if element_of(name) is not None:
        return codes + scales + (4 if name == "nvfp4" else 0)  # one byte a block; a float32 for the tensor
    asymmetric = is_integer(name) and not is_symmetric(quantizer)
    return codes + scales * dtype_bytes + (-(-scales * bits // 8) if asymmetric else 0)


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _pack_bits(values: Tensor, bits: int) -> bytes:
    stream = (values.cpu()[:, None] >> torch.arange(bits)) & 1
    return np.packbits(stream.to(torch.uint8).numpy().reshape(-1), bitorder="little").tobytes()


def _unpack_bits(data: bytes, bits: int, count: int) -> Tensor:
    stream = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    return (torch.from_numpy(stream).reshape(count, bits).long() << torch.arange(bits)).sum(1)
