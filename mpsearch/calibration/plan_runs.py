"""The one loop that measures plans: plans x batches -> sums over samples, beside the unquantized model on the same batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import nn

from mpsearch.calibration.plan_in_model import PlanInModel
from mpsearch.calibration.streamed_plan_runs import runs_in_blocks
from mpsearch.errors import EstimatorError
from mpsearch.metrics.metric import Floats
from mpsearch.metrics.runs import Run, run
from mpsearch.models.head import OutputLayer
from mpsearch.models.running import Batch
from mpsearch.models.streaming.blocks import Blocks


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
        sums_and_counts = reader.read(model, batch, whole, None)
    if sums_and_counts is None:
        raise EstimatorError(f"the output of the unquantized model is not finite ({place}): nan or inf in the data?")
    return Reference(whole, sums_and_counts[0])


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
        sums_and_counts = reader.read(model, batch, _run(model, batch, reader, layer), reference.run)
    if sums_and_counts is not None:
        damage = Damage(reader.damage(sums_and_counts[0], reference.sums), sums_and_counts[1])
        if np.isfinite(damage.sums).all():
            return damage
    raise EstimatorError(f"the damage of a plan is not finite ({place}): {plan.name}")


def plan_runs(
    model: nn.Module,
    batches: Sequence[Batch],
    plans: Sequence[PlanInModel],
    unquantized: Reader,
    readers: Sequence[Reader],
    layer: OutputLayer | None = None,
    blocks: Blocks | None = None,
) -> Iterator[tuple[int, int | None, Damage | None]]:
    """All plans on all batches, batch by batch; the unquantized model runs once a batch.

    Args:
        model: without any plan.
        batches: B batches.
        plans: N plans.
        unquantized: reads the unquantized model.
        readers: N, one a plan; the same for all where nothing is added up in them.
        layer: that makes the output, where hidden states are to be held in place of many logits.
        blocks: of a model whose weights lie elsewhere: each is read once for all plans and batches, with the same results. Without them,
            and for a reader that runs the model itself, each run reads all weights.

    Yields:
        batch, plan, damage of the plan on the batch; for the unquantized model, which comes first, plan and damage are None.
    """
    if blocks is None or any(reader.runs_model for reader in (unquantized, *readers)):
        runs = _whole_runs(batches, plans)
    else:
        runs = runs_in_blocks(blocks, batches, plans)
    for number, plan, plan_number in runs:
        place = f"batch {number}"
        if plan_number is None:
            reference = unquantized_run(model, batches[number], unquantized, place, layer)
            yield number, None, None
        else:
            reader = readers[plan_number]
            yield number, plan_number, plan_run(model, batches[number], plan, reader, reference, place, layer)


def _whole_runs(
    batches: Sequence[Batch], plans: Sequence[PlanInModel]
) -> Iterator[tuple[int, PlanInModel, int | None]]:
    """As `runs_in_blocks`, with each plan still to be put in."""
    for number in range(len(batches)):
        yield number, PlanInModel({}, {}, "the unquantized model"), None
        for plan_number, plan in enumerate(plans):
            yield number, plan, plan_number
