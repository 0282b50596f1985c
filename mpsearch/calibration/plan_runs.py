"""The one loop that measures plans: plans x batches -> sums over samples, beside the unquantized model on the same batches."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.metrics.metric import Floats
from mpsearch.metrics.runs import Run, run
from mpsearch.models.head import OutputLayer
from mpsearch.models.modules.weights import holds_weight, layer_of, sole_readers, weight_of
from mpsearch.models.running import Batch
from mpsearch.quantizers.fake_quantization import Ranges, input_quantizers, inputs, weights, weights_for_calls
from mpsearch.quantizers.quantizer import Quantizer
from mpsearch.quantizers.rounded_weights import RoundedWeights


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
    """A plan as it is put into a model; it holds no weights, but what makes them.

    Attributes:
        values: parameter -> what makes its quantized value.
        functions: what the inputs of modules pass through.
        name: for messages.
        readers: parameter -> the modules whose calls alone read it: it has its value for their calls. Of other parameters the value is
            there as long as the plan is in the model.
    """

    values: Mapping[nn.Parameter, Callable[[], Tensor]]
    functions: Mapping[nn.Module, Callable[[Tensor], Tensor]]
    name: str = "the plan"
    readers: Mapping[nn.Parameter, Sequence[nn.Module]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        precisions: Mapping[str, Precision],
        rounded: RoundedWeights,
        quantizer: Quantizer,
        ranges: Ranges,
        name: str,
    ) -> "PlanInModel":
        """A plan over the layers of a model; its weights are rounded now, where they were not before.

        Args:
            model: without any plan.
            precisions: layer name -> precision; tied layers agree.
            rounded: where rounded weights are held.
            quantizer: of weights and inputs.
            ranges: of the inputs.
            name: for messages.
        """
        values: dict[nn.Parameter, Callable[[], Tensor]] = {}
        unpacked: set[nn.Parameter] = set()
        for layer, precision in precisions.items():
            module = layer_of(model, layer)
            if not precision.quantizes_weight or not holds_weight(module) or weight_of(module) in values:
                continue
            weight = weight_of(module)
            values[weight] = functools.partial(rounded.value, module, layer, precision, quantizer)
            rounded.prepare(module, layer, precision, quantizer)
            if not weight.is_meta and not rounded.holds(
                module, precision
            ):  # others take values in for calls by themselves
                unpacked.add(weight)
        alone = sole_readers(model) if unpacked else {}
        readers = {weight: alone[weight] for weight in unpacked if weight in alone}
        return cls(values, input_quantizers(model, precisions, quantizer, ranges), name, readers)

    @contextlib.contextmanager
    def inside(self, *read: nn.Module) -> Iterator[None]:
        """The model with the plan in it.

        Args:
            *read: modules whose weights are read apart from their calls.
        """
        apart = {weight for module in read for weight in module.parameters(recurse=False)}
        by_call = {parameter: self.values[parameter] for parameter in self.readers if parameter not in apart}
        rest = {parameter: make for parameter, make in self.values.items() if parameter not in by_call}
        with weights(rest), weights_for_calls(by_call, self.readers), inputs(self.functions):
            yield

    def within(self, *modules: nn.Module) -> "PlanInModel":
        """What of the plan lies in some modules.

        Args:
            *modules: with all that is in them.
        """
        parts = {part for module in modules for part in module.modules()}
        parameters = {weight for part in parts for weight in part.parameters(recurse=False)}
        return PlanInModel(
            {parameter: make for parameter, make in self.values.items() if parameter in parameters},
            {module: function for module, function in self.functions.items() if module in parts},
            self.name,
            {parameter: readers for parameter, readers in self.readers.items() if parameter in parameters},
        )


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
    with torch.no_grad(), plan.inside(*([] if layer is None else [layer.module])):
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
