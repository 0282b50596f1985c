"""The one loop that measures plans: plans x batches -> sums over samples, beside the unquantized model on the same batches."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.metrics.metric import Floats
from mpsearch.metrics.runs import Run, run
from mpsearch.models.head import OutputLayer
from mpsearch.models.modules.weights import holds_weight, layer_of, weight_of
from mpsearch.models.running import Batch
from mpsearch.quantizers.fake_quantization import Ranges, input_quantizers, inputs, quantized_weights, weights
from mpsearch.quantizers.quantizer import Quantizer


class Reader(Protocol):
    """What is read of a model on a batch: a `Metric`, or several of them added up (`mpsearch.calibration.tally.Tally`)."""

    @property
    def runs_model(self) -> bool:
        """It runs the model itself, and is handed no run."""
        ...

    @property
    def reads_output(self) -> bool:
        """It looks at all that the model returns."""
        ...

    def read(
        self, model: nn.Module, batch: Batch, outcome: Run | None, reference: Run | None
    ) -> tuple[Floats, Floats] | None:
        """(n,) sums and (n,) weights of the samples; see `Metric.read`."""
        ...

    def damage(self, sums: Floats, unquantized: Floats) -> Floats:
        """(n,) the rise over the unquantized model, from the sums of both."""
        ...


@dataclass(frozen=True, eq=False)
class PlanInModel:
    """A plan as it is put into a model.

    Attributes:
        values: quantized values of weights.
        functions: what the inputs of modules pass through.
        name: for messages.
    """

    values: Mapping[nn.Parameter, Tensor]
    functions: Mapping[nn.Module, Callable[[Tensor], Tensor]]
    name: str = "the plan"

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The model with the plan in it."""
        with weights(self.values), inputs(self.functions):
            yield


@dataclass(frozen=True, eq=False)
class Reference:
    """The unquantized model on one batch.

    Attributes:
        run: what it makes of the batch; None for a reader that runs the model itself.
        sums: (n,) over samples.
    """

    run: Run | None
    sums: Floats

    @property
    def bytes(self) -> int:
        """Size of what is held."""
        return 0 if self.run is None else self.run.bytes


@dataclass(frozen=True, eq=False)
class Damage:
    """A plan on one batch: (n,) sums over the predictions of each sample, and the (n,) weights of the samples."""

    sums: Floats
    counts: Floats


def unquantized_run(
    model: nn.Module, batch: Batch, reader: Reader, place: str, layer: OutputLayer | None = None
) -> Reference:
    """The unquantized model on one batch.

    Args:
        model: without any plan.
        batch: the batch.
        reader: of the outputs.
        place: where the batch stands, for messages: `select part, batch 3`.
        layer: that makes the output, where hidden states are to be held in place of many logits.

    Raises:
        EstimatorError: where the output is not finite.
    """
    with torch.no_grad():
        whole = _run(model, batch, reader, layer)
        found = reader.read(model, batch, whole, None)
    if found is None:
        raise EstimatorError(f"the output of the unquantized model is not finite ({place}): nan or inf in the data?")
    return Reference(whole, found[0])


def _run(model: nn.Module, batch: Batch, reader: Reader, layer: OutputLayer | None) -> Run | None:
    """What a reader is handed."""
    if reader.runs_model:
        return None
    if reader.reads_output:
        return run(model, batch)
    return replace(run(model, batch, layer), output=None)


def plan_run(
    model: nn.Module,
    batch: Batch,
    plan: PlanInModel,
    reader: Reader,
    reference: Reference,
    place: str,
    layer: OutputLayer | None = None,
) -> Damage:
    """A plan on one batch.

    Args:
        model: without any plan.
        batch: the batch.
        plan: put in for the run.
        reader: of the outputs.
        reference: of the same batch.
        place: where the batch stands, for messages.
        layer: as for the reference.

    Raises:
        EstimatorError: where output or damage are not finite.
    """
    with torch.no_grad(), plan.inside():
        found = reader.read(model, batch, _run(model, batch, reader, layer), reference.run)
    damage = None if found is None else Damage(reader.damage(found[0], reference.sums), found[1])
    if damage is None or not np.isfinite(damage.sums).all():
        raise EstimatorError(f"the damage of a plan is not finite ({place}): {plan.name}")
    return damage


def plan_runs(
    model: nn.Module,
    batches: Sequence[Batch],
    plans: Sequence[PlanInModel],
    unquantized: Reader,
    readers: Sequence[Reader],
    layer: OutputLayer | None = None,
) -> Iterator[tuple[int, int | None, Damage | None]]:
    """All plans on all batches, batch by batch; the unquantized model runs once a batch.

    Args:
        model: without any plan.
        batches: B batches.
        plans: N plans.
        unquantized: reads the unquantized model.
        readers: N, one a plan; the same for all where nothing is added up in them.
        layer: that makes the output, where hidden states are to be held in place of many logits.

    Yields:
        batch, plan, damage of the plan on the batch; for the unquantized model, which comes first, plan and damage are None.
    """
    for number, batch in enumerate(batches):
        place = f"batch {number}"
        reference = unquantized_run(model, batch, unquantized, place, layer)
        yield number, None, None
        for plan_number, (plan, reader) in enumerate(zip(plans, readers, strict=True)):
            yield number, plan_number, plan_run(model, batch, plan, reader, reference, place, layer)


@dataclass(eq=False)
class Cells:
    """Quantized weights of many plans, each held once for each precision that any plan gives it.

    Attributes:
        model: the model.
        quantizer: of weights and inputs.
        ranges: of the inputs.
    """

    model: nn.Module
    quantizer: Quantizer
    ranges: Ranges
    _values: dict[tuple[nn.Parameter, Precision], Tensor] = field(default_factory=dict)

    def plan(self, plan: Plan, name: str) -> PlanInModel:
        """A plan as it is put into the model."""
        values: dict[nn.Parameter, Tensor] = {}
        for layer, precision in plan.items():
            module = layer_of(self.model, layer)
            if not precision.quantizes_weight or not holds_weight(module):
                continue
            weight = weight_of(module)
            key = weight, replace(precision, activation="16")
            if key not in self._values:
                self._values[key] = quantized_weights(self.model, {layer: precision}, self.quantizer)[weight]
            values[weight] = self._values[key]
        return PlanInModel(values, input_quantizers(self.model, plan, self.quantizer, self.ranges), name)
