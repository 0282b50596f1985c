"""The uniform precisions that a plan is compared with."""

import math
from collections.abc import Mapping

from mpsearch.plan_search.evaluator import Measurement
from mpsearch.plan_search.proposers import Columns, Record
from mpsearch.plan_search.strategies.search_context import SearchContext
from mpsearch.plan_search.strategies.strategy import Outcome
from mpsearch.plan_search.verdict import Verdict, verdict


def best_uniform(context: SearchContext, record: Record) -> Columns | None:
    """The uniform precision that does the least damage of those that fit; None where none does."""
    fitting = [plan for plan in context.uniform_plans() if record.fits(plan) and tuple(plan.tolist()) in record.damage]
    return min(fitting, key=lambda plan: record.damage[tuple(plan.tolist())], default=None)


def next_uniform(context: SearchContext, record: Record) -> Columns | None:
    """The cheapest uniform precision that does not fit."""
    beyond = [plan for plan in context.uniform_plans() if not record.fits(plan)]
    resource = context.task.goal.resource
    return min(beyond, key=lambda plan: context.use(resource, plan), default=None)


def verdict_of_damage(context: SearchContext, outcome: Outcome, measurements: Mapping[str, Measurement]) -> Verdict:
    """Whether the plan does less damage on the report part than the best uniform precision that fits."""
    name, difference, se, same = None, math.nan, math.nan, False
    if outcome.uniform is not None:
        name = context.uniform_name(outcome.uniform)
        difference, se = measurements["uniform"].over(measurements["plan"])
        same = bool((outcome.uniform == outcome.plan).all())
    return verdict(context.task.choice.metric.counted_in, name, difference, se, chosen=same)
