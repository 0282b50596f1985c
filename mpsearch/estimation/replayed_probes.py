"""Probes of a model in memory: only what a probe can change is run again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpsearch.checkpoints.keys import TurnKey
from mpsearch.errors import EstimatorError, warn
from mpsearch.estimation.context import Context
from mpsearch.estimation.probes import Output, ProbeKey
from mpsearch.estimation.readings import Means, Probes, Readers, Readings
from mpsearch.metrics.pieces import piece_sizes
from mpsearch.metrics.statistics import Mean
from mpsearch.models.replay import Resumption
from mpsearch.models.running import Batch, inputs_of
from mpsearch.models.streaming.offloading import is_offloaded, replaced, resident
from mpsearch.quantizers.fake_quantization import inputs

#: Most memory that the batches of a turn take between runs, beside the first.
TURN_BYTES = 256 * 2**20


def replayed(context: Context, probes: Probes, readers: Readers, bar: Any) -> Means:
    """Run every probe, and re-run only what it can change.

    Batches are taken in turns of as many as fit into the memory that the activations of one batch take, and into `TURN_BYTES`. In a turn
    the decisions come in the order of the model; each batch is held at the entry of the decision (`mpsearch.models.replay`), so one at
    depth d costs the part of a forward pass behind d. A model whose weights lie elsewhere, and that has no blocks, is run whole.
    """
    run = _Run(context, probes, readers)
    for number, turn in enumerate(run.turns()):
        run.turn(number, turn, bar)
    return run.means


@dataclass(eq=False)
class _Run:
    context: Context
    probes: Probes
    readers: Readers

    def __post_init__(self) -> None:
        context = self.context
        self.means: Means = {(reader, key): Mean() for key, readers in self.readers.items() for reader in readers}
        self.total = len(context.batches)
        self.trace = context.trace()
        self._spend(1.0)
        if is_offloaded(context.model):
            self.entries = [0] * len(context.decisions)
            warn(
                f"{type(context.model).__name__} has no blocks that run one after the other, so each of {len(self.probes):,} probes reads "
                f"all its weights for each of {self.total} batches: {self.total * (len(self.probes) + 1) + 1:,} readings; load the "
                "model, or give fewer and larger batches"
            )
        else:
            self.entries = [
                self.trace.entry(
                    [context.module(layer) for layer in decision.layers], list(context.parameters(decision))
                )
                for decision in context.decisions
            ]
        self.order = sorted(self.probes, key=lambda key: self.trace.calls[self.entries[key[0]]].start)

    def _spend(self, share: float) -> None:
        self.context.passes.add(self.total, forward=share)

    def turns(self) -> list[list[tuple[int, Batch]]]:
        """Batches with their numbers, in turns."""
        first = _elements(self.context.batches[0])
        room = min(self.trace.activation_bytes, TURN_BYTES) * first / max(self.trace.held_bytes, 1)
        turns: list[list[tuple[int, Batch]]] = []
        held = 0.0
        for number, batch in enumerate(self.context.batches):
            held += _elements(batch)
            if not turns or held > room:
                turns.append([])
                held = _elements(batch)
            turns[-1].append((number, batch))
        return turns

    def turn(self, number: int, turn: list[tuple[int, Batch]], bar: Any) -> None:
        """All probes over the batches of a turn.

        Means count once the replayed outputs have been confirmed; where the calls depend on the data, all probes of this turn and of
        later ones run the whole model.
        """
        readings = Readings(self.context, self.probes, self.readers, number)
        confirmed = TurnKey(number)
        bar.update(len(turn) * (len(self.order) - len(readings.todo)))
        if readings.todo or self.context.checkpoint.get(confirmed) is None:
            if not self._measure(turn, readings, bar):
                readings.forget()
                self.entries = [0] * len(self.entries)
                bar.update(-len(turn) * len(self.order))
                self._measure(turn, readings, bar)
            self.context.checkpoint.put(confirmed, True)
        for place, mean in readings.means.items():
            self.means[place].merge(mean)

    def _measure(self, turn: list[tuple[int, Batch]], readings: Readings, bar: Any) -> bool:
        """Read the probes that are still to do; False where the replayed outputs are not those of the model."""
        context = self.context
        references = []
        for _, batch in turn:
            references.append(context.output(batch))
            self._spend(1.0)
        held = [Resumption(context.model, batch, self.trace) for _, batch in turn]
        try:
            for key in self.order:
                entry = self.entries[key[0]]
                for run in held:
                    self._spend(self.trace.share(run.entry) - self.trace.share(entry))
                    run.advance(entry)
                if key in readings.todo:
                    self._probe(key, turn, held, references, readings)
                    bar.update(len(turn))
            return self._confirmed(held, references)
        except EstimatorError:
            if any(self.entries):  # the fault may lie in outputs that another path through the model does not have
                return False
            raise

    def _confirmed(self, held: list[Resumption], references: list[Output]) -> bool:
        """A run through all entries of the turn gives the predictions of a whole run."""
        if not any(self.entries):
            return True
        for run, reference in zip(held, references, strict=True):
            self._spend(self.trace.share(run.entry))
            with run.entered():
                output = self.context.output(run.batch)
            if not _equal(output.held, reference.held):
                return False
        return True

    def _probe(
        self,
        key: ProbeKey,
        turn: list[tuple[int, Batch]],
        held: list[Resumption],
        references: list[Output],
        readings: Readings,
    ) -> None:
        """Read one probe on each batch."""
        context = self.context
        perturbation = self.probes[key].perturbation()
        with resident(*(context.module(layer) for layer in context.decisions[key[0]].layers)):
            values = {parameter: make() for parameter, make in perturbation.weights.items()}
            changed = bool(perturbation.inputs) or any(not torch.equal(new, old.data) for old, new in values.items())
        readings.start(key)
        with replaced(values), inputs(perturbation.inputs):
            for (number, batch), run, reference in zip(turn, held, references, strict=True):
                output = None
                if changed:
                    with run.entered():
                        output = context.output(batch)
                    self._spend(self.trace.share(run.entry))
                readings.read(key, number, reference, output)
        readings.finish(key)


def _equal(rows: Tensor, expected: Tensor) -> bool:
    """True for predictions that are the same up to rounding."""
    if rows.shape != expected.shape:
        return False
    sizes = piece_sizes(len(rows), rows[0].numel() if len(rows) else 1)
    pieces = list(zip(rows.split(sizes), expected.split(sizes), strict=True))
    scale = max(
        float(part[torch.isfinite(part)].abs().amax()) if torch.isfinite(part).any() else 0.0 for _, part in pieces
    )
    return all(torch.allclose(one, other, rtol=1e-6, atol=1e-6 * scale) for one, other in pieces)


def _elements(batch: Batch) -> int:
    """Numbers in the inputs of a batch: a measure of its size."""
    value = inputs_of(batch)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else [value]
    return sum(part.numel() for part in parts if isinstance(part, Tensor))
