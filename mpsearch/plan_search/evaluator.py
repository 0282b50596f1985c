"""Whole plans measured on one part of the data, sample by sample, so that plans are compared on common samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpsearch.checkpoints.keys import PlanKey, PlanRuns
from mpsearch.errors import EstimatorError
from mpsearch.estimation.estimator import Context
from mpsearch.metrics.metric import Metric
from mpsearch.metrics.runs import Run, run
from mpsearch.metrics.statistics import ratio_of_samples
from mpsearch.models.running import Batch, samples
from mpsearch.plan_search.passes import PassBudget
from mpsearch.quantizers.fake_quantization import input_quantizers, inputs, weights

Floats = NDArray[np.float64]
Options = NDArray[np.int64]
#: Logits of the unquantized model that are kept; beyond, it is run again for each plan.
REFERENCE_BYTES = 2**30


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
    """Measures plans on one part of the data; a plan that was measured before costs nothing.

    Attributes:
        name: of the part; names the results in the checkpoint.
        context: model, units (the rows of a plan), precisions, quantizer, checkpoint; passes are counted there.
        batches: of this part.
        metric: what is measured.
        total: samples of all parts: one pass is a run over so many.
        spending: is charged.
        known: options of a plan -> what is known of it.
    """

    name: str
    context: Context
    batches: Sequence[Batch]
    metric: Metric
    total: int
    spending: PassBudget
    known: dict[tuple[int, ...], Measurement] = field(default_factory=dict)
    _references: dict[int, "_Reference"] = field(default_factory=dict)
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

    def measure(self, options: Options, stop: Callable[[Measurement], bool] | None = None) -> Measurement:
        """The damage of a plan on this part.

        Args:
            options: (U,) column of each unit.
            stop: is shown what is known after each batch but the last; True ends the measurement there.

        Raises:
            EstimatorError: where the damage is not finite, or labels that it needs are missing.
        """
        key = tuple(int(p) for p in options)
        seen = self.known.get(key)
        done = 0 if seen is None else self._ends.index(len(seen.sums)) + 1
        stored = self.context.checkpoint.get(self._key(key)) if done < len(self._ends) else None
        made: Made | None = None
        for number in range(done, len(self._ends)):
            if stored is not None and number < len(stored.runs):
                seen = self._repeated(key, stored, number)
            else:
                made = self.made(np.array(key)) if made is None else made
                seen = self._longer(key, seen, made, number)
            self.known[key] = seen
            if stop is not None and number + 1 < len(self._ends) and stop(seen):
                break
        return self.known[key]

    def complete(self, options: Options) -> bool:
        """True where a plan has been measured on the whole part."""
        seen = self.known.get(tuple(int(p) for p in options))
        return seen is not None and len(seen.sums) == self._ends[-1]

    def recall(self) -> list[Options]:
        """Plans that an earlier search measured on this whole part: known from now on, at no cost."""
        column = {str(option): p for p, option in enumerate(self.context.precisions)}
        free = [key for key in self.spending.free if isinstance(key, PlanKey) and key.part == self.name]
        plans = []
        for key in sorted(free, key=lambda key: " ".join(key.precisions)):
            stored = self.context.checkpoint.get(key)
            if stored is not None and len(stored.runs) >= len(self._ends):
                plans.append(np.array([column[name] for name in key.precisions]))
                self.measure(plans[-1])
        return plans

    def count(self, size: int) -> None:
        """Somebody else has run the model on so many samples."""
        self.context.passes.add(self.total, forward=size)
        self.spending.charge(size / self.total)

    def made(self, options: Options) -> "Made":
        """What puts a plan (U,) into the model."""
        context = self.context
        chosen = {
            layer.name: context.precisions[p]
            for decision, p in zip(context.decisions, options.tolist(), strict=True)
            for layer in decision.layers
        }
        values = {
            parameter: context.quantized(layer, chosen[layer.name])
            for decision in context.decisions
            for parameter, layer in context.parameters(decision).items()
            if chosen[layer.name].quantizes_weight
        }
        return Made(values, input_quantizers(context.model, chosen, context.quantizer, context.ranges))

    def _longer(self, key: tuple[int, ...], seen: Measurement | None, made: "Made", number: int) -> Measurement:
        """A measurement with one more batch."""
        model, batch = self.context.model, self.batches[number]
        reference, runs = self._reference(number)
        runs += 1
        with torch.no_grad(), weights(made.values), inputs(made.functions):
            found = self._run(batch)
            sums, counts = self.metric.of(model, batch, found, reference.run)
        self.context.passes.add(self.total, forward=self._sizes[number])
        self.spending.charge(runs * self._sizes[number] / self.total)
        change = self.metric.damage(sums, reference.sums)
        if not (np.isfinite(change).all() and (found is None or torch.isfinite(found.rows).all())):
            raise EstimatorError(
                f"the damage of a plan is not finite ({self.name} part, batch {number}): "
                + " ".join(
                    f"{decision.name}={self.context.precisions[p]}"
                    for decision, p in zip(self.context.decisions, key, strict=True)
                )
            )
        sums, counts = (
            (change, counts) if seen is None else (np.append(seen.sums, change), np.append(seen.counts, counts))
        )
        every = self._runs.setdefault(key, [])
        every.append(runs)
        self.context.checkpoint.put(
            self._key(key), PlanRuns(torch.from_numpy(sums), torch.from_numpy(counts), every, self._again)
        )
        return Measurement(sums, counts)

    def _repeated(self, key: tuple[int, ...], stored: PlanRuns, number: int) -> Measurement:
        """A measurement with one more batch, from the checkpoint; it is charged what it took."""
        work = self._key(key)
        self.spending.charge(stored.runs[number] * self._sizes[number] / self.total, work)
        self._runs.setdefault(key, []).append(stored.runs[number])
        self._again |= stored.again
        if work not in self.spending.free:
            self._paid.add(number)
        return Measurement(stored.sums.numpy(), stored.counts.numpy()).first(self._ends[number])

    def _run(self, batch: Batch) -> Run | None:
        """The model as it stands; some metrics run it by themselves."""
        return None if self.metric.runs_model else run(self.context.model, batch)

    def _reference(self, number: int) -> tuple["_Reference", int]:
        """What the unquantized model does on a batch; kept, for the first batches, up to `REFERENCE_BYTES` of logits.

        Which ones are kept, and so what plans cost, does not depend on the order in which batches are run.

        Returns:
            predictions and sums, and how many runs are to be charged for them.
        """
        if number in self._references:
            return self._references[number], 0
        model, batch, size = self.context.model, self.batches[number], self._sizes[number]
        with torch.no_grad():
            found = self._run(batch)
            sums, _ = self.metric.of(model, batch, found, None)
        if found is not None and not torch.isfinite(found.rows).all():
            raise EstimatorError(
                f"the output of the unquantized model is not finite ({self.name} part, batch {number}): nan or inf in the data?"
            )
        if found is not None and not self.metric.reads_output:
            found = replace(found, output=None)
        made = _Reference(found, sums)
        fits = made.bytes / size * sum(self._sizes[: number + 1]) <= REFERENCE_BYTES
        if fits:
            self._references[number] = made
        self._again |= not fits
        self.context.passes.add(self.total, forward=size)
        charged = number not in self._paid or not fits
        self._paid.add(number)
        return made, int(charged)

    def _key(self, columns: tuple[int, ...]) -> PlanKey:
        return PlanKey(self.name, tuple(str(self.context.precisions[p]) for p in columns))


@dataclass(frozen=True, eq=False)
class _Reference:
    """Of the unquantized model on one batch."""

    run: Run | None
    sums: Floats

    @property
    def bytes(self) -> int:
        """Size of what is kept."""
        return 0 if self.run is None else self.run.bytes


@dataclass(frozen=True, eq=False)
class Made:
    """A plan as it is put into the model."""

    values: dict[nn.Parameter, Tensor]
    functions: dict[nn.Module, Callable[[Tensor], Tensor]]
