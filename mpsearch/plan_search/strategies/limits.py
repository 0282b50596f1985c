"""Short searches at limits on one resource."""

import numpy as np

from mpsearch.allocation.solving import solve
from mpsearch.core.budget import Budget
from mpsearch.core.problem import Problem
from mpsearch.plan_search.loop import PlanSearch
from mpsearch.plan_search.strategies.search_context import SearchContext


def search_at(context: SearchContext, resource: str, limit: float) -> PlanSearch:
    """A search within a limit on one resource and the rest of the budget, that knows what was measured before."""
    search = context.open(Budget(**_others(context, resource), **{resource: limit}), uniforms=False)
    search.adopt(context.known(search))
    return search


def run_until(context: SearchContext, search: PlanSearch, stop: float, tolerance: float | None = None) -> None:
    """Measure what the proposers for limits name.

    Args:
        context: where plans are measured.
        search: to be gone on with.
        stop: passes that are to be left.
        tolerance: damage at which it is enough, or None.
    """

    def enough() -> bool:
        reached = tolerance is not None and search.least <= tolerance
        return reached or context.evaluators.spent() or context.evaluators.passes.left < stop

    search.run(context.task.schedule.at_limits, enough)


def attainable(context: SearchContext, resource: str) -> tuple[float, float]:
    """Least and most use of a resource within the rest of the budget."""
    base = context.task.base
    least = solve(base, Budget(**_others(context, resource)), minimize=resource)
    most = np.nanargmax(Problem.of(base, Budget(), resource).objective, axis=1)
    return least.usage[resource], context.use(resource, most)


def _others(context: SearchContext, resource: str) -> Budget:
    """The budget without its limit on a resource."""
    return Budget(**{name: value for name, value in (context.task.goal.budget or {}).items() if name != resource})
