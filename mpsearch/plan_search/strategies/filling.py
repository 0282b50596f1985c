"""A search within one budget, until the passes for plans are spent."""

from dataclasses import replace

import numpy as np

from mpsearch.plan_search.loop import PlanSearch
from mpsearch.plan_search.strategies.search_context import SearchContext

#: Plans that the first proposers are asked for.
_FIRST = 3
#: Share of the passes for plans that goes to the search between the samples, and how many plans it starts from.
_BETWEEN, _OPENING = 0.45, 8


def filled(context: SearchContext, search: PlanSearch) -> PlanSearch:
    """Propose and measure until only the reserve is left, the last part of it between the samples too.

    The last third of the first search goes to the later proposers, by default moves around the best plan and crosses of the best plans
    too.

    Returns:
        the search that ended: the one between the samples, where there is one.
    """
    evaluators, schedule = context.evaluators, context.task.schedule
    stop = evaluators.reserve + (0.0 if evaluators.between is None else evaluators.free * _BETWEEN)

    def enough(rest: float = 0.0) -> bool:
        return evaluators.passes.left < max(stop, evaluators.reserve + evaluators.select.price) + rest

    search.run(schedule.first, enough, most=_FIRST)
    third = (evaluators.passes.left - stop) / 3
    search.run(schedule.early, lambda: enough(third))
    search.run(schedule.late, enough)
    return search if evaluators.between is None else _between(context, search)


def _between(context: SearchContext, first: PlanSearch) -> PlanSearch:
    """A second search, from the best plans of the first, for the least sum of the damage on the data and between its samples."""
    evaluators = context.evaluators
    damage = first.record.damage
    record = replace(first.record, measured={}, damage=dict(damage))
    second = PlanSearch(record, first.prior, evaluators.select, evaluators.between, evaluators.drawn)
    complete = [key for key in damage if evaluators.select.complete(np.array(key))]
    best = sorted(complete, key=damage.__getitem__)[:_OPENING]
    second.open([np.array(key) for key in best], evaluators.spent)
    second.run(context.task.schedule.late, evaluators.spent)
    return second
