"""Rounded weights, each made once: the first ones as they are, the rest in a file, packed as codes where the quantizer tells them."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.models.modules.weights import canonical, restore, weight_of
from mpsearch.models.streaming.offloading import resident
from mpsearch.models.streaming.spilling import Spill
from mpsearch.models.streaming.stored import bytes_of
from mpsearch.quantizers.fake_quantization import rounded_weight
from mpsearch.quantizers.packing import Codes, Packed
from mpsearch.quantizers.quantizer import Quantizer, stored_bytes

#: Most bytes of rounded weights that are held in memory, as they are; what comes after goes to a file.
ROOM_BYTES = 64 * 2**20
#: Whole numbers as wide as those of a dtype, to compare bit for bit.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Of a code; longer ones are not told by a value in half precision any more.
_MOST_BITS = 8
_Key = tuple[nn.Parameter, str, int | None]


@dataclass(frozen=True, eq=False)
class _Packed:
    """A weight in the file as codes, with scales and zero-points where it has some."""

    precision: Precision
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    scaled: bool
    pointed: bool
    tensor_scale: Tensor | None


@dataclass(frozen=True)
class _Plain:
    """A weight in the file as it is; `order` are its dimensions as they lie in memory."""

    order: tuple[int, ...]


@dataclass(eq=False)
class RoundedWeights:
    """The rounded weights of a run, each rounded once for each precision of its own, however large the model is.

    The first ones are held in memory as they are, up to `room_bytes`. Those that come after lie in one temporary file, in the folder
    that `tempfile` chooses (`TMPDIR`): as packed codes, scales and zero-points where the quantizer tells them (`Quantizer.encoded`) and
    unpacking gives back the same bits, which is looked at for each; else as they are. The file has no name where the platform allows
    that, so nothing stays behind, whatever ends the process. Unpacking takes 1 to 3 ns a weight, rounding with a search of scales 50
    to 500.

    A weight must not change while its rounded values are here.

    Attributes:
        room_bytes: most that is held in memory.
        held_bytes: what is.

    >>> from mpsearch.quantizers.rounding import RoundToNearest
    >>> layer, store = nn.Linear(64, 4), RoundedWeights(room_bytes=0)
    >>> value = store.value(layer, "fc", Precision("4"), RoundToNearest())
    >>> store.held_bytes, store.file_bytes                    # codes of half a byte, 4 scales of 4
    (0, 144)
    >>> torch.equal(value, RoundToNearest()(layer.weight.detach(), Precision("4")))
    True
    """

    room_bytes: int = field(default_factory=lambda: ROOM_BYTES)
    held_bytes: int = 0
    _held: dict[_Key, Tensor] = field(default_factory=dict, repr=False)
    _filed: dict[_Key, _Packed | _Plain] = field(default_factory=dict, repr=False)
    _file: Spill = field(default_factory=lambda: Spill(room_bytes=0), repr=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, self._file.close)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self._file.disk_bytes

    def value(self, module: nn.Module, name: str, precision: Precision, quantizer: Quantizer) -> Tensor:
        """The rounded weight of a module, laid out as the module stores it; not to be written to.

        Args:
            module: that holds the weight, with its values the first time.
            name: of the layer.
            precision: of its weight; its input does not count.
            quantizer: the same every time.

        Raises:
            EstimatorError: where the quantizer fails, or the file cannot be written.
        """
        if not precision.quantizes_weight:
            with resident(module):
                return weight_of(module).detach()
        key = _key(module, precision)
        if key in self._held:
            return self._held[key]
        if key in self._filed:
            return self._read(module, key)
        return self._round(key, module, name, precision, quantizer)

    def holds(self, module: nn.Module, precision: Precision) -> bool:
        """True where the rounded weight lies in memory as it is.

        Args:
            module: that holds the weight.
            precision: of its weight.
        """
        return _key(module, precision) in self._held

    def prepare(self, module: nn.Module, name: str, precision: Precision, quantizer: Quantizer) -> None:
        """Round the weight of a module where that has not been done; see `value`."""
        key = _key(module, precision)
        if precision.quantizes_weight and key not in self._held and key not in self._filed:
            self._round(key, module, name, precision, quantizer)

    def close(self) -> None:
        """Forget all of them for good; the file is gone."""
        self._held.clear()
        self._filed.clear()
        self._file.close()
        self.held_bytes = 0

    def _round(self, key: _Key, module: nn.Module, name: str, precision: Precision, quantizer: Quantizer) -> Tensor:
        with resident(module):
            values, codes = rounded_weight(module, name, precision, quantizer)
            value = restore(module, values)
            if codes is None and value.data_ptr() == weight_of(module).data_ptr():  # left as it is
                return value
        if value.untyped_storage().nbytes() > value.nbytes:  # a part of something larger, such as padded groups
            value = value.contiguous()
        if self.held_bytes + value.nbytes <= self.room_bytes:
            self._held[key] = value
            self.held_bytes += value.nbytes
            return value
        packed = None if codes is None else _packed(codes, values)
        if packed is None:
            strides = value.stride()
            order = tuple(sorted(range(value.ndim), key=lambda axis: -strides[axis]))
            self._file[key] = value.permute(order)
            self._filed[key] = _Plain(order)
            return value
        self._file[key, "codes"] = torch.frombuffer(packed.codes, dtype=torch.uint8)
        if packed.scales is not None:
            self._file[key, "scales"] = packed.scales
        if packed.zero_points is not None:
            self._file[key, "zero points"] = torch.frombuffer(packed.zero_points, dtype=torch.uint8)
        self._filed[key] = _Packed(
            packed.precision,
            tuple(values.shape),
            values.dtype,
            values.device,
            packed.scales is not None,
            packed.zero_points is not None,
            packed.tensor_scale,
        )
        return value

    def _read(self, module: nn.Module, key: _Key) -> Tensor:
        place = self._filed[key]
        if isinstance(place, _Plain):
            return self._file[key].permute(sorted(range(len(place.order)), key=lambda axis: place.order[axis]))
        packed = Packed(
            place.precision,
            place.dtype,
            bytes_of(self._file[key, "codes"]),
            self._file[key, "scales"] if place.scaled else None,
            bytes_of(self._file[key, "zero points"]) if place.pointed else None,
            place.tensor_scale,
        )
        return restore(module, packed.unpack(place.shape, place.device))


def rounded_bytes(layer: Layer, precision: Precision, quantizer: Quantizer) -> int:
    """Bytes that the rounded weight of a layer takes in the file of `RoundedWeights`, where the room in memory is used up.

    Args:
        layer: with the shape and dtype of its weight.
        precision: of its weight.
        quantizer: that rounds it.

    >>> from mpsearch.quantizers.quantizer import Around
    >>> from mpsearch.quantizers.rounding import RoundToNearest
    >>> layer = Layer("fc", "linear", (8, 64), dtype="bfloat16")
    >>> rounded_bytes(layer, Precision("4"), RoundToNearest()), rounded_bytes(layer, Precision("4"), Around(RoundToNearest()))
    (272, 1024)
    """
    if not precision.quantizes_weight or layer.is_cache:
        return 0
    plain = layer.numel * layer.dtype_bytes
    row = torch.zeros(1, math.prod(layer.weight_shape[1:]))
    told = quantizer.of_layer(layer.name).encoded(row, precision)
    packed = told is not None and (told.grid is None or told.grid.bits <= _MOST_BITS)
    return min(plain, stored_bytes(quantizer, layer, precision)) if packed else plain


def memory_and_file_bytes(
    cells: Sequence[tuple[nn.Module, str, Precision]], quantizer: Quantizer, room_bytes: int | None = None
) -> tuple[int, int]:
    """Bytes that rounded weights take in memory, and in the file, at most.

    Args:
        cells: modules with their names and precisions, in the order in which they are rounded.
        quantizer: that rounds.
        room_bytes: of `RoundedWeights`; None = `ROOM_BYTES`.

    >>> from mpsearch.quantizers.rounding import RoundToNearest
    >>> cells = [(nn.Linear(64, 4), "fc", Precision("4"))] * 2
    >>> memory_and_file_bytes(cells, RoundToNearest(), room_bytes=1500)
    (1024, 144)
    """
    room = ROOM_BYTES if room_bytes is None else room_bytes
    held = filed = 0
    sizes: dict[tuple[tuple[int, ...], torch.dtype, Precision], int] = {}
    for module, name, precision in cells:
        weight = canonical(module)
        if held + weight.nbytes <= room:
            held += weight.nbytes
            continue
        key = tuple(weight.shape), weight.dtype, precision
        if key not in sizes:
            layer = Layer(name, "", key[0], dtype=str(weight.dtype).removeprefix("torch."))
            sizes[key] = rounded_bytes(layer, precision, quantizer)
        filed += sizes[key]
    return held, filed


def _key(module: nn.Module, precision: Precision) -> _Key:
    return weight_of(module), precision.weight, precision.group_size


def _packed(codes: Codes, values: Tensor) -> Packed | None:
    """The codes of a weight in bytes, where they are fewer than its own and unpacking gives back the same bits."""
    if codes.grid is not None and codes.grid.bits > _MOST_BITS:
        return None
    packed = codes.pack()
    if packed.nbytes >= values.nbytes:
        return None
    bits = _BITS[values.element_size()]
    rows = values.reshape(values.shape[0] if values.ndim > 1 else 1, -1).view(bits)
    same = all(
        torch.equal(rows[part], some.view(bits)) for part, some in packed.parts(tuple(values.shape), values.device)
    )
    return packed if same else None
