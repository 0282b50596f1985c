"""What a strategy promises, and what it ends with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from mpsearch.plan_search.early_end import EarlyEnd
from mpsearch.plan_search.evaluator import Measurement
from mpsearch.plan_search.loop import PlanSearch
from mpsearch.plan_search.proposers import Columns
from mpsearch.plan_search.strategies.search_context import SearchContext
from mpsearch.plan_search.task import SearchTask
from mpsearch.plan_search.verdict import Verdict


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a strategy ends with, before the report part is touched.

    Attributes:
        search: the last search, with all that it learned.
        plan: the best plan.
        uniform: the uniform precision that it is compared with; None where none fits.
        above: the cheapest uniform precision that does not fit, or None.
        reason: why nothing was searched, or empty.
    """

    search: PlanSearch
    plan: Columns
    uniform: Columns | None
    above: Columns | None = None
    reason: str = ""


class Strategy(Protocol):
    """How plans are looked for under one kind of goal: one file a strategy, named in `STRATEGIES` beside its goal.

    Attributes:
        mixes: whether plans are measured between the samples too, where metric and data have that.
        bounded: whether the optimum of the learned table bounds the damage of the plan.
        falls_back: whether the uniform precision is returned where the report finds it better.
    """

    mixes: ClassVar[bool]
    bounded: ClassVar[bool]
    falls_back: ClassVar[bool]

    def least_plans(self, precisions: int) -> int:
        """How many plans are measured at least, with so many precisions on offer."""
        ...

    def early_end(self, task: SearchTask) -> EarlyEnd | None:
        """The one plan that is left to take, where no search is needed."""
        ...

    def run(self, context: SearchContext, earlier: list[Columns]) -> Outcome:
        """Look for plans until the passes are spent.

        Args:
            context: task, evaluators, tables.
            earlier: plans that an earlier search measured.

        Raises:
            InfeasibleError: where no measured plan reaches the goal.
            SolverError: where the tables lead to no plan within the limits.
        """
        ...

    def verdict(self, context: SearchContext, outcome: Outcome, measurements: Mapping[str, Measurement]) -> Verdict:
        """Say whether mixed precision is worth it.

        Args:
            context: of the search.
            outcome: of the search.
            measurements: `plan`, and where there is one `uniform`, on the report part.
        """
        ...

    def tie_limits(self, usage: Mapping[str, float]) -> dict[str, Any]:
        """Limits at which ties are priced.

        Args:
            usage: of the plan.
        """
        ...
