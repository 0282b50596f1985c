"""The stages of a search: tables, plans, finalists, report."""

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation.solving import solve
from mpsearch.allocation.ties import Tie, as_json, in_proportion, tie_prices
from mpsearch.core.budget import Budget
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.core.problem import Problem, named, uniform_options
from mpsearch.core.solution import Choice, Status
from mpsearch.core.table import Array, CostTable
from mpsearch.errors import EstimatorError, InfeasibleError, MpsearchWarning, SolverError
from mpsearch.estimation.estimator import Context, Estimator
from mpsearch.metrics.choice import MetricChoice
from mpsearch.models.data.mixup import mixed
from mpsearch.models.data.splitting import cut
from mpsearch.models.running import Batch, samples
from mpsearch.plan_search.early_end import EarlyEnd, early_end
from mpsearch.plan_search.evaluator import Measurement, PlanEvaluator
from mpsearch.plan_search.goals import Goal
from mpsearch.plan_search.holdout import Reported, report_on
from mpsearch.plan_search.loop import PlanSearch, learned
from mpsearch.plan_search.passes import PassBudget
from mpsearch.plan_search.proposers import AdditiveOutput, Crossing, Moves, Record, Thompson
from mpsearch.plan_search.result import Compared, SearchResult, measured_front, with_usage
from mpsearch.plan_search.starting_tables import FEW, forecast, from_bits, scores, starting
from mpsearch.plan_search.verdict import Verdict, tolerance_verdict, verdict

Options = NDArray[np.int64]

#: The select part is measured in at least so many batches, so that a poor plan is dropped after a quarter.
_PIECES = 4
#: Plans that are measured on the score part too, where few passes are spent.
_FINALISTS = 2
#: Draws of vicinal samples, and the share of the passes that go to the last of them.
_VICINAL, _LAST = 3, 0.1
#: Share of the passes for plans that goes to the hunt between the samples, and how many plans it starts from.
_BETWEEN, _OPENING = 0.45, 8
#: Standard errors of the difference within which plans are as good as the best one.
_AS_GOOD = 1.0
#: Limits of a whole curve.
_LEVELS = 10
#: Steps of the bisection on the use of a resource.
_STEPS = 7


@dataclass(eq=False)
class Stages:
    """One search: tables, plans, finalists, report.

    Attributes:
        context: model, score part, units, precisions.
        parts: name -> batches.
        base: layers and resources, sensitivity 0.
        choice: what is measured.
        goal: what is asked for.
        spending: passes.
        seed: of all draws.
        estimators: instead of the default ones.
        taken: passes that each stage took.
    """

    context: Context
    parts: Mapping[str, list[Batch]]
    base: CostTable
    choice: MetricChoice
    goal: Goal
    spending: PassBudget
    seed: int
    estimators: Sequence[Estimator] | None
    taken: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = sum(size(part) for part in self.parts.values())
        self.share = {name: size(part) / self.total for name, part in self.parts.items()}
        self.generator = np.random.default_rng(self.seed)
        few = self.spending.limit < FEW
        batches = {
            "select": cut(self.parts["select"], _PIECES),
            "report": self.parts["report"],
        }
        if not few:  # every plan is measured on both, the select part first
            batches["select"] += self.parts["score"]
        between: list[Batch] = []
        self.metric = self.choice.metric
        if self.metric.compares and self.goal.tolerance is None and not self.goal.front and not few:
            between = mixed(batches["select"], self.seed, _VICINAL)
        batches |= {"score": self.parts["score"]} if few else {"vicinal": between} if between else {}
        meters = {
            name: PlanEvaluator(name, self.context, part, self.metric, self.total, self.spending)
            for name, part in batches.items()
        }
        self.select, self.report = meters["select"], meters["report"]
        #: where the best plans are measured too, once the others are out, and how many
        self.score, self.between = meters.get("score"), meters.get("vicinal")
        self.drawn = sum(map(samples, between)) // _VICINAL
        self.finalists = _FINALISTS if few else 0
        if self.between is not None:
            self.finalists = int(_LAST * self.spending.limit / self._remaining)
            if self.finalists < 2:
                self.between = None
        self.rows = _unit_of_layers(self.base, self.context)
        self.uniforms = uniform_options(~np.isnan(Problem.of(self.base, Budget()).objective), self.context.precisions)

    @property
    def reserve(self) -> float:
        """Passes that the finalists and the report, for four plans and the unquantized model, will take."""
        final = 0.0
        if self.score is not None:
            final = self.score.share * (1 + self.finalists * self.select.price / self.select.share)
        elif self.between is not None:
            final = self._remaining * self.finalists + self.between.share
        return 5 * self.share["report"] * (2 if self.metric.runs_model else 1) + final

    @property
    def _remaining(self) -> float:
        """Passes for a plan on the vicinal samples that the hunt leaves out."""
        return 0.0 if self.between is None else self.between.price * (_VICINAL - 1) / _VICINAL

    @property
    def _price(self) -> float:
        """Passes that a plan takes at most while plans are looked for."""
        return self.select.price + (0.0 if self.between is None else self.between.price / _VICINAL)

    def _spent(self) -> bool:
        """True where no further plan can be measured."""
        return self.spending.left < self.reserve + self._price

    def result(self) -> SearchResult:
        """All stages, or the report alone where the budget leaves one plan to take."""
        if self.goal.budget is not None and self.goal.tolerance is None and not self.goal.front:
            end = early_end(Problem.of(self.base, self.goal.budget))
            if end is not None:
                return self._decided(end)
        share = self.share["score"]
        room = self.spending.limit - self._least_passes(0.0)
        named_estimators, members = starting(self.context, share, self.spending.limit, room, self.estimators, self.seed)
        self._check_passes(share * forecast(self.context, members))
        with self._stage("tables"):
            self.scores = scores(self.context, self.base, self.rows, share, self.spending, named_estimators, members)
        self._check_passes(0.0)  # estimators that do not tell what they take
        earlier = self.select.recall()
        if self.goal.tolerance is not None:
            with self._stage("plans"):
                hunt, chosen = self._least(self.goal.tolerance)
        elif self.goal.front:
            with self._stage("plans"):
                hunt, chosen = self._curve()
        else:
            with self._stage("plans"):
                hunt = self._hunt(self.goal.budget or Budget())
                if earlier:
                    hunt.adopt([options for options in earlier if hunt.record.fits(options)])
                hunt = self._fill(hunt)
            with self._stage("finalists"):
                chosen = self._final(hunt)
        with self._stage("report"):
            return self._report(hunt, chosen)

    def _decided(self, end: EarlyEnd) -> SearchResult:
        """The plan that is left to take, measured; no table is filled, rounding noise is the only signal."""
        warnings.warn(f"{end.reason}: it is measured, and nothing is searched", MpsearchWarning, stacklevel=2)
        self.scores = from_bits(self.context)
        hunt = PlanSearch(
            Record(Problem.of(self.base, self.goal.budget or Budget()), {}, self.generator),
            self.scores.prior,
            self.select,
        )
        with self._stage("plans"):
            hunt.open([end.options], self._spent)
        with self._stage("report"):
            result = self._report(hunt, end.options)
        return replace(result, verdict=f"{end.reason}, so nothing was searched: {result.verdict}")

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        before = self.spending.used
        yield
        self.taken[name] = round(self.spending.used - before, 3)

    @property
    def _plans(self) -> int:
        """How many plans a search measures at least."""
        return 2 if self.goal.tolerance is None and not self.goal.front else 2 + len(self.context.precisions)

    def _least_passes(self, tables: float) -> float:
        return self.spending.used + tables + self.select.share + self._plans * self._price + self.reserve

    def _check_passes(self, tables: float) -> None:
        least = self._least_passes(tables)
        if self.spending.limit < least:
            raise EstimatorError(
                f"{self.spending.limit:.4g} passes are too few: tables, {self._plans} plans and the report take {least:.4g}; "
                "raise max_passes"
            )

    def _hunt(self, budget: Budget, *, uniforms: bool = True) -> PlanSearch:
        """A hunt within a budget, opened with what the tables say."""
        problem = Problem.of(self.base, budget)
        record = Record(problem, self.scores.costs, self.generator)
        hunt = PlanSearch(record, self.scores.prior, self.select)
        starts = (self.scores.prior, self.scores.together, *self.scores.costs.values())
        first = [record.exact(costs) for costs in starts]
        opening = [options for options in first if options is not None]
        if not opening:
            raise SolverError("no plan was found within the limits, and no proof that there is none")
        if uniforms:
            fitting = [options for options in self._uniform() if record.fits(options)]
            opening += fitting[-1:] if self.spending.limit < FEW else fitting[-2:]
        hunt.open(opening, self._spent)
        return hunt

    def _uniform(self) -> list[Options]:
        """Uniform plans, the least damaging last by what is expected."""
        rows = np.arange(len(self.context.decisions))
        return sorted(self.uniforms.values(), key=lambda options: -float(self.scores.prior[rows, options].sum()))

    def _uniform_name(self, options: Options) -> str:
        return next(name for name, plan in self.uniforms.items() if np.array_equal(plan, options))

    def _measure_uniform(self) -> None:
        """All of them, those that are expected to be best first, as far as the passes go."""
        for options in reversed(self._uniform()):
            if not self._spent():
                self.select.measure(options)

    def _fill(self, hunt: PlanSearch) -> PlanSearch:
        """Propose and measure until only the reserve is left, the last part of it between the samples too; the hunt that ended.

        The last third of the first hunt goes to moves around the best plan and to crosses of the best plans too.
        """
        free = self.spending.left - self.reserve
        stop = self.reserve + (0.0 if self.between is None else free * _BETWEEN)

        def enough(rest: float = 0.0) -> bool:
            return self.spending.left < max(stop, self.reserve + self.select.price) + rest

        if self.scores.surrogate is not None:
            hunt.go([AdditiveOutput(self.scores.surrogate)], enough, most=3)
        third = (self.spending.left - stop) / 3
        hunt.go([Thompson()], lambda: enough(third))
        hunt.go([Thompson(), Moves(), Crossing()], enough)
        return hunt if self.between is None else self._between(hunt)

    def _between(self, first: PlanSearch) -> PlanSearch:
        """A second hunt, from the best plans of the first, for the least sum of the damage on the data and between its samples."""
        record = replace(first.record, measured={}, damage={})
        second = PlanSearch(record, first.prior, self.select, self.between, self.drawn)
        fitting = [key for key in first.record.damage if self.select.complete(np.array(key))]
        best = sorted(fitting, key=first.record.damage.__getitem__)[:_OPENING]
        second.open([np.array(key) for key in best], self._spent)
        second.go([Thompson(), Moves(), Crossing()], self._spent)
        record.damage = {**first.record.damage, **record.damage}
        return second

    def _final(self, hunt: PlanSearch) -> Options:
        """The best plan on the select part, or of the best few the one that is best on more samples.

        Those are the score part, where few passes are spent. Where vicinal samples are measured, the plan with the least sum of the
        two damages is taken among all that are no worse than the best one on the select part by `_AS_GOOD` standard errors of the
        difference, as in the rule of one standard error (Breiman et al., Classification and Regression Trees, 1984, 3.4.3), and no worse
        than uniform precision there.
        """
        record = hunt.record
        uniform = self._best_uniform(record)
        most = math.inf if uniform is None else record.damage[tuple(uniform.tolist())]
        ranked = sorted(
            (
                key
                for key, damage in record.damage.items()
                if damage <= most and record.fits(np.array(key)) and self.select.complete(np.array(key))
            ),
            key=record.damage.__getitem__,
        )
        if self.score is not None:
            top = [np.array(key) for key in ranked[: self.finalists]]
            together = [_joined(self.select.measure(options), self.score.measure(options)).value for options in top]
            return top[int(np.argmin(together))]
        if self.between is None:
            return np.array(ranked[0])
        best = self.select.known[ranked[0]]
        as_good = []
        for key in ranked:
            worse, se = self.select.known[key].over(best)
            if worse <= _AS_GOOD * se and key in record.measured:
                as_good.append(key)
        top = [np.array(key) for key in sorted(as_good, key=record.measured.__getitem__)[: max(self.finalists, 1)]]
        if len(top) == 1:
            return top[0]
        sums = [self.select.measure(options).value + self.between.measure(options).value for options in top]
        return top[int(np.argmin(sums))]

    def _least(self, tolerance: float) -> tuple[PlanSearch, Options]:
        """The least use of a resource within a tolerated damage: bisection on the limit, with a short hunt at each."""
        over = self.goal.minimize
        low, high = self._range(over)
        self._measure_uniform()
        each = (self.spending.left - self.reserve) / (_STEPS + 1)
        last: PlanSearch | None = None
        least = math.inf
        for step in range(_STEPS + 1):
            limit = high if step == 0 else math.sqrt(low * high) if low > 0 else (low + high) / 2
            hunt = self._within(over, limit)
            stop = self.spending.left - each

            def enough(hunt: PlanSearch = hunt, stop: float = stop) -> bool:
                return hunt.least <= tolerance or self._spent() or self.spending.left < stop

            hunt.go([Thompson(), Moves()], enough)
            least = min(least, hunt.least)
            if hunt.least <= tolerance:
                last, high = hunt, min(self._use(over, options) for options in self._within_tolerance(tolerance))
            else:
                low = limit
            if last is None or high - low <= 1e-3 * high or self._spent():
                break
        if last is None:
            raise InfeasibleError(
                f"no measured plan stays within the tolerance of {tolerance:.6g}: the least damage measured is {least:.6g}"
            )
        known = self.select.known  # of the cheapest plans that which does the least damage
        return last, min(
            self._within_tolerance(tolerance), key=lambda o: (self._use(over, o), known[tuple(o.tolist())].value)
        )

    def _within_tolerance(self, tolerance: float) -> list[Options]:
        """Plans within the rest of the budget that are known to do no more damage than is tolerated, on the whole select part."""
        problem = Problem.of(self.base, self.goal.budget or Budget())
        known = [(np.array(key), found) for key, found in self.select.known.items() if found.value <= tolerance]
        return [options for options, _ in known if self.select.complete(options) and problem.feasible(options)]

    def _curve(self) -> tuple[PlanSearch, Options]:
        """Hunts at limits spread over the attainable range; the chosen plan is that within the budget, or at the middle."""
        over = self.goal.over
        low, high = self._range(over)
        levels = list(
            np.geomspace(low, high, _LEVELS + 2)[1:-1] if low > 0 else np.linspace(low, high, _LEVELS + 2)[1:-1]
        )
        self._measure_uniform()
        budget = self.goal.budget
        hunt = self._within(over, float(levels[len(levels) // 2])) if budget is None else self._hunt(budget)
        for number, limit in enumerate(levels):
            if self._spent():
                break
            stop = self.spending.left - (self.spending.left - self.reserve) / (len(levels) + 1 - number)
            level = self._within(over, float(limit))
            level.go([Thompson(), Moves()], lambda stop=stop: self._spent() or self.spending.left < stop)  # type: ignore[misc]
        hunt.adopt([np.array(key) for key in self.select.known if hunt.record.fits(np.array(key))])
        if budget is not None:
            hunt = self._fill(hunt)
        return hunt, self._final(hunt)

    def _within(self, over: str, limit: float) -> PlanSearch:
        """A hunt within a limit on one resource and the rest of the budget, that knows what was measured before."""
        limits = {} if self.goal.budget is None else {n: v for n, v in self.goal.budget.items() if n != over}
        hunt = self._hunt(Budget(**limits, **{over: limit}), uniforms=False)
        hunt.adopt([np.array(key) for key in self.select.known if hunt.record.fits(np.array(key))])
        return hunt

    def _range(self, over: str) -> tuple[float, float]:
        """Least and most use of a resource within the rest of the budget."""
        limits = {} if self.goal.budget is None else {n: v for n, v in self.goal.budget.items() if n != over}
        least = solve(self.base, Budget(**limits), minimize=over)
        most = np.nanargmax(Problem.of(self.base, Budget(), over).objective, axis=1)
        return least.usage[over], self._use(over, most)

    def _use(self, over: str, options: Options) -> float:
        return self._usage(options)[over]

    def _usage(self, options: Options) -> dict[str, float]:
        return dict(with_usage(Plan(named(self.base, options[self.rows])), self.base).usage)

    def _report(self, hunt: PlanSearch, chosen: Options) -> SearchResult:
        """Measure the plan, uniform precisions and the best plan of one table on the report part."""
        uniform = self._best_uniform(hunt.record)
        plans: dict[str, tuple[str, Options]] = {"plan": ("plan", chosen)}
        if uniform is not None:
            plans["uniform"] = (self._uniform_name(uniform), uniform)
        above = self._next_uniform(hunt.record)
        if above is not None and self.goal.tolerance is None:
            plans["uniform above"] = (self._uniform_name(above), above)
        single = self._best_of_tables(hunt.record)
        if single is not None:
            plans["table"] = single
        batches = self.parts["report"]
        found = report_on(
            self.context, batches, {role: options for role, (_, options) in plans.items()}, self.choice, self.report
        )
        said = self._verdict(plans, {role: one.measurement for role, one in found.items()})
        if said.wins is False and self.goal.tolerance is None:  # uniform is returned
            plans |= {"mixed": ("mixed plan", chosen), "plan": ("plan", plans["uniform"][1])}
            found |= {"mixed": found["plan"], "plan": found["uniform"]}
            if np.array_equal(chosen, plans["plan"][1]):
                del plans["mixed"]
            chosen = plans["plan"][1]
        comparison = [self._compared(role, plans, found) for role in plans]
        plan, posterior = self._plan(hunt, chosen)
        measured = self._measured()
        return SearchResult(
            plan,
            said.text,
            said.wins,
            comparison[0].evaluation,
            None if uniform is None else (plans["uniform"][0], found["uniform"].evaluation),
            comparison,
            measured_front(measured, self.goal.over),
            {**self.scores.tables, "posterior": posterior},
            measured,
            round(self.spending.used, 4),
            {},
            0.0,
            {},
            {},
            self.scores.surrogate,
        )

    def _compared(self, role: str, plans: Mapping[str, tuple[str, Options]], found: Mapping[str, Reported]) -> Compared:
        name, options = plans[role]
        mine = found[role].measurement
        difference, se = mine.over(found["plan"].measurement)
        usage = self._usage(options)
        return Compared(name, role, usage, found[role].evaluation, mine.value, mine.se, difference, se)

    def _best_uniform(self, record: Record) -> Options | None:
        """The uniform precision that does the least damage of those that fit; with a tolerance the cheapest within it."""
        if self.goal.tolerance is not None:
            within = {tuple(options.tolist()) for options in self._within_tolerance(self.goal.tolerance)}
            fitting = [options for options in self._uniform() if tuple(options.tolist()) in within]
            return min(fitting, key=lambda o: self._use(self.goal.over, o), default=None)
        fitting = [
            options for options in self._uniform() if record.fits(options) and tuple(options.tolist()) in record.damage
        ]
        return min(fitting, key=lambda o: record.damage[tuple(o.tolist())], default=None)

    def _next_uniform(self, record: Record) -> Options | None:
        """The cheapest uniform precision that does not fit."""
        beyond = [options for options in self._uniform() if not record.fits(options)]
        return min(beyond, key=lambda o: self._use(self.goal.over, o), default=None)

    def _best_of_tables(self, record: Record) -> tuple[str, Options] | None:
        """The best of the plans that single tables propose, by the select part."""
        single = {name: record.exact(costs) for name, costs in self.scores.costs.items()}
        known = {name: o for name, o in single.items() if o is not None and tuple(o.tolist()) in record.damage}
        if not known:
            return None
        name = min(known, key=lambda name: record.damage[tuple(known[name].tolist())])
        return f"best of {name}", known[name]

    def _verdict(self, plans: Mapping[str, tuple[str, Options]], found: Mapping[str, Measurement]) -> Verdict:
        name, uniform = plans.get("uniform", (None, None))
        chosen = plans["plan"][1]
        same = uniform is not None and np.array_equal(uniform, chosen)
        if self.goal.tolerance is not None:
            over = self.goal.minimize
            return tolerance_verdict(
                over,
                self._use(over, chosen),
                name,
                math.nan if uniform is None else self._use(over, uniform),
                self.goal.tolerance,
                found["plan"].value,
                found["plan"].se,
                self.metric.counted_in,
                chosen=same,
            )
        difference, se = found["uniform"].over(found["plan"]) if uniform is not None else (math.nan, math.nan)
        return verdict(self.metric.counted_in, name, difference, se, chosen=same)

    def _plan(self, hunt: PlanSearch, chosen: Options) -> tuple[Plan, CostTable]:
        """The plan with its proof against the posterior table, and that table."""
        posterior = learned(hunt.prior, hunt.record.damage)
        costs = posterior.expected()
        shares, together = self._shares()
        table = replace(
            self.base,
            sensitivity=np.where(self.base.allowed, costs[self.rows] * shares, np.nan),
            unit=self.metric.unit,
            origin={
                **self.base.origin,
                **together,
                "estimator": f"posterior of {len(posterior.plans)} measured plans on {', '.join(self.scores.costs) or 'rounding noise'}",
                "quantizer": repr(self.context.quantizer),
                "metric": self.metric.name,
            },
        )
        problem = Problem.of(table, self.goal.budget or Budget())
        best = hunt.record.exact(costs)
        bound = -math.inf if best is None or self.goal.tolerance is not None else problem.value(best)
        value = problem.value(chosen)
        solution = problem.solution(Choice(chosen, Status.FEASIBLE, min(bound, value)), "search", 0.0)
        assert solution.plan is not None
        measured = self.select.measure(chosen)
        origin = {
            "search": {
                "select": {"damage": measured.value, "se": measured.se, "unit": self.metric.unit},
                "seed": self.seed,
            },
            "table": dict(table.origin),
        }
        predicted = {**solution.plan.predicted, "ties": as_json(self._ties(table, solution.usage))}
        return replace(solution.plan, origin=origin, predicted=predicted), table

    def _shares(self) -> tuple[Array, dict[str, Any]]:
        """(L, P) part of each layer in the damage of its unit, by the first table that scored ties' layers alone; facts for the origin."""
        for scored in self.scores.tables.values():
            if "scored_together" not in scored.origin:
                return in_proportion(np.maximum(scored.sensitivity, 0.0), self.rows), {}
        together = [decision.name for decision in self.context.decisions if len(decision.layers) > 1]
        return in_proportion(np.ones(self.base.sensitivity.shape), self.rows), (
            {"scored_together": together} if together else {}
        )

    def _ties(self, table: CostTable, usage: Mapping[str, float]) -> list[Tie]:
        """Prices at the budget, or where there is none at what the plan uses."""
        over = self.goal.over
        limits: dict[str, Any] = dict(self.goal.budget or {})
        if self.goal.tolerance is not None or not limits:
            limits[over] = usage[over]
        return tie_prices(table, Budget(**limits))

    def _measured(self) -> MeasuredPlans:
        """All plans that the whole select part has seen."""
        known = [
            (np.array(key), found) for key, found in self.select.known.items() if self.select.complete(np.array(key))
        ]
        plans = [with_usage(Plan(named(self.base, options[self.rows])), self.base) for options, _ in known]
        return MeasuredPlans(
            tuple(plans),
            np.array([found.value for _, found in known]),
            np.array([found.se for _, found in known]),
            self.metric.unit,
            {"samples": sum(map(samples, self.select.batches)), "metric": self.metric.name},
        )


def _unit_of_layers(base: CostTable, context: Context) -> NDArray[np.int64]:
    """(L,) unit of each layer of a table."""
    place = {layer.name: u for u, decision in enumerate(context.decisions) for layer in decision.layers}
    return np.array([place[layer.name] for layer in base.layers])


def _joined(first: Measurement, second: Measurement) -> Measurement:
    return Measurement(np.append(first.sums, second.sums), np.append(first.counts, second.counts))


def size(batches: Sequence[Batch]) -> int:
    """Number of samples."""
    return sum(map(samples, batches))
