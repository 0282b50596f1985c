"""One perturbation at a time: each decision perturbed with all else left alone, and the output compared."""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mpsearch.checkpoints.keys import CellKey, TurnKey
from mpsearch.core.wrapped_names import plain
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate, Members
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.probes import Output, Perturbation, Probe
from mpsearch.metrics.pieces import all_finite, piece_sizes
from mpsearch.metrics.statistics import Mean
from mpsearch.models.fingerprints import described, digest
from mpsearch.models.replay import Resumption
from mpsearch.models.running import Batch, inputs_of
from mpsearch.quantizers.fake_quantization import input_quantizers, inputs, weights

#: Most memory that the batches of a turn take between runs, beside the first.
TURN_BYTES = 256 * 2**20
#: Number of a decision, and name of a perturbation of it.
_ProbeKey = tuple[int, str]


class OneAtATime:
    """An estimator that measures; subclasses say what is put in (`probes`), what is read (`damage`), and what follows (`finish`).

    Attributes:
        unit: of the table, `nats` or `relative`.
        needs_labels: True where `damage` reads them.
        scores_caches: True where the probes perturb a cache of keys or values.
        scores_members: `runs` where decisions may overlap, each of them taking its runs: layers of a tie are scored alone too.
    """

    unit: ClassVar[str] = "relative"
    needs_labels: ClassVar[bool] = False
    scores_caches: ClassVar[bool] = True
    scores_members: ClassVar[Members] = "no"

    @staticmethod
    def together(context: Context, estimators: Sequence[Any]) -> list[Estimate]:
        """Score for several estimators of this kind, running each probe once."""
        return one_at_a_time(context, estimators)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the output of the model is not finite, or labels that are needed are missing.
        """
        return one_at_a_time(context, [self])[0]

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward and backward passes over the data, at most: re-runs skip what a perturbation cannot change.

        A model whose calls depend on the data shows it at the end of a turn of batches, which is then taken again.
        """
        return Passes(1 + (1 + 1 / batches) + decisions * self.probes_per_unit(precisions), 0)

    def probes_per_unit(self, precisions: int) -> int:
        """Number of perturbations of each decision."""
        return precisions

    def probes(self, context: Context) -> list[Probe]:
        """By default each decision at each precision."""
        return [
            Probe(u, str(context.precisions[p]), functools.partial(_cell, context, u, p)) for u, p in context.cells()
        ]

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) damage of each prediction, or one number for the batch; larger = worse, 0 for equal outputs."""
        raise NotImplementedError

    def by_rows(self, context: Context) -> bool:
        """True where damage and weight of a prediction come from its own row alone, so that rows can be taken a few at a time."""
        return False

    def weights(self, context: Context, reference: Output) -> Tensor | None:
        """(N,) what each prediction weighs in the mean; None: alike."""
        return None

    def finish(self, context: Context, means: Mapping[_ProbeKey, Mean]) -> Estimate:
        """By default the mean damage of each cell."""
        names = [str(precision) for precision in context.precisions]
        value = np.array([[means[u, name].value for name in names] for u in range(len(context.decisions))])
        se = np.array([[means[u, name].se for name in names] for u in range(len(context.decisions))])
        return Estimate(value, se, self.unit)


def one_at_a_time(context: Context, estimators: Sequence[OneAtATime]) -> list[Estimate]:
    """Run every probe of every estimator once, sharing runs, and re-run only what a probe can change.

    Batches are taken in turns of as many as fit into the memory that the activations of one batch take, and into `TURN_BYTES`. In a turn
    the decisions come in the order of the model; each batch is held at the entry of the decision (`mpsearch.models.replay`), so one at
    depth d costs the part of a forward pass behind d. A probe that changes nothing is 0 without a run.

    Observers of the context are shown every output beside the unquantized one. Results of each probe and turn go to the checkpoint as
    they are finished, and what an observer was shown is written down there, so that it is shown what it has not seen.
    """
    for estimator in estimators:
        if estimator.needs_labels and not context.has_labels():
            raise EstimatorError(f"{estimator!r} needs labels; give batches (inputs, targets)")
    probes: dict[_ProbeKey, Probe] = {}
    readers: dict[_ProbeKey, list[OneAtATime]] = {}
    for estimator in dict.fromkeys(estimators):  # an estimator given twice runs once
        for probe in estimator.probes(context):
            probes.setdefault((probe.decision, probe.name), probe)
            readers.setdefault((probe.decision, probe.name), []).append(estimator)
    means = {(estimator, key): Mean() for key, members in readers.items() for estimator in members}
    with torch.no_grad():
        run = _Run(context, probes, readers, means)
        bar = context.progress(None, len(probes) * len(context.batches), "One at a time")
        with bar:
            for number, turn in enumerate(run.turns()):
                run.turn(number, turn, bar)
    return [
        estimator.finish(context, {key: means[estimator, key] for key in probes if (estimator, key) in means})
        for estimator in estimators
    ]


@dataclass(eq=False)
class _Run:
    context: Context
    probes: Mapping[_ProbeKey, Probe]
    readers: Mapping[_ProbeKey, list[OneAtATime]]
    means: dict[tuple[OneAtATime, _ProbeKey], Mean]

    def __post_init__(self) -> None:
        context = self.context
        self.total = len(context.batches)
        self.trace = context.trace()
        self._spend(1.0)
        self.entries = [
            self.trace.entry([context.module(layer) for layer in decision.layers], list(context.parameters(decision)))
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
        checkpoint = self.context.checkpoint
        confirmed = TurnKey(number)
        digests = {estimator: digest(described(estimator)) for estimator, _ in self.means}
        cells = {(estimator, key): self._key(digests[estimator], key, number) for estimator, key in self.means}
        seen = {
            key: [self._key(digest(observer.settings), key, number) for observer in self.context.observers]
            for key in self.order
        }
        stored = {place: checkpoint.get(cell) for place, cell in cells.items()}
        means = {place: Mean.restored(state) for place, state in stored.items() if state is not None}
        todo = {
            key
            for key in self.order
            if any((estimator, key) not in means for estimator in self.readers[key])
            or any(checkpoint.get(mark) is None for mark in seen[key])
        }
        bar.update(len(turn) * (len(self.order) - len(todo)))
        if todo or checkpoint.get(confirmed) is None:
            fresh = self._measure(turn, todo, cells, seen, bar)
            if fresh is None:
                checkpoint.delete([*cells.values(), *itertools.chain(*seen.values())])
                self.entries = [0] * len(self.entries)
                bar.update(-len(turn) * len(self.order))
                fresh = self._measure(turn, set(self.order), cells, seen, bar)
            means |= fresh or {}
            checkpoint.put(confirmed, True)
        for place, mean in means.items():
            self.means[place].merge(mean)

    def _key(self, reader: str, key: _ProbeKey, turn: int) -> CellKey:
        """Where the results of a reader, an estimator or an observer, are found again."""
        return CellKey(reader, plain(self.context.decisions[key[0]].name), key[1], turn)

    def _measure(
        self,
        turn: list[tuple[int, Batch]],
        todo: set[_ProbeKey],
        cells: Mapping[tuple[OneAtATime, _ProbeKey], CellKey],
        seen: Mapping[_ProbeKey, Sequence[CellKey]],
        bar: Any,
    ) -> dict[tuple[OneAtATime, _ProbeKey], Mean] | None:
        """The means of the probes that are still to do; None where the replayed outputs are not those of the model."""
        context = self.context
        references = []
        for _, batch in turn:
            references.append(context.output(batch))
            self._spend(1.0)
        held = [Resumption(context.model, batch, self.trace) for _, batch in turn]
        weights_of = {
            estimator: [_weights(context, estimator, reference) for reference in references]
            for estimator in {estimator for key in todo for estimator in self.readers[key]}
        }
        means: dict[tuple[OneAtATime, _ProbeKey], Mean] = {}
        try:
            for key in self.order:
                probe, entry = self.probes[key], self.entries[key[0]]
                for run in held:
                    self._spend(self.trace.share(run.entry) - self.trace.share(entry))
                    run.advance(entry)
                if key not in todo:
                    continue
                damages = self._probe(probe, turn, held, references)
                for estimator in self.readers[key]:
                    mean = means[estimator, key] = Mean()
                    for (number, _), damage, reference, weight in zip(
                        turn, damages[estimator], references, weights_of[estimator], strict=True
                    ):
                        self._check(estimator, probe, number, damage)
                        _add(mean, damage, reference, weight)
                    context.checkpoint.put(cells[estimator, key], mean.state())
                for mark in seen[key]:
                    context.checkpoint.put(mark, [])
                bar.update(len(turn))
            return means if self._confirmed(held, references) else None
        except EstimatorError:
            if any(self.entries):  # the fault may lie in outputs that another path through the model does not have
                return None
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
        probe: Probe,
        turn: list[tuple[int, Batch]],
        held: list[Resumption],
        references: list[Output],
    ) -> dict[OneAtATime, list[Tensor]]:
        """Damage of one probe on each batch, for each estimator that reads it; observers are shown its outputs."""
        context = self.context
        estimators = self.readers[probe.decision, probe.name]
        damages: dict[OneAtATime, list[Tensor]] = {estimator: [] for estimator in estimators}
        perturbation = probe.perturbation()
        changed = bool(perturbation.inputs) or any(
            not torch.equal(new, old.data) for old, new in perturbation.weights.items()
        )
        with weights(perturbation.weights), inputs(perturbation.inputs):
            for (number, batch), run, reference in zip(turn, held, references, strict=True):
                if not changed:
                    for estimator in estimators:
                        damages[estimator].append(torch.zeros(len(reference.index), device=reference.held.device))
                    continue
                with run.entered():
                    output = context.output(batch)
                self._spend(self.trace.share(run.entry))
                for estimator, damage in self._damages(estimators, probe, number, reference, output).items():
                    damages[estimator].append(damage)
                for observer in context.observers:
                    observer.observe(context, probe, reference, output)
        return damages

    def _damages(
        self, estimators: Sequence[OneAtATime], probe: Probe, batch: int, reference: Output, output: Output
    ) -> dict[OneAtATime, Tensor]:
        """Damage on one batch, rows made once for all estimators that take them in pieces."""
        pieces: dict[OneAtATime, list[Tensor]] = {
            estimator: [] for estimator in estimators if estimator.by_rows(self.context)
        }
        for before, after in zip(reference.pieces(), output.pieces(), strict=True):
            self._check_output(probe, batch, after)
            for estimator, parts in pieces.items():
                parts.append(estimator.damage(self.context, probe, before, after))
        damages = {estimator: parts[0] if len(parts) == 1 else torch.cat(parts) for estimator, parts in pieces.items()}
        if len(damages) < len(estimators):
            before, after = reference.made(), output.made()
            for estimator in estimators:
                if estimator not in damages:
                    damages[estimator] = estimator.damage(self.context, probe, before, after)
        return damages

    def _check_output(self, probe: Probe, batch: int, output: Output) -> None:
        if not all_finite(output.logits):
            raise EstimatorError(
                f"the output with layer {self.context.decisions[probe.decision].name!r} at {probe.name} is not finite (batch {batch})"
            )

    def _check(self, estimator: OneAtATime, probe: Probe, batch: int, damage: Tensor) -> None:
        bad = damage[~torch.isfinite(damage)] if damage.ndim else damage[None][~torch.isfinite(damage[None])]
        if len(bad):
            raise EstimatorError(
                f"sensitivity of layer {self.context.decisions[probe.decision].name!r} at {probe.name} is {float(bad[0])}, "
                f"expected a finite number ({estimator!r}, batch {batch})"
            )


def _cell(context: Context, u: int, p: int) -> Perturbation:
    precisions = {layer.name: context.precisions[p] for layer in context.decisions[u].layers}
    return Perturbation(
        context.quantized_weights([context.decisions[u]], context.precisions[p]),
        input_quantizers(context.model, precisions, context.quantizer, context.ranges),
    )


def _weights(context: Context, estimator: OneAtATime, reference: Output) -> Tensor | None:
    """(N,) weights of the predictions."""
    if not estimator.by_rows(context):
        return estimator.weights(context, reference)
    parts = [estimator.weights(context, part) for part in reference.parts()]
    known = [part for part in parts if part is not None]
    return None if len(known) < len(parts) else torch.cat(known)


def _add(mean: Mean, damage: Tensor, reference: Output, weight: Tensor | None) -> None:
    """Add the damage of a batch to a mean: (N,), or one number."""
    if damage.ndim:
        mean.add(damage, reference.index, reference.samples, weight)
    else:
        mean.add(damage.expand(len(reference.index)), torch.zeros_like(reference.index), 1)


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
