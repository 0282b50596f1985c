"""One search, from its task to its findings: tables, plans, report."""

from mpsearch.core.budget import Budget
from mpsearch.errors import EstimatorError
from mpsearch.plan_search.early_end import EarlyEnd
from mpsearch.plan_search.findings import Findings, findings
from mpsearch.plan_search.loop import PlanSearch
from mpsearch.plan_search.starting_tables import Scores, from_bits, scores, starting
from mpsearch.plan_search.strategies import Outcome, Strategy, strategy_of
from mpsearch.plan_search.strategies.evaluators import Evaluators
from mpsearch.plan_search.strategies.search_context import SearchContext, decision_of_layers
from mpsearch.plan_search.strategies.uniform import best_uniform, next_uniform
from mpsearch.plan_search.task import SearchTask


def searched(task: SearchTask) -> tuple[Findings, Scores]:
    """All stages, or the report alone where one plan is left to take.

    Returns:
        what was found, and what the search started from.

    Raises:
        EstimatorError: for too few passes, or an output that is not finite.
        InfeasibleError: where no measured plan reaches the goal.
    """
    strategy = strategy_of(task.goal)
    evaluators = Evaluators.of(task, mixes=strategy.mixes)
    end = strategy.early_end(task)
    if end is None:
        tables = _tables(task, strategy, evaluators)
        context = SearchContext.of(task, evaluators, tables)
        outcome = strategy.run(context, evaluators.select.recall())
    else:
        context = SearchContext.of(task, evaluators, from_bits(task.context))
        outcome = _only_plan(context, end)
    with task.passes.stage("report"):
        return findings(context, strategy, outcome), context.scores


def _tables(task: SearchTask, strategy: Strategy, evaluators: Evaluators) -> Scores:
    """What the score part says, as far as the passes allow."""
    share, passes = task.share("score"), task.passes
    room = passes.limit - _least_passes(task, strategy, evaluators, 0.0)
    start = starting(task.context, share, passes.limit, room, task.estimators, task.seed)
    _check_passes(task, strategy, evaluators, share * start.passes(task.context))
    with passes.stage("tables"):
        tables = scores(task.calibration, task.context, task.base, decision_of_layers(task), share, passes, start)
    _check_passes(task, strategy, evaluators, 0.0)  # estimators that do not tell what they take
    return tables


def _only_plan(context: SearchContext, end: EarlyEnd) -> Outcome:
    """The plan that is left to take, measured; no table is filled, rounding noise is the only signal."""
    record = context.record(context.task.goal.budget or Budget())
    search = PlanSearch(record, context.scores.prior, context.evaluators.select)
    with context.task.passes.stage("plans"):
        search.open([end.columns], context.evaluators.spent)
    return Outcome(search, end.columns, best_uniform(context, record), next_uniform(context, record), end.reason)


def _least_passes(task: SearchTask, strategy: Strategy, evaluators: Evaluators, tables: float) -> float:
    plans = strategy.least_plans(len(task.context.precisions))
    return task.passes.used + tables + evaluators.select.share + plans * evaluators.price + evaluators.reserve


def _check_passes(task: SearchTask, strategy: Strategy, evaluators: Evaluators, tables: float) -> None:
    least, limit = _least_passes(task, strategy, evaluators, tables), task.passes.limit
    if limit < least:
        plans = strategy.least_plans(len(task.context.precisions))
        raise EstimatorError(
            f"{limit:.4g} passes are too few: tables, {plans} plans and the report take {least:.4g}; raise max_passes"
        )
