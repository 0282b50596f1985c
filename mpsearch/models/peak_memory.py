"""The most memory that a piece of work takes."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch


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
