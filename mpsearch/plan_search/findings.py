"""From the outcome of a strategy to what is told: the report part, the verdict, the plan with its proof."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpsearch.allocation.ties import as_json, in_proportion, tie_prices
from mpsearch.core.budget import Budget
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.core.problem import Problem
from mpsearch.core.solution import Choice, Status
from mpsearch.core.table import Array, CostTable
from mpsearch.plan_search.evaluator import PlanEvaluator
from mpsearch.plan_search.holdout import Reported, report_on
from mpsearch.plan_search.loop import learned
from mpsearch.plan_search.proposers import Columns
from mpsearch.plan_search.results.compared import Compared
from mpsearch.plan_search.strategies.search_context import SearchContext
from mpsearch.plan_search.strategies.strategy import Outcome, Strategy
from mpsearch.plan_search.task import size
from mpsearch.plan_search.verdict import Verdict


@dataclass(frozen=True, eq=False)
class Findings:
    """What a search found, but for what its door knows: settings, seconds, identity.

    Attributes:
        plan: the plan that is returned, with its proof against the posterior table.
        verdict: is mixed precision worth it?
        comparison: the plan, uniform precisions and the best plan of one table, on the report part; the plan first.
        tables: what the search started from, and the `posterior`.
        plans: all plans that the whole select part has seen.
    """

    plan: Plan
    verdict: Verdict
    comparison: Sequence[Compared]
    tables: Mapping[str, CostTable]
    plans: MeasuredPlans


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A plan that is measured on the report part."""

    role: str
    name: str
    columns: Columns


def findings(context: SearchContext, strategy: Strategy, outcome: Outcome) -> Findings:
    """Measure the plan, uniform precisions and the best plan of one table on the report part, and judge."""
    task = context.task
    candidates = _candidates(context, outcome)
    reports = report_on(
        task.context,
        task.parts["report"],
        {candidate.role: candidate.columns for candidate in candidates},
        task.choice,
        context.evaluators.report,
    )
    verdict = strategy.verdict(context, outcome, {role: report.measurement for role, report in reports.items()})
    chosen = outcome.plan
    if verdict.wins is False and strategy.falls_back:
        candidates, reports = _with_uniform_as_plan(candidates, reports)
        chosen = candidates[0].columns
    plan, posterior = _proven(context, strategy, outcome, chosen)
    if outcome.reason:
        verdict = replace(verdict, text=f"{outcome.reason}, so nothing was searched: {verdict.text}")
    return Findings(
        plan=plan,
        verdict=verdict,
        comparison=[_compared(context, candidate, reports) for candidate in candidates],
        tables={**context.scores.tables, "posterior": posterior},
        plans=_measured(context, context.evaluators.select),
    )


def _candidates(context: SearchContext, outcome: Outcome) -> list[_Candidate]:
    """The plans to compare, the plan itself first."""
    candidates = [_Candidate("plan", "plan", outcome.plan)]
    for role, columns in (("uniform", outcome.uniform), ("uniform above", outcome.above)):
        if columns is not None:
            candidates.append(_Candidate(role, context.uniform_name(columns), columns))
    record = outcome.search.record
    optima = {name: record.exact(costs) for name, costs in context.scores.costs.items()}
    damage = {
        name: record.damage[tuple(columns.tolist())]
        for name, columns in optima.items()
        if columns is not None and tuple(columns.tolist()) in record.damage
    }
    if damage:
        name = min(damage, key=damage.__getitem__)
        columns = optima[name]
        assert columns is not None
        candidates.append(_Candidate("table", f"best of {name}", columns))
    return candidates


def _with_uniform_as_plan(
    candidates: Sequence[_Candidate], reports: Mapping[str, Reported]
) -> tuple[list[_Candidate], dict[str, Reported]]:
    """The uniform precision takes the place of the plan, which is told as the mixed one where it is another."""
    plan = candidates[0]
    uniform = next(candidate for candidate in candidates if candidate.role == "uniform")
    changed = [replace(plan, columns=uniform.columns), *candidates[1:]]
    if not np.array_equal(plan.columns, uniform.columns):
        changed.append(_Candidate("mixed", "mixed plan", plan.columns))
    return changed, {**reports, "mixed": reports["plan"], "plan": reports["uniform"]}


def _compared(context: SearchContext, candidate: _Candidate, reports: Mapping[str, Reported]) -> Compared:
    report = reports[candidate.role]
    difference, se = report.measurement.over(reports["plan"].measurement)
    return Compared(
        candidate.name,
        candidate.role,
        dict(context.plan(candidate.columns).usage),
        report.evaluation,
        report.measurement.value,
        report.measurement.se,
        difference,
        se,
    )


def _proven(context: SearchContext, strategy: Strategy, outcome: Outcome, chosen: Columns) -> tuple[Plan, CostTable]:
    """The plan with its proof against the posterior table, and that table."""
    task, search = context.task, outcome.search
    posterior = learned(search.prior, search.record.damage)
    costs = posterior.expected()
    shares, facts = _shares(context)
    table = replace(
        task.base,
        sensitivity=np.where(task.base.allowed, costs[context.rows] * shares, np.nan),
        unit=task.choice.metric.unit,
        origin={
            **task.base.origin,
            **facts,
            "estimator": f"posterior of {len(posterior.plans)} measured plans on "
            f"{', '.join(context.scores.costs) or 'rounding noise'}",
            "quantizer": repr(task.context.quantizer),
            "metric": task.choice.metric.name,
        },
    )
    problem = Problem.of(table, task.goal.budget or Budget())
    best = search.record.exact(costs) if strategy.bounded else None
    bound = -math.inf if best is None else problem.value(best)
    value = problem.value(chosen)
    solution = problem.solution(Choice(chosen, Status.FEASIBLE, min(bound, value)), "search", 0.0)
    assert solution.plan is not None
    selected = context.evaluators.select.measure(chosen)
    origin = {
        "search": {
            "select": {"damage": selected.value, "se": selected.se, "unit": task.choice.metric.unit},
            "seed": task.seed,
        },
        "table": dict(table.origin),
    }
    ties = tie_prices(table, Budget(**strategy.tie_limits(solution.usage)))
    return replace(solution.plan, origin=origin, predicted={**solution.plan.predicted, "ties": as_json(ties)}), table


def _shares(context: SearchContext) -> tuple[Array, dict[str, Any]]:
    """(L, P) part of each layer in the damage of its decision, by the first table that scored ties' layers alone; facts for the origin."""
    for table in context.scores.tables.values():
        if "scored_together" not in table.origin:
            return in_proportion(np.maximum(table.sensitivity, 0.0), context.rows), {}
    together = [decision.name for decision in context.task.context.decisions if len(decision.layers) > 1]
    shares = in_proportion(np.ones(context.task.base.sensitivity.shape), context.rows)
    return shares, {"scored_together": together} if together else {}


def _measured(context: SearchContext, select: PlanEvaluator) -> MeasuredPlans:
    """All plans that the whole select part has seen."""
    complete = {key: known for key, known in select.known.items() if select.complete(np.array(key))}
    return MeasuredPlans(
        tuple(context.plan(np.array(key)) for key in complete),
        np.array([measurement.value for measurement in complete.values()]),
        np.array([measurement.se for measurement in complete.values()]),
        context.task.choice.metric.unit,
        {"samples": size(select.batches), "metric": context.task.choice.metric.name},
    )
