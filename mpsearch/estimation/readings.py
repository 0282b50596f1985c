"""What estimators read from the outputs of probes over a turn of batches, with the checkpoint that keeps it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpsearch.checkpoints.keys import CellKey
from mpsearch.core.wrapped_names import plain
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.probes import Output, Probe, ProbeKey, ProbeReader
from mpsearch.metrics.pieces import all_finite
from mpsearch.metrics.statistics import Mean
from mpsearch.models.fingerprints import described, digest

Probes = Mapping[ProbeKey, Probe]
Readers = Mapping[ProbeKey, Sequence[ProbeReader]]
Means = dict[tuple[ProbeReader, ProbeKey], Mean]


@dataclass(eq=False)
class Readings:
    """Damages of probes over a turn of batches, as each estimator that reads a probe sees them.

    What is found in the checkpoint is not measured again; observers of the context are shown what they have not seen.

    Attributes:
        context: of the run.
        probes: by their keys.
        readers: the estimators that read a probe.
        turn: its number.
        means: of the probes that are read, so far.
        todo: probes that are to be run.
    """

    context: Context
    probes: Probes
    readers: Readers
    turn: int
    means: Means = field(init=False)
    todo: set[ProbeKey] = field(init=False)

    def __post_init__(self) -> None:
        store = self.context.checkpoint
        digests = {reader: digest(described(reader)) for readers in self.readers.values() for reader in readers}
        self._cells = {
            (reader, key): self._key(digests[reader], key)
            for key, readers in self.readers.items()
            for reader in readers
        }
        observers = [digest(observer.settings) for observer in self.context.observers]
        self._seen = {key: [self._key(observer, key) for observer in observers] for key in self.probes}
        self._weights: dict[tuple[ProbeReader, int], Tensor | None] = {}
        stored = {place: store.get(cell) for place, cell in self._cells.items()}
        self.means = {place: Mean.restored(state) for place, state in stored.items() if state is not None}
        self.todo = {
            key
            for key in self.probes
            if any((reader, key) not in self.means for reader in self.readers[key])
            or any(store.get(mark) is None for mark in self._seen[key])
        }

    def _key(self, reader: str, key: ProbeKey) -> CellKey:
        """Where the results of a reader, an estimator or an observer, are found again."""
        return CellKey(reader, plain(self.context.decisions[key[0]].name), key[1], self.turn)

    def forget(self) -> None:
        """All is to be done, whatever has been."""
        self.context.checkpoint.delete([*self._cells.values(), *itertools.chain(*self._seen.values())])
        self.means.clear()
        self.todo = set(self.probes)

    def start(self, key: ProbeKey) -> None:
        """A probe is read from the first batch on."""
        for reader in self.readers[key]:
            self.means[reader, key] = Mean()

    def read(self, key: ProbeKey, batch: int, reference: Output, output: Output | None) -> None:
        """Add what a probe does to a batch.

        Args:
            key: of the probe.
            batch: its number.
            reference: what the unquantized model says.
            output: what the perturbed model says; None where nothing is changed.

        Raises:
            EstimatorError: for an output or a damage that is not finite.
        """
        context, probe = self.context, self.probes[key]
        damages = {} if output is None else self._damages(key, batch, reference, output)
        for reader in self.readers[key]:
            damage = damages.get(reader, torch.zeros(len(reference.index), device=reference.held.device))
            if (reader, batch) not in self._weights:
                self._weights[reader, batch] = _weights(context, reader, reference)
            weight = self._weights[reader, batch]
            if damage.ndim:
                self.means[reader, key].add(damage, reference.index, reference.samples, weight)
            else:  # one number for the batch
                self.means[reader, key].add(damage.expand(len(reference.index)), torch.zeros_like(reference.index), 1)
        if output is not None:
            for observer in context.observers:
                observer.observe(context, probe, reference, output)

    def finish(self, key: ProbeKey) -> None:
        """A probe has been read on all batches of the turn."""
        store = self.context.checkpoint
        for reader in self.readers[key]:
            store.put(self._cells[reader, key], self.means[reader, key].state())
        for mark in self._seen[key]:
            store.put(mark, [])

    def _damages(self, key: ProbeKey, batch: int, reference: Output, output: Output) -> dict[ProbeReader, Tensor]:
        """Damage on one batch, rows made once for all estimators that take them in pieces."""
        context, probe, readers = self.context, self.probes[key], self.readers[key]
        pieces: dict[ProbeReader, list[Tensor]] = {reader: [] for reader in readers if reader.by_rows(context)}
        for before, after in zip(reference.pieces(), output.pieces(), strict=True):
            if not all_finite(after.logits):
                raise EstimatorError(
                    f"the output with layer {context.decisions[probe.decision].name!r} at {probe.name} is not finite (batch {batch})"
                )
            for reader, parts in pieces.items():
                parts.append(reader.damage(context, probe, before, after))
        damages = {reader: parts[0] if len(parts) == 1 else torch.cat(parts) for reader, parts in pieces.items()}
        if len(damages) < len(readers):
            before, after = reference.made(), output.made()
            damages |= {
                reader: reader.damage(context, probe, before, after) for reader in readers if reader not in damages
            }
        for reader, damage in damages.items():
            self._check(reader, probe, batch, damage)
        return damages

    def _check(self, reader: ProbeReader, probe: Probe, batch: int, damage: Tensor) -> None:
        bad = damage[~torch.isfinite(damage)] if damage.ndim else damage[None][~torch.isfinite(damage[None])]
        if len(bad):
            raise EstimatorError(
                f"sensitivity of layer {self.context.decisions[probe.decision].name!r} at {probe.name} is {float(bad[0])}, "
                f"expected a finite number ({reader!r}, batch {batch})"
            )


def _weights(context: Context, reader: ProbeReader, reference: Output) -> Tensor | None:
    """(N,) weights of the predictions."""
    if not reader.by_rows(context):
        return reader.weights(context, reference)
    parts = [reader.weights(context, part) for part in reference.parts()]
    known = [part for part in parts if part is not None]
    return None if len(known) < len(parts) else torch.cat(known)
