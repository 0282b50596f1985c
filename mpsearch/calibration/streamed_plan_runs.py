"""Plans measured on a model whose weights lie elsewhere: block by block, each read once for all plans and batches."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpsearch.calibration.plan_in_model import PlanInModel
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
        batches: that are run.
    """
    if blocks is None:
        return 2**30
    return max(1, STATE_BYTES // max(blocks.state_bytes(batches), 1) - 1)  # the model itself has a state too
