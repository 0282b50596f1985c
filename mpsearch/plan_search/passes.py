"""The passes that a search may take, and those that it has taken."""

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from mpsearch.checkpoints.keys import Key

Effort = Literal["fast", "default", "thorough"]

#: Passes of the efforts: `fast`; `default` of a small model, to which one for each cell is added, and of any model at most.
_FAST, _LEAST, _MOST = 8.0, 40.0, 120.0


def passes_of(effort: Effort, cells: int) -> float:
    """The passes that an effort may take.

    Args:
        effort: `fast`, `default`, or `thorough`, four times that.
        cells: decisions x precisions of the table.

    >>> [passes_of("default", cells) for cells in (50, 110, 1050)], passes_of("thorough", 50), passes_of("fast", 50)
    ([90.0, 120.0, 120.0], 360.0, 8.0)
    """
    default = min(_LEAST + cells, _MOST)
    return {"fast": _FAST, "default": default, "thorough": 4 * default}[effort]


@dataclass(eq=False)
class PassBudget:
    """Forward-pass equivalents of a search: what it may take, and what it has taken.

    Attributes:
        limit: passes over all parts of the data; a backward pass counts 2.
        used: taken so far; results read from the checkpoint count as if they had been run, so that an interrupted search goes
            on as it would have.
        free: keys of results in the checkpoint that cost nothing: they are those of an earlier search.
        reused: of those taken, passes that an interrupted run took and this one read from the checkpoint.
        watch: is told of every charge.
        stages: name of a stage that has ended -> passes that it took.

    >>> from mpsearch.checkpoints.keys import PlanKey
    >>> passes = PassBudget(8.0, free={PlanKey("select", ("w4", "w2"))})
    >>> with passes.stage("plans"):
    ...     passes.charge(0.5)                            # run now
    ...     passes.charge(0.25, PlanKey("select", ("w4", "w4")))  # read from the checkpoint of a run that was interrupted
    ...     passes.charge(0.25, PlanKey("select", ("w4", "w2")))  # read from an earlier search
    >>> passes.left, passes.reused, passes.stages
    (7.25, 0.25, {'plans': 0.75})
    """

    limit: float
    used: float = 0.0
    free: Collection[Key[Any]] = ()
    reused: float = 0.0
    watch: Callable[[float], object] | None = None
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Passes that may still be taken."""
        return self.limit - self.used

    def charge(self, passes: float, key: Key[Any] | None = None, reused: float | None = None) -> None:
        """Count passes.

        Args:
            passes: that were run, or that the result took that was read from the checkpoint.
            key: of the result that was read.
            reused: so many of them were not run now; by default all for a result that was read.
        """
        if key not in self.free:
            self.used += passes
            self.reused += (0.0 if key is None else passes) if reused is None else reused
            if self.watch is not None:
                self.watch(passes)

    @contextlib.contextmanager
    def reserved(self, passes: float) -> Iterator[None]:
        """Inside, so many passes more count as taken."""
        before = self.used
        self.used += passes
        try:
            yield
        finally:
            self.used = before

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Write down under `stages` what is charged inside."""
        before = self.used
        yield
        self.stages[name] = round(self.used - before, 3)
