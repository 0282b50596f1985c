"""The memory that is free for a piece of work."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mpsearch.core import amounts

#: Where the kernel tells; another folder in tests.
_ROOT = Path("/")
_CPU = torch.device("cpu")


@dataclass(frozen=True, order=True)
class FreeMemory:
    """What can still be taken.

    Attributes:
        bytes: so much.
        by: who says so.
    """

    bytes: int
    by: str


def free_memory(device: torch.device, root: Path = _ROOT) -> FreeMemory | None:
    """The least of all limits that hold for this process; None where the system tells none.

    Of the CPU: what the machine has available, its control groups (version 1 and 2) and those above them, and the limits of the process on
    address space and data. Of a GPU: what the driver has, and PyTorch's allocator keeps without use.

    Args:
        device: whose memory.
        root: folder that `proc` and `sys` are in.

    >>> free_memory(torch.device("meta")) is None
    True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return FreeMemory(
            free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), f"free on {device}"
        )
    if device.type != "cpu":
        return None
    return min((*_of_machine(root), *_of_groups(root), *_of_process(root)), default=None)


def room(
    written: float | str | None, device: torch.device = _CPU, held_bytes: int = 0, root: Path = _ROOT
) -> FreeMemory | None:
    """What a piece of work may hold; None where there is no limit.

    Args:
        written: a limit that was given, such as `8GB`, or `50%` of what it may hold without one; None: all that is free.
        device: whose memory.
        held_bytes: what it holds already, which counts.
        root: folder that `proc` and `sys` are in.

    Raises:
        BudgetError: for a limit that is no amount.

    >>> room("1.5 GB")
    FreeMemory(bytes=1500000000, by='the limit that was given')
    """
    free = free_memory(device, root)
    whole = None if free is None else FreeMemory(free.bytes + held_bytes, free.by)
    if written is None:
        return whole
    limit = amounts.parse("memory_bytes", written, None if whole is None else whole.bytes)
    return FreeMemory(int(limit), "the limit that was given")


def _of_machine(root: Path) -> Iterator[FreeMemory]:
    sizes = _kilobytes(root / "proc/meminfo")
    if "MemAvailable" in sizes:
        yield FreeMemory(sizes["MemAvailable"], "free on the machine")


def _of_groups(root: Path) -> Iterator[FreeMemory]:
    """Each control group that the process is in, and those above it; what the kernel can drop of files counts as free."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, used, dropped = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            dropped = "total_inactive_file"
        else:
            continue
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            most, now = (next(iter(_lines(folder / name)), "") for name in (limit, used))
            if most.isdecimal() and now.isdecimal() and int(most) < 2**60:  # version 1 writes a large number for none
                spare = [
                    int(line.split()[1]) for line in _lines(folder / "memory.stat") if line.startswith(f"{dropped} ")
                ]
                yield FreeMemory(
                    max(int(most) - int(now) + sum(spare), 0), f"left of the limit of the control group {path}"
                )
            if folder == top:
                break


def _of_process(root: Path) -> Iterator[FreeMemory]:
    try:
        import resource
    except ImportError:  # not on Windows
        return
    used = _kilobytes(root / "proc/self/status")
    limits = (("VmSize", resource.RLIMIT_AS, "RLIMIT_AS"), ("VmData", resource.RLIMIT_DATA, "RLIMIT_DATA"))
    for field, number, name in limits:
        most, _ = resource.getrlimit(number)
        if most != resource.RLIM_INFINITY and field in used:
            yield FreeMemory(max(most - used[field], 0), f"left of the limit {name} of the process")


def _kilobytes(path: Path) -> dict[str, int]:
    """Field -> bytes of a file of lines such as `VmSize: 12 kB`."""
    words = (line.split() for line in _lines(path))
    return {line[0].rstrip(":"): 1024 * int(line[1]) for line in words if len(line) == 3 and line[2] == "kB"}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []


def out_of_memory(error: BaseException | None) -> bool:
    """True for an error of an allocator, or one that was raised from it: torch's of a GPU, its plain `RuntimeError` of the CPU, Python's.

    >>> out_of_memory(MemoryError()), out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), out_of_memory(KeyError())
    (True, True, False)
    """
    while error is not None:
        words = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "out of memory")
        plain = isinstance(error, RuntimeError | OSError) and any(word in str(error) for word in words)
        if plain or isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
