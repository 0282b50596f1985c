"""What a piece of work will take, told before it starts."""

from collections.abc import Mapping
from dataclasses import dataclass

from mpsearch.core import amounts, printing


@dataclass(frozen=True)
class Forecast:
    """What a piece of work will take, at most as far as it can be told; None where it cannot.

    Attributes:
        forward: forward passes, each over all batches.
        backward: backward passes, each over all batches.
        readings: of an offloaded model, how often all its weights are read.
        seconds: from one timed batch, and one weight that was rounded.
        memory_bytes: the most that the work holds at one time, the weights that lie in memory included.
        memory: what holds it: the weights, one batch, ...; adds up to `memory_bytes`.
        disk_bytes: temporary files and checkpoint.

    >>> print(Forecast(8, 2, seconds=75, memory={"weights": 2_000_000_000, "one batch": 400_000_000}, disk_bytes=0))
    at most 8 forward and 2 backward passes, about 1 min, 2.40 GB of memory (weights 2.00 GB, one batch 400 MB)
    """

    forward: float | None = None
    backward: float | None = None
    readings: float | None = None
    seconds: float | None = None
    memory: Mapping[str, int] | None = None
    disk_bytes: int | None = None

    @property
    def memory_bytes(self) -> int | None:
        """See above."""
        return None if self.memory is None else sum(self.memory.values())

    @property
    def memory_text(self) -> str:
        """What takes the memory, the largest first.

        >>> Forecast(memory={"one batch": 5, "weights": 1000, "rounding": 0}).memory_text
        'weights 1.00 kB, one batch 5.00 B'
        """
        parts = sorted((self.memory or {}).items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {amounts.text('memory_bytes', size)}" for name, size in parts if size)

    def __str__(self) -> str:
        told = []
        if self.forward is not None:
            told.append(f"at most {printing.passes(self.forward, self.backward or 0.0)}")
        if self.readings is not None:
            told.append(f"{self.readings:.4g} readings of the weights")
        if self.seconds is not None:
            told.append(f"about {duration(self.seconds)}")
        if self.memory_bytes is not None:
            told.append(f"{amounts.text('memory_bytes', self.memory_bytes)} of memory ({self.memory_text})")
        if self.disk_bytes:
            told.append(f"{amounts.text('memory_bytes', self.disk_bytes)} of disk")
        return ", ".join(told) or "nothing can be told before the work"


def duration(seconds: float) -> str:
    """A time for a person, who plans with it.

    >>> [duration(seconds) for seconds in (0.02, 12.3, 75, 3 * 3600 + 60, 50 * 3600)]
    ['less than 1 s', '12 s', '1 min', '3 h', '2 days']
    """
    if seconds < 1:
        return "less than 1 s"
    for unit, size, least in (("s", 1, 60), ("min", 60, 90), ("h", 3600, 48)):
        if seconds < least * size:
            return f"{round(seconds / size)} {unit}"
    return f"{round(seconds / 86400)} days"
