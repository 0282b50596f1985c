"""The least damage within a budget."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mpsearch.core.problem import Problem
from mpsearch.errors import warn
from mpsearch.plan_search.early_end import EarlyEnd, early_end
from mpsearch.plan_search.evaluator import Measurement
from mpsearch.plan_search.goals import WithinBudget
from mpsearch.plan_search.proposers import Columns
from mpsearch.plan_search.strategies.filling import filled
from mpsearch.plan_search.strategies.finalists import best_plan
from mpsearch.plan_search.strategies.search_context import SearchContext
from mpsearch.plan_search.strategies.strategy import Outcome
from mpsearch.plan_search.strategies.uniform import best_uniform, next_uniform, verdict_of_damage
from mpsearch.plan_search.task import SearchTask
from mpsearch.plan_search.verdict import Verdict


@dataclass(frozen=True)
class BudgetStrategy:
    """One search within the budget, and the best of its finalists.

    Attributes:
        goal: the budget.
    """

    goal: WithinBudget
    mixes: ClassVar[bool] = True
    bounded: ClassVar[bool] = True
    falls_back: ClassVar[bool] = True

    def least_plans(self, precisions: int) -> int:
        """See `Strategy.least_plans`."""
        return 2

    def early_end(self, task: SearchTask) -> EarlyEnd | None:
        """See `Strategy.early_end`."""
        end = early_end(Problem.of(task.base, self.goal.budget))
        if end is not None:
            warn(f"{end.reason}: it is measured, and nothing is searched")
        return end

    def run(self, context: SearchContext, earlier: list[Columns]) -> Outcome:
        """See `Strategy.run`."""
        with context.task.passes.stage("plans"):
            search = context.open(self.goal.budget)
            if earlier:
                search.adopt([columns for columns in earlier if search.record.fits(columns)])
            search = filled(context, search)
        uniform = best_uniform(context, search.record)
        with context.task.passes.stage("finalists"):
            plan = best_plan(context, search, uniform)
        return Outcome(search, plan, uniform, next_uniform(context, search.record))

    def verdict(self, context: SearchContext, outcome: Outcome, measurements: Mapping[str, Measurement]) -> Verdict:
        """See `Strategy.verdict`."""
        return verdict_of_damage(context, outcome, measurements)

    def tie_limits(self, usage: Mapping[str, float]) -> dict[str, Any]:
        """See `Strategy.tie_limits`."""
        return dict(self.goal.budget)
