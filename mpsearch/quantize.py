"""The reference quantizers: round to nearest, with scales by largest value or by least squared error."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.formats import (
    Grid,
    block_size,
    cast_float,
    grid_of,
    quantize_blocks,
    round_to_grid,
    zero_point_bits,
)
from mpsearch.precision import Precision, format_bits

#: Shrink factors of the largest value that the search for the scale tries; 1 first, so that ties keep the full range.
_FACTORS = tuple(1 - 0.01 * step for step in range(80))
#: Distances from the full-range scale, in machine epsilons, at which the scale of weights on a grid may lie.
_NEIGHBOURS = (0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0)
#: Elements worked on at once, so that the search needs little memory whatever the layer.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class RoundToNearest:
    """Round weights and inputs to the nearest value of a format.

    Integers of b bits: symmetric codes -2^(b-1)+1 .. 2^(b-1)-1 (one bit: -1 and 1), w' = s round(w / s); or asymmetric codes 0 .. 2^b-1,
    w' = s (round(w / s) + z clipped - z) with an integer zero-point z, range widened to contain 0. Scales are kept in the weight's own
    dtype. `scale="mse"` tries 80 shrink factors of the range and keeps the least squared error for each scale; the full
    range is among them, so it is never worse than `max`.

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
            EstimatorError: where the weight is not finite, or a block format meets another group size.
        """
        if not precision.quantizes_weight:
            return weight
        return self.codes(weight, precision).values()

    def codes(self, weight: Tensor, precision: Precision) -> "Codes":
        """Codes, scales and zero-points of a weight; see `__call__`."""
        if not torch.isfinite(weight).all():
            raise EstimatorError(f"{int((~torch.isfinite(weight)).sum())} of {weight.numel()} weights are not finite")
        name = precision.weight
        rows = self._rows(weight, precision)
        if name in ("bf16", "fp16", "fp32"):
            return Codes(precision, weight, rows, cast_float(rows, name), None, None, None)
        if block_size(name) is not None:
            values, scales = quantize_blocks(rows, name)
            return Codes(precision, weight, rows, values, scales, None, None)
        grid = grid_of(name, self.symmetric)
        found = [self._chunk(part, grid, weight.dtype) for part in rows.split(max(1, _CHUNK // rows.shape[1]))]
        values, scales, zeros = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Codes(precision, weight, rows, values, scales, zeros if grid.asymmetric else None, grid)

    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor:
        """An input after quantization and back.

        Args:
            x: any shape; the last axis is the token's, where scales are per token.
            name: the format.
            low: least calibrated value, for one range a tensor.
            high: greatest.

        Returns:
            Same shape, dtype and device.

        >>> RoundToNearest().activation_values(torch.tensor([-1.0, 0.2, 5.0]), "2", -1.0, 2.0)
        tensor([-1.,  0.,  2.])
        """
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if name in ("bf16", "fp16", "fp32"):
            return cast_float(wide, name).to(x.dtype)
        if block_size(name) is not None:
            return quantize_blocks(wide.reshape(-1, x.shape[-1]), name)[0].reshape(x.shape).to(x.dtype)
        if self.activation == "token" or not math.isfinite(low):
            rows = wide.reshape(-1, x.shape[-1]) if x.ndim > 1 else wide.reshape(1, -1)
            least, most = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        else:
            rows = wide.reshape(1, -1)
            least, most = rows.new_full((1, 1), low), rows.new_full((1, 1), high)
        grid = grid_of(name, symmetric=False)
        scales, zeros = grid.fit(least, most)
        return round_to_grid(rows, scales, zeros, grid).reshape(x.shape).to(x.dtype)

    def _rows(self, weight: Tensor, precision: Precision) -> Tensor:
        """(S, n) one row a scale, float32 or wider; short last groups are padded with zeros."""
        flat = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight.reshape(1, -1)
        flat = flat.float() if weight.dtype in (torch.float16, torch.bfloat16) else flat
        own = block_size(precision.weight)
        if own is not None and precision.group_size not in (None, own):
            raise EstimatorError(f"{precision.weight} has blocks of {own}, got a group size of {precision.group_size}")
        size = precision.group_size or own
        if size is None:
            return flat if self.granularity == "channel" else flat.reshape(1, -1)
        padding = -flat.shape[1] % size
        return torch.nn.functional.pad(flat, (0, padding)).reshape(-1, size)

    def _chunk(self, rows: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        best = values = scales = zeros = None
        for factor in _FACTORS if self.scale == "mse" else _FACTORS[:1]:
            s, _ = grid.fit(low * factor, high * factor)
            s, z, found, error = _tried(rows, s, low * factor, grid, dtype)
            if best is None or values is None or scales is None or zeros is None:
                best, values, scales, zeros = error, found, s, z
                continue
            better = error < best
            best = torch.where(better, error, best)
            values, scales = torch.where(better, found, values), torch.where(better, s, scales)
            zeros = torch.where(better, z, zeros)
        assert best is not None
        assert values is not None
        assert scales is not None
        assert zeros is not None
        full, _ = grid.fit(low, high)
        for step in _NEIGHBOURS:  # (7 s) / 7 may miss s by a last bit: weights on a grid get the scale that made them
            s, z, found, error = _tried(rows, full + full * (step * torch.finfo(dtype).eps), low, grid, dtype)
            exact = (error == 0) & (best > 0)
            best = torch.where(exact, error, best)
            values, scales = torch.where(exact, found, values), torch.where(exact, s, scales)
            zeros = torch.where(exact, z, zeros)
        return values, scales, zeros


def _tried(
    rows: Tensor, scale: Tensor, low: Tensor, grid: Grid, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale as it is stored, zero-point, values, and squared error of the stored values, of one candidate."""
    s = scale.to(dtype).to(rows.dtype)
    s = torch.where(s > 0, s, torch.ones_like(s))
    z = grid.zero_point(low, s) if grid.asymmetric else torch.zeros_like(s)
    found = round_to_grid(rows, s, z, grid)
    return s, z, found, (found.to(dtype) - rows).double().square().sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantized weight: what is stored, and what it means.

    Attributes:
        precision: the precision.
        weight: the original, for shape and dtype.
        rows: (S, n) the original, a row a scale.
        rounded: (S, n) the values after rounding.
        scales: (S, 1) scales, or None.
        zeros: (S, 1) integer zero-points, or None.
        grid: the values of the format, or None for casts and block formats.
    """

    precision: Precision
    weight: Tensor
    rows: Tensor
    rounded: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    grid: Grid | None

    def values(self) -> Tensor:
        """The dequantized weight, laid out as the original."""
        outputs = self.weight.shape[0] if self.weight.ndim > 1 else 1
        flat = self.rounded.reshape(outputs, -1)[:, : self.weight.numel() // outputs]
        return flat.reshape(self.weight.shape).to(self.weight.dtype)

    def pack(self) -> "Packed":
        """The stored bytes of an integer format: codes in a row, lowest bit first, then scales and zero-points.

        Raises:
            EstimatorError: for a format without integer codes.
        """
        if self.grid is None or self.scales is None or not self.precision.weight.isdecimal():
            raise EstimatorError(f"only integer formats are packed here, not {self.precision.weight}")
        bits = self.precision.weight_bits
        zeros = self.zeros if self.zeros is not None else torch.zeros_like(self.scales)
        codes = (self.rounded / self.scales + zeros).round().long()
        if self.zeros is None:
            codes = codes + (1 << (bits - 1)) if bits > 1 else (codes + 1) // 2
        outputs = self.weight.shape[0] if self.weight.ndim > 1 else 1
        stored = codes.reshape(outputs, -1)[:, : self.weight.numel() // outputs].reshape(-1)  # padding is not stored
        points = None if self.zeros is None else _pack_bits(self.zeros.reshape(-1).long(), bits)
        return Packed(_pack_bits(stored, bits), self.scales.to(self.weight.dtype), points)


@dataclass(frozen=True, eq=False)
class Packed:
    """The bytes of a quantized weight: the truth that `memory_bytes` is held against.

    Attributes:
        codes: bit-packed codes.
        scales: in the dtype of the weight.
        zero_points: bit-packed zero-points, or None.
    """

    codes: bytes
    scales: Tensor
    zero_points: bytes | None

    @property
    def nbytes(self) -> int:
        """All of it."""
        return len(self.codes) + self.scales.numel() * self.scales.element_size() + len(self.zero_points or b"")

    def unpack(self, bits: int, shape: tuple[int, ...], group_size: int | None = None) -> Tensor:
        """The dequantized weight from the bytes alone.

        Args:
            bits: of a code.
            shape: of the weight.
            group_size: of the scales.
        """
        count = math.prod(shape)
        codes = _unpack_bits(self.codes, bits, count).to(self.scales.device)
        outputs = shape[0] if len(shape) > 1 else 1
        inner = count // outputs
        size = group_size or (count // self.scales.numel())
        row = torch.arange(inner, device=codes.device) // size if group_size else torch.zeros(inner, dtype=torch.long)
        per_output = -(-inner // group_size) if group_size else (1 if self.scales.numel() > 1 else 0)
        index = (torch.arange(outputs)[:, None] * per_output + row).reshape(-1)
        scales = self.scales.reshape(-1).float() if self.scales.element_size() == 2 else self.scales.reshape(-1)
        if self.zero_points is not None:
            zeros = _unpack_bits(self.zero_points, bits, scales.numel()).to(scales.dtype)[index]
            levels = codes - zeros
        else:
            levels = (codes - (1 << (bits - 1)) if bits > 1 else 2 * codes - 1).to(scales.dtype)
        return (levels * scales[index]).reshape(shape).to(self.scales.dtype)


def packed_bytes(numel: int, outputs: int, dtype_bytes: int, precision: Precision, quantizer: object) -> int:
    """Bytes of a packed weight, from numbers alone: codes padded to whole bytes, scales, zero-points.

    Args:
        numel: weights.
        outputs: output channels.
        dtype_bytes: of the unquantized weight, and of a scale.
        precision: its format and group size.
        quantizer: tells symmetric and granularity, where it is a `RoundToNearest`; else symmetric, per channel.

    >>> packed_bytes(1000, 10, 2, Precision.parse("w4g128"), RoundToNearest())   # 500 of codes, 10 scales of 2
    520
    """
    name = precision.weight
    if not precision.quantizes_weight:
        return numel * dtype_bytes
    if name in ("bf16", "fp16", "fp32"):
        return numel * format_bits(name) // 8
    symmetric = getattr(quantizer, "symmetric", True)
    size = precision.group_size or block_size(name)
    if size is not None:
        scales = outputs * -(-(numel // outputs) // size)
    else:
        scales = outputs if getattr(quantizer, "granularity", "channel") == "channel" else 1
    codes = -(-numel * format_bits(name) // 8)
    if block_size(name) is not None and name != "nf4":
        return codes + scales + (4 if name == "nvfp4" else 0)  # one byte a block; a float32 for the tensor
    points = -(-scales * zero_point_bits(name, symmetric) // 8)
    return codes + scales * dtype_bytes + points


def _pack_bits(values: Tensor, bits: int) -> bytes:
    shifts = torch.arange(bits)
    stream = ((values.cpu()[:, None] >> shifts) & 1).reshape(-1).to(torch.uint8)
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    return bytes((stream << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8).tolist())


def _unpack_bits(data: bytes, bits: int, count: int) -> Tensor:
    stream = torch.tensor(list(data), dtype=torch.long)
    flat = ((stream[:, None] >> torch.arange(8)) & 1).reshape(-1)[: count * bits].reshape(count, bits)
    return (flat << torch.arange(bits)).sum(1)
