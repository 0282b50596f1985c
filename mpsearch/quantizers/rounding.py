"""The reference quantizers: round to nearest, with scales by largest value or by least squared error."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from mpsearch.core.formats import number_format
from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers.formats import Grid, format_named, grid_of
from mpsearch.quantizers.formats.format import CHUNK, CHUNK_ELSEWHERE, in_blocks, pieces, wide
from mpsearch.quantizers.packing import Codes, group_of, packed_bytes

#: Shrink factors of the largest value that the search for the scale tries; 1 first, so that ties keep the full range.
_FACTORS = tuple(1 - 0.01 * step for step in range(80))
#: Distances from the full-range scale, in machine epsilons, at which the scale of weights on a grid may lie.
_NEIGHBOURS = (0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 2.0, -2.0)
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
        return self.encoded(weight, precision).values()

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @property
    def bytes_from(self) -> Literal["packed"]:
        """Bytes are those of packed codes and scales."""
        return "packed"

    @property
    def needs_data(self) -> bool:
        """It looks at weights alone; ranges of inputs are handed to `activation_values`."""
        return False

    @property
    def rounding(self) -> "RoundToNearest":
        """Itself."""
        return self

    def of_layer(self, name: str) -> Self:
        """Itself: all layers are alike."""
        del name
        return self

    def calibrated(self, model: nn.Module, batches: Sequence[Any]) -> Self:
        """Itself: it needs no data."""
        del model, batches
        return self

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """Bytes of the packed weight of a layer; see `packed_bytes`."""
        outputs = layer.weight_shape[0] if len(layer.weight_shape) > 1 else 1
        return packed_bytes(layer.numel, outputs, layer.dtype_bytes, precision, self)

    def encoded(self, weight: Tensor, precision: Precision) -> Codes:
        """The weight after quantization and back, in its own dtype, with the codes and scales that it is made of; see `__call__`."""
        return self._codes(weight, precision, weight.dtype)

    def codes(self, weight: Tensor, precision: Precision) -> Codes:
        """Codes, scales and zero-points of a weight; see `__call__`."""
        return self._codes(weight, precision, torch.promote_types(weight.dtype, torch.float32))

    def _codes(self, weight: Tensor, precision: Precision, value_dtype: torch.dtype) -> Codes:
        """The same with rounded values in the dtype `value_dtype`; a part of the rows at a time, so that little is held beside them."""
        largest = _check_finite(weight)
        form, size = format_named(precision.weight), group_of(precision)
        grid = form.grid(self.symmetric)
        flat = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight.reshape(1, -1)
        if size is None and self.granularity == "tensor" and grid is not None:
            flat = flat.reshape(1, -1)
        groups = 1 if size is None else -(-flat.shape[1] // size)
        rounded = flat.new_empty((len(flat) * groups, size or flat.shape[1]), dtype=value_dtype)
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        blocks: Tensor | None = None
        if form.facts.block is not None and form.facts.block_bytes is not None:
            row_bytes = flat.shape[1] // form.facts.block * form.facts.block_bytes
            blocks = flat.new_empty((len(flat), row_bytes), dtype=torch.uint8)
        tensor_scale: Tensor | None = None
        at, step = 0, _chunk(weight) // (1 if blocks is None else 2)  # GGUF types take more beside them
        for part in flat.split(max(1, step // max(1, flat.shape[1]))) if weight.numel() else ():
            rows = part if size is None else in_blocks(wide(part), size)
            place = slice(at, at + len(rows))
            at += len(rows)
            stored = form.round_rows(rows, rounded[place], self._fit(weight.dtype), self.symmetric, largest)
            if stored.scales is not None:
                scales.append(stored.scales)
            if stored.zeros is not None:
                zeros.append(stored.zeros)
            if blocks is not None and stored.blocks is not None:
                blocks[place] = stored.blocks
            tensor_scale = stored.tensor_scale
        if weight.numel() and not torch.isfinite(torch.stack(rounded.aminmax()).to(weight.dtype)).all():
            raise EstimatorError(
                f"weights from {float(weight.min()):.3g} to {float(weight.max()):.3g} overflow: the scale or a rounded "
                f"weight is beyond the greatest number of {str(weight.dtype).removeprefix('torch.')}, "
                f"{torch.finfo(weight.dtype).max:.3g}"
            )
        return Codes(
            precision,
            weight,
            rounded,
            torch.cat(scales) if scales else None,
            torch.cat(zeros) if zeros else None,
            grid,
            tensor_scale,
            blocks,
        )

    def _fit(self, dtype: torch.dtype) -> Callable[[Tensor, Grid], tuple[Tensor, Tensor]]:
        """The search for scales that are stored in a dtype."""
        return lambda rows, grid: self._search(rows, grid, dtype)

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
        wide_x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        form = format_named(name)
        if form.facts.family == "cast" or self.scales_on_the_spot(name):
            rows = wide_x.reshape(-1, x.shape[-1])
            return form.round_inputs(rows, self._fit(rows.dtype)).reshape(x.shape).to(x.dtype)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise EstimatorError(
                "no calibrated range: no calibration batch reached the layer; give data that does, or use "
                "RoundToNearest(activation='token')"
            )
        grid = grid_of(name, symmetric=False)
        scale, zero = grid.fit(wide_x.new_tensor(low), wide_x.new_tensor(high))
        return grid.round(wide_x, scale, zero).to(x.dtype)

    def scales_on_the_spot(self, name: str) -> bool:
        """True where inputs in a format need no calibrated range.

        >>> RoundToNearest().scales_on_the_spot("8"), RoundToNearest().scales_on_the_spot("mxfp8")
        (False, True)
        """
        return self.activation == "token" or number_format(name).block is not None

    def _search(self, rows: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales as they are stored, and zero-points."""
        low, high = (wide(extreme) for extreme in rows.aminmax(dim=1, keepdim=True))
        full, _ = grid.fit(low, high)
        scales, zeros = _stored(full, low, grid, dtype)
        best = _error(rows, scales, zeros, grid, dtype)
        searched = self.scale == "mse" and grid.searched
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
    return wide(greatest)


def _chunk(weight: Tensor) -> int:
    """Elements worked on at once: what is held beside them stays small against the weight."""
    most = CHUNK.get(weight.device.type, CHUNK_ELSEWHERE)
    return max(_LEAST_CHUNK, min(most, weight.numel() * weight.element_size() // 32))


def _stored(scale: Tensor, low: Tensor, grid: Grid, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A scale as its dtype keeps it, and the zero-point under it.

    Below the normal numbers of the dtype the scale is rounded up: there the nearest number may be 0, or clip much of the range.
    """
    info = torch.finfo(dtype)
    unit = info.smallest_normal * info.eps
    scale = torch.where(scale < info.smallest_normal, (scale / unit).ceil() * unit, scale).to(dtype).to(scale.dtype)
    return scale, grid.zero_point(low, scale)


def _error(rows: Tensor, scale: Tensor, zero: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """(S, 1) squared error of the values as they are stored."""
    total = torch.zeros_like(scale, dtype=torch.float64)
    for piece in map(wide, pieces(rows)):
        gap = grid.round(piece, scale, zero).to(dtype) - piece
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
    for piece in map(wide, pieces(rows)):
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


@dataclass(frozen=True)
class RoundByLargest(RoundToNearest):
    """`RoundToNearest` with the scale of the largest value, without a search: what many kernels do on the spot.

    Attributes:
        symmetric: no zero-point.
        scale: `max`; `mse` searches all the same.
        granularity: a scale for each output channel (or group), or one for the tensor.
        activation: inputs with one calibrated range for the tensor, or one for each token, taken on the spot.

    >>> RoundByLargest()(torch.tensor([[-3.0, 1.2, 0.4]]), Precision("3"))
    tensor([[-3.,  1.,  0.]])
    """

    scale: Literal["mse", "max"] = "max"
