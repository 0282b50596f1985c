"""The plan that is taken among the best few."""

import math

import numpy as np

from mpsearch.plan_search.evaluator import Measurement
from mpsearch.plan_search.loop import PlanSearch
from mpsearch.plan_search.proposers import Columns
from mpsearch.plan_search.strategies.search_context import SearchContext

#: Standard errors of the difference within which plans are as good as the best one.
_AS_GOOD = 1.0


def best_plan(context: SearchContext, search: PlanSearch, uniform: Columns | None) -> Columns:
    """The best plan on the select part, or of the best few the one that is best on more samples.

    Those are the score part, where few passes are spent. Where samples between the samples are measured, the plan with the least sum of
    the two damages is taken among all that are no worse than the best one on the select part by `_AS_GOOD` standard errors of the
    difference, as in the rule of one standard error (Breiman et al., Classification and Regression Trees, 1984, 3.4.3), and no worse
    than uniform precision there.

    Args:
        context: where plans are measured.
        search: whose plans they are.
        uniform: the best uniform precision that fits, or None.
    """
    evaluators, record = context.evaluators, search.record
    select = evaluators.select
    most = math.inf if uniform is None else record.damage[tuple(uniform.tolist())]
    ranked = sorted(
        (
            key
            for key, damage in record.damage.items()
            if damage <= most and record.fits(np.array(key)) and select.complete(np.array(key))
        ),
        key=record.damage.__getitem__,
    )
    if evaluators.score is not None:
        top = [np.array(key) for key in ranked[: evaluators.finalists]]
        scored = evaluators.score.measure_together(top)
        joined = [_joined(select.measure(columns), score).value for columns, score in zip(top, scored, strict=True)]
        return top[int(np.argmin(joined))]
    if evaluators.between is None:
        return np.array(ranked[0])
    best = select.known[ranked[0]]
    as_good = []
    for key in ranked:
        worse, se = select.known[key].over(best)
        if worse <= _AS_GOOD * se and key in record.measured:
            as_good.append(key)
    top = [np.array(key) for key in sorted(as_good, key=record.measured.__getitem__)[: max(evaluators.finalists, 1)]]
    if len(top) == 1:
        return top[0]
    between = evaluators.between.measure_together(top)
    sums = [select.measure(columns).value + part.value for columns, part in zip(top, between, strict=True)]
    return top[int(np.argmin(sums))]


def _joined(first: Measurement, second: Measurement) -> Measurement:
    return Measurement(np.append(first.sums, second.sums), np.append(first.counts, second.counts))
