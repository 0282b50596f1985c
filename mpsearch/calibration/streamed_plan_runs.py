"""Plans measured on a model whose weights lie elsewhere: block by block, each read once for all plans and batches."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from mpsearch.calibration.plan_runs import Damage, PlanInModel, Reader, plan_run, plan_runs, unquantized_run
from mpsearch.models.head import OutputLayer
from mpsearch.models.running import Batch
from mpsearch.models.streaming.blocks import Blocks

#: Hidden states of all plans of one reading, in memory and on disk.
STATE_BYTES = 8 * 2**30


@dataclass(frozen=True, eq=False)
class PlanByBlocks:
    """A plan as a `Variant` of the blocks of a model.

    Attributes:
        parts: (K + 2,) what it changes in each segment.
        first: the first segment that it changes; K + 1 where it changes nothing before.
    """

    parts: Sequence[PlanInModel]
    first: int

    @classmethod
    def of(cls, plan: PlanInModel, blocks: Blocks) -> "PlanByBlocks":
        """A plan, cut up."""
        parts = [plan.within(*blocks.modules(segment)) for segment in range(blocks.number + 2)]
        changed = [segment for segment, part in enumerate(parts) if part.values or part.functions]
        return cls(parts, min(changed, default=blocks.number + 1))

    def inside(self, segment: int) -> contextlib.AbstractContextManager[object]:
        """See `Variant.inside`."""
        return self.parts[segment].inside()


def streamed_plan_runs(
    model: nn.Module,
    blocks: Blocks | None,
    batches: Sequence[Batch],
    plans: Sequence[PlanInModel],
    unquantized: Reader,
    readers: Sequence[Reader],
    layer: OutputLayer | None = None,
) -> Iterator[tuple[int, int | None, Damage | None]]:
    """`plan_runs` with the same results, that reads each block once for all plans and batches.

    Without blocks, and for a metric that runs the model itself, it is `plan_runs`: of a model whose weights lie elsewhere each run reads
    them all.

    Args:
        model: without any plan.
        blocks: of the model, or None.
        batches: B batches.
        plans: N plans.
        unquantized: reads the unquantized model.
        readers: N, one a plan; the same for all where nothing is added up in them.
        layer: that makes the output, where hidden states are to be held in place of many logits.

    Yields:
        as `plan_runs`.
    """
    if blocks is None or any(reader.runs_model for reader in (unquantized, *readers)):
        yield from plan_runs(model, batches, plans, unquantized, readers, layer)
        return
    for number, there, plan in runs_in_blocks(blocks, batches, plans):
        place = f"batch {number}"
        if plan is None:
            reference = unquantized_run(model, batches[number], unquantized, place, layer)
            yield number, None, None
        else:
            yield number, plan, plan_run(model, batches[number], there, readers[plan], reference, place, layer)


def runs_in_blocks(
    blocks: Blocks, batches: Sequence[Batch], plans: Sequence[PlanInModel]
) -> Iterator[tuple[int, PlanInModel, int | None]]:
    """Each plan on each batch, and first of a batch the unquantized model.

    Args:
        blocks: of the model.
        batches: B batches.
        plans: N plans.

    Yields:
        number of the batch; a plan that changes nothing, to run the model with: it is in the model already; number of the plan that is,
        or None for the unquantized model.
    """
    for variant, number in blocks.runs(batches, [PlanByBlocks.of(plan, blocks) for plan in plans]):
        name = "the unquantized model" if variant is None else plans[variant].name
        yield number, PlanInModel({}, {}, name), variant


def plans_at_once(blocks: Blocks | None, batches: Sequence[Batch]) -> int:
    """How many plans fit into one reading: their hidden states take no more than `STATE_BYTES`; without blocks any number.

    Args:
        blocks: of the model, or None.
        batches: that are run, the first of them about as large as the others.
    """
    if blocks is None:
        return 2**30
    with blocks.resident(0):
        _, hidden = blocks.enter(batches[0])
    each_bytes = hidden.numel() * hidden.element_size() * len(batches)
    return max(1, STATE_BYTES // max(each_bytes, 1) - 1)  # the model itself has a state too
