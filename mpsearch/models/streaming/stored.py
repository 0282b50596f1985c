"""Tensors that lie outside of the model, and the reading of them."""

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mpsearch.errors import EstimatorError

#: Names of dtypes in the header of a safetensors file.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Stored(Protocol):
    """A tensor outside of the model."""

    @property
    def place(self) -> tuple[Any, ...]:
        """Where it lies: equal for tied weights, and different once a file has been written to."""
        ...

    def values(self) -> Tensor:
        """The tensor, on the CPU. What comes from a file is a new one, of its own memory."""
        ...

    def rows(self, start: int, stop: int) -> "Stored":
        """The part between two indices of the first dimension, which alone is read."""
        ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor in memory, as `accelerate.cpu_offload` holds it.

    Attributes:
        tensor: on the CPU, or on another device than the model runs on.
    """

    tensor: Tensor

    @property
    def place(self) -> tuple[Any, ...]:
        """See `Stored.place`."""
        return "memory", self.tensor.device, self.tensor.data_ptr(), tuple(self.tensor.shape)

    def values(self) -> Tensor:
        """See `Stored.values`."""
        return self.tensor.detach()

    def rows(self, start: int, stop: int) -> "InMemory":
        """See `Stored.rows`."""
        return InMemory(self.tensor[start:stop])


@dataclass(frozen=True, eq=False)
class InFile:
    """A tensor that lies in a file, row after row.

    It is read, not mapped: what is read counts as memory for as long as it is used, and a file that is larger than the address space
    that the process may take can be read all the same.

    Attributes:
        path: of the file.
        offset_bytes: where it begins.
        shape: of the tensor.
        dtype: in the file.
        wanted: the dtype that it is used in.
    """

    path: str
    offset_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    wanted: torch.dtype

    @property
    def place(self) -> tuple[Any, ...]:
        """See `Stored.place`."""
        facts = os.stat(self.path)
        return self.path, self.offset_bytes, self.shape, facts.st_size, facts.st_mtime_ns

    def values(self) -> Tensor:
        """See `Stored.values`.

        Raises:
            EstimatorError: for a file that ends too early.
        """
        count = math.prod(self.shape)
        tensor = torch.empty(count, dtype=self.dtype)
        if count:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self.offset_bytes)
                room = bytes_of(tensor)
                done = 0
                while done < len(room):  # the kernel hands out 2 GiB at a time
                    size = file.readinto(room[done:])
                    if not size:
                        raise EstimatorError(
                            f"{self.path} ends after {self.offset_bytes + done} bytes, expected {self.offset_bytes + len(room)}: "
                            "download it again"
                        )
                    done += size
        return tensor.reshape(self.shape).to(self.wanted)

    def rows(self, start: int, stop: int) -> "InFile":
        """See `Stored.rows`."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, offset_bytes=self.offset_bytes + start * row_bytes, shape=(stop - start, *self.shape[1:]))


@functools.lru_cache(maxsize=4096)
def _header(path: str, size: int, changed_ns: int) -> tuple[int, Mapping[str, Any]]:
    """Where the tensors of a safetensors file begin, and what its header tells; a file that was written to is read again."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise EstimatorError(f"{path} is no safetensors file: its header has {length} bytes, the file {size}")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise EstimatorError(f"{path} is no safetensors file: {error}") from None
    return 8 + length, {name: entry for name, entry in header.items() if name != "__metadata__"}


def tensors_in(path: str | Path) -> dict[str, InFile]:
    """The tensors of a safetensors file by name; their values are not read.

    Raises:
        EstimatorError: for a file that is none, or a dtype that torch does not have.
        OSError: where it cannot be read.
    """
    facts = os.stat(path)
    start, header = _header(str(path), facts.st_size, facts.st_mtime_ns)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise EstimatorError(f"{path}: {name} is of dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[entry["dtype"]]
        first, end = entry["data_offsets"]
        if end - first != math.prod(entry["shape"]) * dtype.itemsize or start + end > facts.st_size:
            raise EstimatorError(
                f"{path}: {name} of shape {entry['shape']} {entry['dtype']} takes {math.prod(entry['shape']) * dtype.itemsize} bytes, "
                f"the file of {facts.st_size} bytes has {end - first} for it from {start + first} on: download it again"
            )
        tensors[name] = InFile(str(path), start + first, tuple(entry["shape"]), dtype, dtype)
    return tensors


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)
