"""Probes of a model whose weights lie elsewhere: many travel together from block to block, each of which is loaded once for all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mpsearch.estimation.context import Context
from mpsearch.estimation.probes import Output, Perturbation, ProbeKey
from mpsearch.estimation.readings import Means, Probes, Readers, Readings
from mpsearch.models.streaming.blocks import ROOM_BYTES, Blocks
from mpsearch.models.streaming.offloading import replaced
from mpsearch.quantizers.fake_quantization import inputs

#: Most bytes of hidden states on disk; and no more than half of what is free there.
DISK_BYTES = 16 * 2**30
#: Number of the turn of all batches; turns of a model in memory count from 0.
_ALL = -1


def streamed(context: Context, probes: Probes, readers: Readers, bar: Any) -> Means:
    """Run every probe over all batches, in groups that travel together through the blocks.

    A probe departs from the run of the unquantized model at its block, where its weights are made once, while the block is there. Between
    blocks the hidden states of a group lie in memory up to `ROOM_BYTES` and on disk up to `DISK_BYTES`: each group takes one reading of the
    weights. Outputs, damages and their order are those of a model in memory whose batches are one turn, so the means have the same bits;
    several turns add in another order. A pass is counted by the weights of the blocks that it runs through.
    """
    blocks = context.blocks
    assert blocks is not None
    readings = Readings(context, probes, readers, _ALL)
    total = len(context.batches)
    bar.update(total * (len(probes) - len(readings.todo)))
    shares = _shares(blocks)
    steps = _Steps(bar, total, blocks.number + 1)
    variants, unchanged = [], []
    for key in probes:
        if key in readings.todo:
            perturbation = probes[key].perturbation()
            if perturbation.weights or perturbation.inputs:
                variants.append(_Variant(key, perturbation, blocks, shares, steps))
            else:
                unchanged.append(key)
    variants.sort(key=lambda variant: variant.first)
    size = _together(context, blocks) if variants else 1
    groups = [variants[start : start + size] for start in range(0, len(variants), size)]
    if unchanged and not groups:
        groups = [[]]
    for group in groups:
        _run(context, blocks, group, unchanged, readings)
        bar.update(total * len(unchanged))
        unchanged = []
    return readings.means


def _run(
    context: Context, blocks: Blocks, group: Sequence["_Variant"], unchanged: Sequence[ProbeKey], readings: Readings
) -> None:
    """Read the probes of a group, and those that change nothing."""
    keys = [*unchanged, *(variant.key for variant in group)]
    for key in keys:
        readings.start(key)
    reference: Output | None = None
    with contextlib.closing(blocks.runs(context.batches, group, ROOM_BYTES)) as runs:  # type: ignore[type-var]
        for place, number in runs:
            output = context.output(context.batches[number])
            if place is None:
                reference = output
                context.passes.add(len(context.batches), forward=1.0)
                for key in unchanged:
                    readings.read(key, number, reference, None)
                continue
            assert reference is not None
            variant = group[place]
            context.passes.add(len(context.batches), forward=variant.share)
            readings.read(variant.key, number, reference, output if variant.changed else None)
    for key in keys:
        readings.finish(key)


def _shares(blocks: Blocks) -> list[float]:
    """Part of a run from each segment on, by the weights: what comes before the blocks looks up, and does not multiply."""
    sizes = [sum(own.numel() for own in blocks.parameters(segment)) for segment in range(1, blocks.number + 2)]
    behind = [sum(sizes[segment:]) / max(sum(sizes), 1) for segment in range(len(sizes))]
    return [behind[0], *behind]


class _Steps:
    """Moves a bar on while probes are under way, so that it tells the time left."""

    def __init__(self, bar: Any, batches: int, segments: int) -> None:
        self.bar, self.batches, self.segments = bar, batches, segments
        self.done = 0.0
        self.shown = 0

    def add(self, share: float) -> None:
        """A probe has come so much further on all batches."""
        self.done += share * self.batches
        reached = int(self.done + 1e-6)
        self.bar.update(reached - self.shown)
        self.shown = reached


@dataclass(eq=False)
class _Variant:
    """The model with one probe in it.

    Attributes:
        key: of the probe.
        perturbation: what it puts in.
        blocks: of the model.
        shares: part of a run from each segment on.
        steps: is told how far it has come.
        first: segment where it departs.
        changed: it has put in something that was not there.
    """

    key: ProbeKey
    perturbation: Perturbation
    blocks: Blocks
    shares: Sequence[float]
    steps: _Steps
    first: int = field(init=False)
    changed: bool = field(init=False)
    _told: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        held: list[nn.Module | nn.Parameter] = [*self.perturbation.weights, *self.perturbation.inputs]
        self.first = min(min(self.blocks.segments_of(part)) for part in held)
        self.changed = bool(self.perturbation.inputs)

    @property
    def share(self) -> float:
        """Part of a run that it takes."""
        return self.shares[self.first]

    @contextlib.contextmanager
    def inside(self, segment: int) -> Iterator[None]:
        """See `mpsearch.models.streaming.blocks.Variant`."""
        made = {
            parameter: make()
            for parameter, make in self.perturbation.weights.items()
            if segment in self.blocks.segments_of(parameter)
        }
        self.changed = self.changed or any(not torch.equal(new, old.data) for old, new in made.items())
        functions = {
            module: function
            for module, function in self.perturbation.inputs.items()
            if segment in self.blocks.segments_of(module)
        }
        with replaced(made), inputs(functions):
            yield
        if segment not in self._told:
            self._told.add(segment)
            self.steps.add(1 / (self.blocks.number + 2 - self.first))


def _together(context: Context, blocks: Blocks) -> int:
    """How many probes travel together, beside the unquantized model."""
    free_bytes = shutil.disk_usage(tempfile.gettempdir()).free
    room_bytes = ROOM_BYTES + min(DISK_BYTES, free_bytes // 2)
    return max(int(room_bytes / max(blocks.state_bytes(context.batches), 1)) - 1, 1)
