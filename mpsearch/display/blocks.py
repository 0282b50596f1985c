"""Layers gathered by the names of their blocks, for pictures and texts of a thousand layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

#: Names that are readable beside or below each other.
MOST = 40
#: Fewer blocks than this say too little of the depth.
_LEAST = 8


@dataclass(frozen=True)
class Block:
    """Consecutive layers under one label.

    Attributes:
        label: the name that they share, or the first and the last.
        start: number of the first layer.
        stop: number after the last layer.
    """

    label: str
    start: int
    stop: int

    @property
    def middle(self) -> float:
        """Place of the label."""
        return (self.start + self.stop - 1) / 2


def blocks(names: Sequence[str], most: int = MOST) -> list[Block]:
    """At most about `most` runs of layers, cut where the dotted names change.

    The deepest cut of the names that gives few enough runs is taken; where that says too little, neighbours of the next deeper
    cut are put together.

    >>> names = [f"model.layers.{i}.{part}" for i in range(32) for part in ("q", "k", "v", "o", "up", "down")]
    >>> runs = blocks(names)
    >>> len(runs), runs[0], runs[-1].label
    (32, Block(label='model.layers.0', start=0, stop=6), 'model.layers.31')
    >>> [block.label for block in blocks([f"conv{i}" for i in range(100)], 3)]
    ['conv0 … conv33', 'conv34 … conv67', 'conv68 … conv99']
    """
    parts = [name.split(".") for name in names]
    finer = _runs(parts, max(map(len, parts)))
    for depth in range(max(map(len, parts)), 0, -1):
        runs = _runs(parts, depth)
        if len(runs) <= most:
            if len(runs) >= min(_LEAST, most, len(finer)):
                return runs
            break
        finer = runs
    each = math.ceil(len(finer) / most)
    return [_joined(finer[i : i + each]) for i in range(0, len(finer), each)]


def _runs(parts: Sequence[Sequence[str]], depth: int) -> list[Block]:
    runs: list[Block] = []
    start = 0
    for name, run in groupby(".".join(part[:depth]) for part in parts):
        stop = start + len(list(run))
        runs.append(Block(name, start, stop))
        start = stop
    return runs


def _joined(run: Sequence[Block]) -> Block:
    first, last = run[0].label.split("."), run[-1].label.split(".")
    same = 0
    while same < min(len(first), len(last)) - 1 and first[same] == last[same]:
        same += 1
    label = run[0].label if len(run) == 1 else f"{run[0].label} … {'.'.join(last[same:])}"
    return Block(label, run[0].start, run[-1].stop)
