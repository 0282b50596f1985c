"""Plans of little damage all over the range of a resource."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpsearch.plan_search.early_end import EarlyEnd
from mpsearch.plan_search.evaluator import Measurement
from mpsearch.plan_search.goals import WholeFront
from mpsearch.plan_search.proposers import Columns
from mpsearch.plan_search.strategies.filling import filled
from mpsearch.plan_search.strategies.finalists import best_plan
from mpsearch.plan_search.strategies.limits import attainable, run_until, search_at
from mpsearch.plan_search.strategies.search_context import SearchContext
from mpsearch.plan_search.strategies.strategy import Outcome
from mpsearch.plan_search.strategies.uniform import best_uniform, next_uniform, verdict_of_damage
from mpsearch.plan_search.task import SearchTask
from mpsearch.plan_search.verdict import Verdict

#: Limits that plans are looked for at.
_LIMITS = 10


@dataclass(frozen=True)
class FrontStrategy:
    """Short searches at limits spread over the attainable range; the plan is that within the budget, or at the middle.

    Attributes:
        goal: resource, and the budget of the chosen plan.
    """

    goal: WholeFront
    mixes: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    falls_back: ClassVar[bool] = True

    def least_plans(self, precisions: int) -> int:
        """See `Strategy.least_plans`; every uniform precision is measured."""
        return 2 + precisions

    def early_end(self, task: SearchTask) -> EarlyEnd | None:
        """See `Strategy.early_end`."""
        return None

    def run(self, context: SearchContext, earlier: list[Columns]) -> Outcome:
        """See `Strategy.run`."""
        resource, budget, evaluators = self.goal.resource, self.goal.budget, context.evaluators
        with context.task.passes.stage("plans"):
            limits = _spread(*attainable(context, resource))
            context.measure_uniform_plans()
            middle = limits[len(limits) // 2]
            search = search_at(context, resource, middle) if budget is None else context.open(budget)
            for number, limit in enumerate(limits):
                if evaluators.spent():
                    break
                stop = evaluators.passes.left - evaluators.free / (len(limits) + 1 - number)
                run_until(context, search_at(context, resource, limit), stop)
            search.adopt(context.known(search))
            if budget is not None:
                search = filled(context, search)
            uniform = best_uniform(context, search.record)
            plan = best_plan(context, search, uniform)
        return Outcome(search, plan, uniform, next_uniform(context, search.record))

    def verdict(self, context: SearchContext, outcome: Outcome, measurements: Mapping[str, Measurement]) -> Verdict:
        """See `Strategy.verdict`."""
        return verdict_of_damage(context, outcome, measurements)

    def tie_limits(self, usage: Mapping[str, float]) -> dict[str, Any]:
        """See `Strategy.tie_limits`; without a budget the resource at what the plan uses."""
        return dict(self.goal.budget or {self.goal.resource: usage[self.goal.resource]})


def _spread(low: float, high: float) -> list[float]:
    """Limits between two ends, in equal ratios where there are such.

    >>> [round(limit) for limit in _spread(1.0, 2048.0)]
    [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    """
    points = np.geomspace(low, high, _LIMITS + 2) if low > 0 else np.linspace(low, high, _LIMITS + 2)
    return [float(limit) for limit in points[1:-1]]
