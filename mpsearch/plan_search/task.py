"""What a search is asked, and on what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpsearch.calibration.calibration import Calibration
from mpsearch.core.table import CostTable
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimator
from mpsearch.metrics.choice import MetricChoice
from mpsearch.models.running import Batch, samples
from mpsearch.plan_search.goals import Goal
from mpsearch.plan_search.passes import PassBudget
from mpsearch.plan_search.schedule import Schedule


@dataclass(frozen=True, eq=False)
class SearchTask:
    """All that is settled before the first pass for tables and plans.

    Attributes:
        calibration: the prepared model, on the score part.
        context: model, score part, decisions, precisions, quantizer, checkpoint.
        parts: `score`, `select`, `report` -> batches.
        base: layers and resources, sensitivity 0; nan where an option is not allowed.
        choice: what is measured.
        goal: what is asked for.
        passes: what may be spent, and is charged.
        seed: of all draws.
        estimators: tables to start from instead of the default ones, or None.
        schedule: who proposes plans.
    """

    calibration: Calibration
    context: Context
    parts: Mapping[str, list[Batch]]
    base: CostTable
    choice: MetricChoice
    goal: Goal
    passes: PassBudget
    seed: int
    estimators: Sequence[Estimator] | None
    schedule: Schedule

    @property
    def total(self) -> int:
        """Samples of all parts: a pass is a run over so many."""
        return sum(size(part) for part in self.parts.values())

    def share(self, part: str) -> float:
        """The part's share of all samples, the passes that one run over it takes."""
        return size(self.parts[part]) / self.total


def size(batches: Sequence[Batch]) -> int:
    """Number of samples."""
    return sum(map(samples, batches))
