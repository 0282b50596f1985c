"""The least use of a resource within a tolerated damage."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpsearch.core.budget import Budget
from mpsearch.core.problem import Problem
from mpsearch.errors import InfeasibleError
from mpsearch.plan_search.early_end import EarlyEnd
from mpsearch.plan_search.evaluator import Measurement
from mpsearch.plan_search.goals import LeastResource
from mpsearch.plan_search.loop import PlanSearch
from mpsearch.plan_search.proposers import Columns
from mpsearch.plan_search.strategies.limits import attainable, run_until, search_at
from mpsearch.plan_search.strategies.search_context import SearchContext
from mpsearch.plan_search.strategies.strategy import Outcome
from mpsearch.plan_search.task import SearchTask
from mpsearch.plan_search.verdict import Verdict, tolerance_verdict

#: Steps of the bisection on the use of the resource.
_STEPS = 7


@dataclass(frozen=True)
class ToleranceStrategy:
    """Bisection on the limit of the resource, with a short search at each.

    Attributes:
        goal: resource, tolerance, and limits on other resources.
    """

    goal: LeastResource
    mixes: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    falls_back: ClassVar[bool] = False

    def least_plans(self, precisions: int) -> int:
        """See `Strategy.least_plans`; every uniform precision is measured."""
        return 2 + precisions

    def early_end(self, task: SearchTask) -> EarlyEnd | None:
        """See `Strategy.early_end`."""
        return None

    def run(self, context: SearchContext, earlier: list[Columns]) -> Outcome:
        """See `Strategy.run`."""
        with context.task.passes.stage("plans"):
            search = self._cheapest_search(context)
        resource, known = self.goal.resource, context.evaluators.select.known
        within = self._within(context)
        plan = min(within, key=lambda o: (context.use(resource, o), known[tuple(o.tolist())].value))
        keys = {tuple(columns.tolist()) for columns in within}
        uniforms = [columns for columns in context.uniform_plans() if tuple(columns.tolist()) in keys]
        return Outcome(search, plan, min(uniforms, key=lambda o: context.use(resource, o), default=None))

    def verdict(self, context: SearchContext, outcome: Outcome, measurements: Mapping[str, Measurement]) -> Verdict:
        """See `Strategy.verdict`."""
        resource = self.goal.resource
        name, uniform_use, same = None, math.nan, False
        if outcome.uniform is not None:
            name = context.uniform_name(outcome.uniform)
            uniform_use = context.use(resource, outcome.uniform)
            same = np.array_equal(outcome.uniform, outcome.plan)
        return tolerance_verdict(
            resource,
            context.use(resource, outcome.plan),
            name,
            uniform_use,
            self.goal.tolerance,
            measurements["plan"].value,
            measurements["plan"].se,
            context.task.choice.metric.counted_in,
            chosen=same,
        )

    def tie_limits(self, usage: Mapping[str, float]) -> dict[str, Any]:
        """See `Strategy.tie_limits`; the resource at what the plan uses."""
        return {**(self.goal.budget or {}), self.goal.resource: usage[self.goal.resource]}

    def _cheapest_search(self, context: SearchContext) -> PlanSearch:
        """The search at the lowest limit at which a plan within the tolerance is known."""
        resource, tolerance, evaluators = self.goal.resource, self.goal.tolerance, context.evaluators
        low, high = attainable(context, resource)
        context.measure_uniform_plans()
        each = evaluators.free / (_STEPS + 1)
        cheapest: PlanSearch | None = None
        least = math.inf
        for step in range(_STEPS + 1):
            limit = high if step == 0 else math.sqrt(low * high) if low > 0 else (low + high) / 2
            search = search_at(context, resource, limit)
            run_until(context, search, evaluators.passes.left - each, tolerance)
            least = min(least, search.least)
            if search.least <= tolerance:
                cheapest, high = search, min(context.use(resource, columns) for columns in self._within(context))
            else:
                low = limit
            if cheapest is None or high - low <= 1e-3 * high or evaluators.spent():
                break
        if cheapest is None:
            raise InfeasibleError(
                f"no measured plan stays within the tolerance of {tolerance:.6g}: the least damage measured is {least:.6g}"
            )
        return cheapest

    def _within(self, context: SearchContext) -> list[Columns]:
        """Plans within the rest of the budget that are known to do no more damage than is tolerated, on the whole select part."""
        problem = Problem.of(context.task.base, self.goal.budget or Budget())
        select = context.evaluators.select
        plans = [np.array(key) for key, measurement in select.known.items() if measurement.value <= self.goal.tolerance]
        return [columns for columns in plans if select.complete(columns) and problem.feasible(columns)]
