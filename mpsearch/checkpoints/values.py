"""Values of finished work as bytes and back, bit for bit: text that describes the structure, then the numbers of tensors and arrays."""

import dataclasses
import hashlib
import json
import math
import struct
import types
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

V = TypeVar("V")

#: Name in the text -> type of the numbers of a tensor.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
    )
}
_LENGTH = struct.Struct("<Q")


def pack(value: Any) -> bytes:
    """A value as bytes.

    Text describes the structure, and the numbers of tensors and arrays follow it as they lie in memory; nothing of it is ever run.

    Args:
        value: None, numbers, text, bytes, tensors, arrays, and lists, tuples and dicts of them.

    Raises:
        TypeError: for anything else, with its type.

    >>> unpack(pack({"sums": (1.5, -0.0), 2: None}))
    {'sums': (1.5, -0.0), 2: None}
    """
    blobs: list[bytes] = []
    text = json.dumps(_described(value, blobs), separators=(",", ":")).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *blobs])


def unpack(data: bytes) -> Any:
    """What `pack` was given.

    Raises:
        ValueError: for bytes that `pack` did not make.
    """
    try:
        (size,) = _LENGTH.unpack_from(data)
        start = _LENGTH.size + size
        described = json.loads(data[_LENGTH.size : start])
        blobs = _Blobs(memoryview(data)[start:])
        value = _value(described, blobs)
    except ValueError as error:
        raise ValueError(f"not a packed value: {error}") from None
    except (struct.error, TypeError, LookupError, RecursionError, RuntimeError) as error:
        raise ValueError(f"not a packed value: {type(error).__name__}") from None
    if blobs.position != len(blobs.data):
        raise ValueError("not a packed value: bytes left over")
    return value


def _described(value: Any, blobs: list[bytes]) -> Any:
    """A value as JSON; what JSON does not tell apart is an object of one entry, named for the type."""
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, float) and not isinstance(value, np.generic):
        return float(value) if math.isfinite(value) else {"float": struct.pack("<d", value).hex()}
    if type(value) is list:
        return [_described(item, blobs) for item in value]
    if type(value) is tuple:
        return {"tuple": [_described(item, blobs) for item in value]}
    if type(value) is dict:
        return {"dict": [[_described(name, blobs), _described(item, blobs)] for name, item in value.items()]}
    if type(value) is bytes:
        blobs.append(value)
        return {"bytes": len(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        blobs.append(value.tobytes())
        return {"array": [value.dtype.str, list(value.shape)]}
    if isinstance(value, Tensor) and value.layout is torch.strided and value.dtype in _DTYPES.values():
        order = _order(value)
        plain = value.detach().permute(order).contiguous().cpu()
        blobs.append(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        name = str(value.dtype).removeprefix("torch.")
        return {"tensor": [name, list(plain.shape), order, str(value.device)]}
    raise TypeError(f"a {type(value).__name__} cannot be stored: expected numbers, text, tensors, arrays, lists, dicts")


def _order(tensor: Tensor) -> list[int]:
    """Dimensions as they lie in memory, the widest step first: sums over a tensor that comes back take the same order."""
    steps = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda dim: -steps[dim])


class _Blobs:
    """The bytes behind the text, taken one after another."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> bytearray:
        if not 0 <= size <= len(self.data) - self.position:
            raise ValueError("too short")
        self.position += size
        return bytearray(self.data[self.position - size : self.position])


def _value(described: Any, blobs: _Blobs) -> Any:
    if isinstance(described, list):
        return [_value(item, blobs) for item in described]
    if not isinstance(described, dict):
        return described
    ((kind, content),) = described.items()
    if kind == "float":
        return struct.unpack("<d", bytes.fromhex(content))[0]
    if kind == "tuple":
        return tuple(_value(item, blobs) for item in content)
    if kind == "dict":
        return {_value(name, blobs): _value(item, blobs) for name, item in content}
    if kind == "bytes":
        return bytes(blobs.take(content))
    if kind == "array":
        dtype, shape = np.dtype(content[0]), _sizes(content[1])
        if dtype.kind not in "biufc":
            raise ValueError("no numbers")
        return np.frombuffer(blobs.take(dtype.itemsize * math.prod(shape)), dtype).reshape(shape)
    if kind == "tensor":
        dtype_, shape, order, device = _DTYPES[content[0]], _sizes(content[1]), content[2], content[3]
        data = blobs.take(dtype_.itemsize * math.prod(shape))
        plain = torch.frombuffer(data, dtype=dtype_) if data else torch.empty(0, dtype=dtype_)
        back = sorted(range(len(shape)), key=order.__getitem__)
        return _on(plain.reshape(shape).permute(back), device)
    raise ValueError("unknown kind")


def _on(tensor: Tensor, device: str) -> Tensor:
    if device == "cpu":
        return tensor
    try:
        return tensor.to(device)
    except (RuntimeError, ImportError, AssertionError):  # torch without support for it asserts
        raise ValueError(f"its tensors belong on {device!r}, which this machine does not have") from None


def _sizes(shape: Any) -> list[int]:
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("no shape")
    return list(shape)


def checksum(name: str, data: bytes) -> bytes:
    """16 bytes that tell whether packed data is what was stored under a name."""
    return hashlib.blake2b(name.encode() + b"\0" + data, digest_size=16).digest()


def plain(value: Any) -> Any:
    """A record (a dataclass) as a dict of its fields; other values as they are."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return value


def typed(value: Any, kind: type[V]) -> V:
    """A value as the type that it was stored as; of a dict of fields the record.

    Raises:
        TypeError: where it is of another type, with the place.

    >>> typed([1.0, 2.0], list[float])
    [1.0, 2.0]
    >>> typed([1.0, "2"], list[float])
    Traceback (most recent call last):
    TypeError: $[1] is '2', expected a float
    """
    return cast(V, _typed(value, kind, "$"))


def _typed(value: Any, kind: Any, place: str) -> Any:
    if kind is Any:
        return value
    container, parts = get_origin(kind), get_args(kind)
    if container in (Union, types.UnionType):
        return value if value is None else _typed(value, next(part for part in parts if part is not type(None)), place)
    if container is list and type(value) is list:
        return [_typed(item, parts[0], f"{place}[{i}]") for i, item in enumerate(value)]
    if container is tuple and type(value) is tuple and len(value) == len(parts):
        return tuple(_typed(item, parts[i], f"{place}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        if type(value) is dict and value.keys() == hints.keys():
            return kind(**{name: _typed(value[name], hints[name], f"{place}.{name}") for name in hints})  # type: ignore[operator]
    elif container is None and (isinstance(value, kind) if kind is Tensor else type(value) is kind):
        return value
    if kind is float and type(value) is int:  # as for type checkers
        return value
    shown = f"{str(value)[:40]!r}" if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    raise TypeError(f"{place} is {shown}, expected a {kind.__name__ if container is None else kind}")
