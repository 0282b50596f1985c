"""The most memory that a piece of work takes."""

import contextlib
import gc
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


@dataclass
class PeakMemory:
    """Filled when the work is over.

    Attributes:
        bytes: growth of the peak above what was in use at the start; None where the system does not tell.
    """

    bytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Watch the memory of a device: PyTorch's allocator on CUDA, the resident set of the process on Linux.

    The resident set counts in pages and includes what an allocator keeps for later: an upper bound for large work, noise
    for small work.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        try:
            yield peak
        finally:
            peak.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    before = _resident("VmRSS") if _reset() else None
    try:
        yield peak
    finally:
        after = _resident("VmHWM")
        if before is not None and after is not None:
            peak.bytes = max(after - before, 0)


def _reset() -> bool:
    """Set the peak back to the present size; possible on Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith(field + ":")]
    return 1024 * int(sizes[0]) if sizes else None


@dataclass
class LiveBytes:
    """What the tensors hold that were made since the start.

    Attributes:
        bytes: the most at one time.
        now: at present.
    """

    bytes: int = 0
    now: int = 0


@contextlib.contextmanager
def live_bytes(lived: Iterable[Tensor] | None = None) -> Iterator[LiveBytes]:
    """Count the bytes of all tensors that are made inside and alive together, on any device: the same number in every run.

    A storage counts once, from the operation that makes it until it is freed, saved for a backward pass or not; views cost nothing.
    What is read from a file or laid over an array of numpy counts too, from the first operation on it. Arrays themselves, and what a
    kernel allocates and frees within one operation, are not seen. Costs some microseconds an operation: for tests and single batches.

    Args:
        lived: tensors made before, which do not count; by default all that Python holds, which takes some tenths of a second to find.

    >>> with live_bytes() as peak:
    ...     ones = torch.ones(1000)                         # 4 bytes each
    ...     total = (ones * 2).view(10, 100).sum(dim=1)     # 4000 more, gone after the sum
    >>> peak.bytes, peak.now
    (8040, 4040)
    """
    peak = LiveBytes()
    if lived is None:
        gc.collect()
        lived = _tensors()
    with _Counting(peak, lived):
        yield peak


class _Counting(TorchDispatchMode):
    """Sees every operation, and in finalizers of storages when they are freed."""

    def __init__(self, peak: LiveBytes, lived: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._peak = peak
        self._known = {
            tensor.untyped_storage()._cdata
            for tensor in lived
            if not torch.nn.parameter.is_lazy(tensor) and tensor.layout is torch.strided
        }

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs))
        result = function(*args, **(kwargs or {}))
        self._see(result)
        return result

    def _see(self, values: Any) -> None:
        for value in tree_iter(values):
            if isinstance(value, Tensor) and value.layout is torch.strided:
                storage = value.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    size_bytes = 0 if value.is_meta else storage.nbytes()
                    weakref.finalize(storage, self._free, storage._cdata, size_bytes).atexit = False
                    self._peak.now += size_bytes
        self._peak.bytes = max(self._peak.bytes, self._peak.now)

    def _free(self, storage: int, size_bytes: int) -> None:
        self._known.discard(storage)
        self._peak.now -= size_bytes


def _tensors() -> Iterator[Tensor]:
    """All plain tensors that Python holds; asked for their type alone, since proxies act when they are asked for more."""
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            yield thing
