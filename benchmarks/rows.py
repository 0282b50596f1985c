"""A row of a benchmark in a process of its own: its peak memory and time, kept as a file as soon as it is finished."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpsearch.files.writing import write_atomically

STATUS = Path("/proc/self/status")
#: Seconds between two looks at the anonymous memory.
INTERVAL_S = 0.01


def memory_bytes() -> dict[str, int]:
    """What the system tells of this process: `VmRSS`, `VmHWM`, `RssAnon`, `VmData`, ..."""
    found = re.findall(r"^((?:Vm|Rss)\w+):\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return {name: int(value) * 1024 for name, value in found}


@dataclass
class Usage:
    """What a piece of work took; filled when it ends.

    Attributes:
        seconds: wall time.
        cpu_seconds: of all threads.
        peak_bytes: most resident memory above that of the interpreter with all that is imported, pages of mapped files counted.
        peak_anonymous_bytes: the same without pages of files, which the system can drop; looked at every 10 ms.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    peak_anonymous_bytes: int = 0
    before: Mapping[str, int] = field(default_factory=dict)


@contextmanager
def measured(limit_bytes: int | None = None) -> Iterator[Usage]:
    """Count what the work inside takes above a warm interpreter.

    Args:
        limit_bytes: of private memory (`RLIMIT_DATA`: heap and anonymous mappings; shards that are mapped read-only do not count) above
            what the process holds at this point; past it, allocations fail. It stays for the rest of the process.
    """
    warm_up()
    usage = Usage(before=memory_bytes())
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    if limit_bytes is not None:
        room = usage.before["VmData"] + limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (room, room))
    done = threading.Event()

    def look() -> None:
        now = memory_bytes()  # mpsearch takes peaks of its own, and has the system forget VmHWM for that
        usage.peak_bytes = max(usage.peak_bytes, now["VmHWM"] - usage.before["VmRSS"])
        usage.peak_anonymous_bytes = max(usage.peak_anonymous_bytes, now["RssAnon"] - usage.before["RssAnon"])

    def watch() -> None:
        while not done.wait(INTERVAL_S):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        yield usage
    finally:
        usage.seconds, usage.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        done.set()
        watcher.join()
        look()


def warm_up() -> None:
    """Make torch load what it loads at first use, so that it counts as its own memory."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(64, 64, dtype=dtype)
        layer(torch.ones(64, 64, dtype=dtype)).sum().backward()


def end_rows_too() -> None:
    """Make a benchmark that is asked to end (SIGTERM) end the row that it runs."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def run(script: str, arguments: Sequence[Any], out: Path, seconds: float | None = None) -> str | None:
    """Run a row as `python SCRIPT ARGUMENTS`, which writes `out`; nothing where it is there already.

    Args:
        script: file of the benchmark.
        arguments: of the row.
        out: what the row writes, whole or not at all.
        seconds: that it may take; it is ended then.

    Returns:
        None, or in a line why there is no result.
    """
    if out.exists():
        return None
    command = [sys.executable, script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return f"not done in {seconds:.0f} s"
    if done.returncode or not out.exists():
        last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["no word of why"]
        return f"exit status {done.returncode}: {last[0].strip()}"
    return None


def keep(out: Path, row: Mapping[str, Any]) -> None:
    """Write a row as JSON, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(row, indent=1) + "\n")


def kept(out: Path) -> dict[str, Any] | None:
    """A row that was written before; None where there is none."""
    return json.loads(out.read_text()) if out.exists() else None
