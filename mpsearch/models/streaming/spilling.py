"""Tensors that are held for a while: in memory as far as there is room, beyond it in a file that nobody else sees."""

import contextlib
import os
import tempfile
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import IO

import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.models.streaming.stored import bytes_of


@dataclass(frozen=True, eq=False)
class _OnDisk:
    offset_bytes: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class Spill:
    """Tensors by a key, which come back bit for bit.

    Room on disk is used again for tensors of the same size. The file is in the folder for temporary files (`TMPDIR`), has no name, and
    is gone with the process whatever ends it.

    Attributes:
        room_bytes: of memory.
        disk_bytes: size of the file.

    >>> with spilled(room_bytes=0) as held:
    ...     held["h"] = torch.tensor([1.5, 2.5])
    ...     held["h"].tolist(), held.disk_bytes
    ([1.5, 2.5], 8)
    """

    room_bytes: int
    disk_bytes: int = 0
    _held: dict[Hashable, Tensor | _OnDisk] = field(default_factory=dict)
    _held_bytes: int = 0
    _free: dict[int, list[int]] = field(default_factory=dict)  # size -> offsets
    _file: IO[bytes] | None = None

    def __setitem__(self, key: Hashable, value: Tensor) -> None:
        self.pop(key)
        value = value.detach()
        if self._held_bytes + value.nbytes <= self.room_bytes:
            self._held[key] = value
            self._held_bytes += value.nbytes
        else:
            self._held[key] = self._written(value)

    def __getitem__(self, key: Hashable) -> Tensor:
        value = self._held[key]
        return value if isinstance(value, Tensor) else self._read(value)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def pop(self, key: Hashable) -> None:
        """Forget a tensor, if it is held."""
        value = self._held.pop(key, None)
        if isinstance(value, Tensor):
            self._held_bytes -= value.nbytes
        elif value is not None:
            self._free.setdefault(_size(value), []).append(value.offset_bytes)

    def close(self) -> None:
        """Forget all."""
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def _written(self, value: Tensor) -> _OnDisk:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 closed by `close`
        raw = value.contiguous().cpu().reshape(-1).view(torch.uint8)
        free = self._free.get(raw.numel())
        offset = free.pop() if free else self.disk_bytes
        try:
            view, done = bytes_of(raw), 0
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], offset + done)
        except OSError as error:
            raise EstimatorError(
                f"{tempfile.gettempdir()} has no room for {raw.numel()} bytes more beside {self.disk_bytes}: {error.strerror}; set TMPDIR "
                "to a folder with more, or take fewer tokens"
            ) from None
        self.disk_bytes = max(self.disk_bytes, offset + raw.numel())
        return _OnDisk(offset, value.shape, value.dtype, value.device)

    def _read(self, value: _OnDisk) -> Tensor:
        assert self._file is not None
        raw = torch.empty(_size(value), dtype=torch.uint8)
        view, done = bytes_of(raw), 0
        while done < len(view):
            done += os.preadv(self._file.fileno(), [view[done:]], value.offset_bytes + done)
        return raw.view(value.dtype).reshape(value.shape).to(value.device)


def _size(value: _OnDisk) -> int:
    return value.shape.numel() * value.dtype.itemsize


@contextlib.contextmanager
def spilled(room_bytes: int) -> Iterator[Spill]:
    """A `Spill` that is closed at the end."""
    spill = Spill(room_bytes)
    try:
        yield spill
    finally:
        spill.close()
