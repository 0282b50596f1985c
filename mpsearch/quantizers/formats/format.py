"""What every number format offers: a grid of values, or blocks with scales of their own."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from mpsearch.core.formats import NumberFormat


@dataclass(frozen=True)
class Grid(ABC):
    """The values of a format before scaling.

    Attributes:
        bits: of a code.
        low: least code of an integer, or least value.
        high: greatest.
    """

    #: With a zero-point.
    asymmetric: ClassVar[bool] = False
    #: The highest bit of a code is the sign of its value.
    signed_magnitude: ClassVar[bool] = False
    #: Scales below that of the largest value may be better; False where the format defines its scale by that value.
    searched: ClassVar[bool] = True
    #: A code of no value, with which packed weights mark the -0 that rounding leaves; None where -0 has a code or never comes up.
    negative_zero: ClassVar[int | None] = None

    bits: int
    low: float
    high: float

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero-point that cover a range; a range of nothing gets scale 1."""
        scale = torch.maximum(low.abs(), high.abs()) / self.high
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, torch.zeros_like(scale)

    def zero_point(self, low: Tensor, scale: Tensor) -> Tensor:
        """The integer code of 0; 0 on a symmetric grid."""
        del low
        return torch.zeros_like(scale)

    @abstractmethod
    def round(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest value under a scale, saturating: s (clip(round(x / s) + z) - z) for integers."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """The stored code, int64 from 0, of values of the grid (with a zero-point: of the code itself)."""

    @abstractmethod
    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of codes; see `encode`."""

    def codes(self) -> Tensor:
        """Every code that stands for a finite value, in order."""
        return torch.arange(1 << self.bits)

    def values(self) -> Tensor:
        """The values of `codes`, float64."""
        return self.decode(self.codes(), torch.float64)


#: Scales and zero-points, each (S, 1), of the rows (S, n) of a weight on a grid.
Fit = Callable[[Tensor, Grid], tuple[Tensor, Tensor]]


class StoredScales(NamedTuple):
    """What is stored of some rows beside the codes of their values.

    Attributes:
        scales: (S, 1) scales of the grid, or a byte a block; None for casts and GGUF types.
        zeros: (S, 1) integer zero-points, or None.
        tensor_scale: (1,) NVFP4's second scale, or None.
        blocks: (S, bytes) whole blocks of a GGUF type, or None.
    """

    scales: Tensor | None = None
    zeros: Tensor | None = None
    tensor_scale: Tensor | None = None
    blocks: Tensor | None = None


@dataclass(frozen=True)
class Format(ABC):
    """A number format: its facts, and the program that rounds tensors to it.

    Attributes:
        facts: name, bits, blocks, stored scales and the number that hardware tables use.
    """

    facts: NumberFormat

    @property
    def name(self) -> str:
        """As it is written in a precision."""
        return self.facts.name

    @property
    def bits(self) -> int:
        """Nominal bits of an element."""
        return self.facts.bits

    def grid(self, symmetric: bool = True) -> Grid | None:
        """The values of an element before scaling; None where they are not listed (casts, GGUF types).

        Args:
            symmetric: without a zero-point; minifloats, codebooks and blocks have none in either case.
        """
        del symmetric
        return None

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Codes of values: of a grid's values, before scaling, int64; of a cast, the bits; of (S, block) weights, whole GGUF blocks."""

    @abstractmethod
    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of codes; see `encode`."""

    @abstractmethod
    def round_rows(self, rows: Tensor, out: Tensor, fit: Fit, symmetric: bool, largest: Tensor) -> StoredScales:
        """Round rows that share a scale each.

        Args:
            rows: (S, n), cut in blocks where the format has them.
            out: (S, n), takes the values after quantization and back.
            fit: gives scales where the format leaves them open.
            symmetric: no zero-points.
            largest: max|w| of the tensor that these rows are a part of.
        """

    @abstractmethod
    def round_inputs(self, rows: Tensor, fit: Fit) -> Tensor:
        """Inputs under scales that are taken on the spot: of blocks, or of each row.

        Args:
            rows: (N, K), a token a row; blocks lie along the channels.
            fit: gives the scales of blocks where the format leaves them open.

        Returns:
            (N, K) after quantization and back.
        """

    def steps(self, scales: Tensor, tensor_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What the values of the grid are multiplied by, from the stored scales.

        Args:
            scales: (S, 1) as they are stored.
            tensor_scale: (1,) NVFP4's second scale, or None.
            dtype: to compute in.

        Returns:
            (S, 1).
        """
        del tensor_scale, dtype
        return scales


def wide(x: Tensor) -> Tensor:
    """In float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_blocks(flat: Tensor, size: int) -> Tensor:
    """(N, K) cut into rows of `size`, the last ones filled up with zeros."""
    short = -flat.shape[1] % size
    return (torch.nn.functional.pad(flat, (0, short)) if short else flat).reshape(-1, size)


#: Elements worked on at once: few enough for the cache of a processor, enough to fill a graphics card.
CHUNK = {"cpu": 1 << 17}
CHUNK_ELSEWHERE = 1 << 23


def pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """(S, n) cut along long rows, so that little is held beside them."""
    parts: tuple[Tensor, ...] = rows.split(CHUNK.get(rows.device.type, CHUNK_ELSEWHERE), dim=1)
    return parts


def nearest_places(x: Tensor, values: tuple[float, ...]) -> Tensor:
    """Index of the nearest of sorted values; the lower one of two that are equally near."""
    levels = torch.tensor(values, dtype=x.dtype, device=x.device)
    return torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
