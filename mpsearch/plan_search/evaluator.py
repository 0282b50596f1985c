"""Whole plans measured on one part of the data, sample by sample, so that plans are compared on common samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from mpsearch.calibration.plan_in_model import PlanInModel
from mpsearch.calibration.plan_runs import Reference, plan_run, unquantized_run
from mpsearch.calibration.streamed_plan_runs import plans_at_once, runs_in_blocks
from mpsearch.checkpoints.keys import PlanKey, PlanRuns
from mpsearch.estimation.context import Context
from mpsearch.metrics.metric import Metric
from mpsearch.metrics.statistics import ratio_of_samples
from mpsearch.models.running import Batch, samples
from mpsearch.models.streaming.blocks import Blocks
from mpsearch.plan_search.passes import PassBudget

Floats = NDArray[np.float64]
Columns = NDArray[np.int64]
#: Bytes of the unquantized model's outputs, or hidden states, that are held; beyond, it is run again for each plan.
REFERENCE_BYTES = 2**30
#: Of a model of so many numbers or more, plans are proposed and measured so many at a time, wherever its weights lie: where they are
#: streamed, one reading serves them all, and the plans are those of the model in memory.
LARGE_NUMBERS, TOGETHER = 2**29, 4


@dataclass(frozen=True, eq=False)
class Measurement:
    """Damage of a plan on the first samples of a part.

    Attributes:
        sums: (n,) over the predictions of each sample.
        counts: (n,) predictions of each sample, or what the metric weighs a sample by.
    """

    sums: Floats
    counts: Floats

    @property
    def value(self) -> float:
        """Mean damage a prediction; nan without any."""
        return ratio_of_samples(self.sums, self.counts)[0]

    @property
    def se(self) -> float:
        """Its standard error over samples; nan with fewer than two."""
        return ratio_of_samples(self.sums, self.counts)[1]

    def over(self, other: "Measurement") -> tuple[float, float]:
        """By how much this plan is worse than another one on the samples that both have seen, and the standard error.

        The samples are the same, so what they have in common cancels (common random numbers).
        """
        size = min(len(self.sums), len(other.sums))
        sums, counts = self.sums[:size] - other.sums[:size], self.counts[:size]
        return ratio_of_samples(sums, counts)

    def first(self, size: int) -> "Measurement":
        """The part over the first samples."""
        return Measurement(self.sums[:size], self.counts[:size])


@dataclass(eq=False)
class PlanEvaluator:
    """Measures plans on one part of the data, batch by batch; a plan that was measured before costs nothing.

    Attributes:
        part: name of the part; names the results in the checkpoint.
        context: model, decisions (the rows of a plan), precisions, quantizer, checkpoint; passes are counted there.
        batches: of this part.
        metric: what is measured.
        total: samples of all parts: one pass is a run over so many.
        passes: are charged.
        known: columns of a plan -> what is known of it.
    """

    part: str
    context: Context
    batches: Sequence[Batch]
    metric: Metric
    total: int
    passes: PassBudget
    known: dict[tuple[int, ...], Measurement] = field(default_factory=dict)
    _references: dict[int, Reference] = field(default_factory=dict)
    _runs: dict[tuple[int, ...], list[int]] = field(default_factory=dict)  # of the model for each batch of a plan
    _paid: set[int] = field(default_factory=set)  # batches that the unquantized model has been charged for
    _again: bool = False  # it runs again for each plan

    def __post_init__(self) -> None:
        self._sizes = [samples(batch) for batch in self.batches]
        #: numbers in a measurement once a batch is done
        self._ends = np.cumsum(self._sizes).tolist()
        self.share = sum(self._sizes) / self.total

    @property
    def price(self) -> float:
        """Passes that a plan takes at most: its own, and those of the unquantized model where these have to be repeated."""
        return self.share * (2 if self._again else 1)

    def measure(self, columns: Columns, stop: Callable[[Measurement], bool] | None = None) -> Measurement:
        """The damage of a plan on this part.

        Args:
            columns: (D,) column of each decision.
            stop: is shown what is known after each batch but the last; True ends the measurement there.

        Raises:
            EstimatorError: where the damage is not finite, or labels that it needs are missing.
        """
        key = tuple(int(p) for p in columns)
        known = self.known.get(key)
        done = 0 if known is None else self._ends.index(len(known.sums)) + 1
        stored = self.context.checkpoint.get(self._key(key)) if done < len(self._ends) else None
        plan: PlanInModel | None = None
        for number in range(done, len(self._ends)):
            if stored is not None and number < len(stored.runs):
                known = self._repeated(key, stored, number)
            elif self._blocks is not None:
                self._extend([key], number + 1)
                known = self.known[key]
            else:
                plan = self.in_model(np.array(key)) if plan is None else plan
                known = self._longer(key, known, plan, number)
            self.known[key] = known
            if stop is not None and number + 1 < len(self._ends) and stop(known):
                break
        return self.known[key]

    @property
    def at_once(self) -> int:
        """Plans that are proposed before any of them is measured."""
        return TOGETHER if sum(part.numel() for part in self.context.model.parameters()) >= LARGE_NUMBERS else 1

    def measure_together(
        self, plans: Sequence[Columns], stop: Callable[[Measurement], bool] | None = None
    ) -> list[Measurement]:
        """The damage of several plans on this part; of a streamed model each block is read once for all of them.

        Args:
            plans: (D,) columns of each.
            stop: is shown what is known of each plan once all have seen the first batch; True ends its measurement there.

        Raises:
            EstimatorError: as `measure`.
        """
        keys = [tuple(int(p) for p in columns) for columns in plans]
        going = list(dict.fromkeys(keys))
        for end in (1, len(self._ends)) if stop is not None else (len(self._ends),):
            self._extend(going, end)
            going = [key for key in going if stop is None or not stop(self.known[key])]
        return [self.known[key] for key in keys]

    def complete(self, columns: Columns) -> bool:
        """True where a plan has been measured on the whole part."""
        known = self.known.get(tuple(int(p) for p in columns))
        return known is not None and len(known.sums) == self._ends[-1]

    def recall(self) -> list[Columns]:
        """Plans that an earlier search measured on this whole part: known from now on, at no cost."""
        column = {str(option): p for p, option in enumerate(self.context.precisions)}
        free = [key for key in self.passes.free if isinstance(key, PlanKey) and key.part == self.part]
        plans = []
        for key in sorted(free, key=lambda key: " ".join(key.precisions)):
            stored = self.context.checkpoint.get(key)
            if stored is not None and len(stored.runs) >= len(self._ends):
                plans.append(np.array([column[name] for name in key.precisions]))
                self.measure(plans[-1])
        return plans

    def count(self, size: int) -> None:
        """Count a run of the model on so many samples that was made elsewhere."""
        self.context.passes.add(self.total, forward=size)
        self.passes.charge(size / self.total)

    def in_model(self, columns: Columns) -> PlanInModel:
        """A plan (D,) as it is put into the model."""
        context = self.context
        pairs = list(zip(context.decisions, columns.tolist(), strict=True))
        precisions = {layer.name: context.precisions[p] for decision, p in pairs for layer in decision.layers}
        name = " ".join(f"{decision.name}={context.precisions[p]}" for decision, p in pairs)
        return PlanInModel.of(context.model, precisions, context.rounded, context.quantizer, context.ranges, name)

    @property
    def _blocks(self) -> Blocks | None:
        """Of a streamed model, where nothing of the user's own runs it."""
        return None if self.metric.runs_model else self.context.blocks

    def _extend(self, keys: Sequence[tuple[int, ...]], end: int) -> None:
        """Measure plans on the batches up to a number, where that has not been done."""
        missing: dict[
            int, list[tuple[int, ...]]
        ] = {}  # number of the first batch -> plans that lack it and all later ones
        for key in keys:
            known = self.known.get(key)
            done = 0 if known is None else self._ends.index(len(known.sums)) + 1
            stored = self.context.checkpoint.get(self._key(key)) if done < end else None
            while stored is not None and done < min(end, len(stored.runs)):
                self.known[key] = self._repeated(key, stored, done)
                done += 1
            if done < end:
                missing.setdefault(done, []).append(key)
        for first, lacking in missing.items():
            batches = self.batches[first:end]
            blocks = self._blocks
            room = plans_at_once(blocks, batches)
            for start in range(0, len(lacking), room):
                together = lacking[start : start + room]
                if blocks is not None:
                    self._run_blocks(blocks, together, first, end)
                    continue
                for key in together:
                    plan = self.in_model(np.array(key))
                    for number in range(first, end):
                        self.known[key] = self._longer(key, self.known.get(key), plan, number)

    def _run_blocks(self, blocks: Blocks, keys: Sequence[tuple[int, ...]], first: int, end: int) -> None:
        """Plans on some batches, in one reading; charged as if each had been run by itself."""
        plans = [self.in_model(np.array(key)) for key in keys]
        for place, there, plan in runs_in_blocks(blocks, self.batches[first:end], plans):
            number = first + place
            if plan is None:
                reference, runs = self._reference(number)
                continue
            key = keys[plan]
            self.known[key] = self._run(key, self.known.get(key), there, number, reference, runs)
            runs = int(number not in self._references)

    def _longer(self, key: tuple[int, ...], known: Measurement | None, plan: PlanInModel, number: int) -> Measurement:
        """A measurement with one more batch."""
        return self._run(key, known, plan, number, *self._reference(number))

    def _run(
        self,
        key: tuple[int, ...],
        known: Measurement | None,
        plan: PlanInModel,
        number: int,
        reference: Reference,
        runs: int,
    ) -> Measurement:
        """A measurement with one more batch, beside the unquantized model, which took some runs for that."""
        runs += 1
        model, layer = self.context.model, self.context.output_layer
        damage = plan_run(model, self.batches[number], plan, self.metric, reference, self._place(number), layer)
        self.context.passes.add(self.total, forward=self._sizes[number])
        self.passes.charge(runs * self._sizes[number] / self.total)
        sums, counts = damage.sums, damage.counts
        if known is not None:
            sums, counts = np.append(known.sums, sums), np.append(known.counts, counts)
        every = self._runs.setdefault(key, [])
        every.append(runs)
        self.context.checkpoint.put(
            self._key(key), PlanRuns(torch.from_numpy(sums), torch.from_numpy(counts), every, self._again)
        )
        return Measurement(sums, counts)

    def _repeated(self, key: tuple[int, ...], stored: PlanRuns, number: int) -> Measurement:
        """A measurement with one more batch, from the checkpoint; it is charged what it took."""
        work = self._key(key)
        self.passes.charge(stored.runs[number] * self._sizes[number] / self.total, work)
        self._runs.setdefault(key, []).append(stored.runs[number])
        self._again |= stored.again
        if work not in self.passes.free:
            self._paid.add(number)
        return Measurement(stored.sums.numpy(), stored.counts.numpy()).first(self._ends[number])

    def _reference(self, number: int) -> tuple[Reference, int]:
        """The unquantized model on a batch; held, for the first batches, up to `REFERENCE_BYTES` of outputs.

        Which ones are held, and so what plans cost, does not depend on the order in which batches are run.

        Returns:
            what it makes of the batch, and how many runs are to be charged for that.
        """
        if number in self._references:
            return self._references[number], 0
        size = self._sizes[number]
        model, layer = self.context.model, self.context.output_layer
        reference = unquantized_run(model, self.batches[number], self.metric, self._place(number), layer)
        fits = reference.bytes / size * sum(self._sizes[: number + 1]) <= REFERENCE_BYTES
        if fits:
            self._references[number] = reference
        self._again |= not fits
        self.context.passes.add(self.total, forward=size)
        charged = number not in self._paid or not fits
        self._paid.add(number)
        return reference, int(charged)

    def _place(self, number: int) -> str:
        return f"{self.part} part, batch {number}"

    def _key(self, columns: tuple[int, ...]) -> PlanKey:
        return PlanKey(self.part, tuple(str(self.context.precisions[p]) for p in columns))
