"""The door from a model, data and a budget to the best plan that can be found, measured."""

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from mpsearch._layers import layers as find_layers
from mpsearch._profile import (
    ResourceFunction,
    check_layers,
    checked_precisions,
    families,
    profile,
    resource_columns,
    run_identity,
    units_of,
)
from mpsearch._solve import solve
from mpsearch.budget import Budget
from mpsearch.checkpoint import Checkpoint
from mpsearch.data_split import check_sizes, cut, split
from mpsearch.errors import BudgetError, EstimatorError, InfeasibleError, SolverError, nearest
from mpsearch.estimator import Estimator, Setting
from mpsearch.hunt import Hunt
from mpsearch.identity import described, digest
from mpsearch.layer import Layer
from mpsearch.logit_shift import LogitShift, Surrogate, surrogate
from mpsearch.measured_plans import MeasuredPlans
from mpsearch.model import Batch, collect, data_fingerprint, preserved, samples, state_fingerprint
from mpsearch.perturb import Quantizer, input_ranges
from mpsearch.plan import Plan
from mpsearch.plan_meter import Damage, Measurement, Metric, PlanMeter, Spending
from mpsearch.precision import Precision
from mpsearch.problem import Problem, named
from mpsearch.proposers import AdditiveOutput, Moves, Record, Thompson
from mpsearch.quantize import RoundToNearest
from mpsearch.report_part import Reported, report_on
from mpsearch.search_result import Compared, SearchResult, measured_front, with_usage
from mpsearch.sensitivity import FisherProjection, KLDivergence, OutputGradient
from mpsearch.solution import Choice, Status
from mpsearch.table import Array, CostTable
from mpsearch.verdict import Verdict, tolerance_verdict, verdict

Options = NDArray[np.int64]
Effort = Literal["fast", "default", "thorough"]

#: Shares of the data where it is one set.
SHARES = {"score": 0.25, "select": 0.55, "report": 0.20}
#: The select part is measured in at least so many batches, so that a poor plan is dropped after a quarter.
_PIECES = 4
#: Limits of a whole curve.
_LEVELS = 10
#: Steps of the bisection on the use of a resource.
_STEPS = 7


def search(
    model: nn.Module,
    batches: Iterable[Batch],
    budget: Budget | None,
    precisions: Sequence[Precision],
    *,
    select: Iterable[Batch] | None = None,
    report: Iterable[Batch] | None = None,
    effort: Effort = "default",
    max_passes: float | None = None,
    metric: Literal["kl", "loss", "accuracy"] | Metric = "kl",
    higher_is_better: bool = False,
    tolerance: float | None = None,
    minimize: str = "memory_bytes",
    front: bool = False,
    estimators: Sequence[Estimator] | None = None,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    quantizer: Quantizer | None = None,
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    checkpoint: str | Path | None = None,
    previous: SearchResult | str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Find the best plan within a budget, measured on data that the search never saw, and compare it with uniform precision.

    Tables propose, measurement decides. The data is split in three. On the first part, cells are scored: one sweep of gradients, and,
    as the effort allows, one perturbation at a time. The optima of these tables, uniform precisions and plans of the additive-output
    surrogate are measured on the second part; a Bayesian linear model of the damage learns from each and proposes the next (Thompson
    sampling), and moves around the best plan close the search. Plans are compared on common samples and dropped as soon as
    they are clearly worse. The best few are measured on the first part too. The third part judges.

    Args:
        model: any module; it comes back bit for bit as it went in, also after an exception.
        batches: data, read once; labels are needed only for `metric="loss"` or `"accuracy"`.
        budget: limits of the whole model; None with `tolerance` or `front` alone.
        precisions: the options, `mps.precisions("w2 w4 w8")`.
        select: data to select plans on; by default a part of `batches`.
        report: data to report on; by default a part of `batches`.
        effort: `fast` (8 passes), `default` (40 + one for each cell of the table: 150 for 22 layers x 5 precisions) or `thorough` (four
            times that). A pass is one forward run over all data; a backward pass counts 2.
        max_passes: a number of one's own instead.
        metric: what is measured: `kl` to the unquantized model, rise of the `loss`, drop of the `accuracy`, or `metric(model, batch)`.
        higher_is_better: direction of a metric of one's own.
        tolerance: find the least `minimize` instead, with a damage of at most this.
        minimize: resource, with `tolerance`.
        front: measure a whole Pareto curve over the budget's first resource, or over `minimize`.
        estimators: tables to start from instead of the default ones.
        layers: the decisions; by default all that `mps.layers` finds.
        exclude: names or patterns of layers to leave alone, for the default `layers`.
        groups: as for `mps.layers`.
        quantizer: `quantizer(weight, precision)`, the one that will ship; by default `RoundToNearest()`.
        resources: names of resources, or own functions by name.
        checkpoint: a file that finished work goes to; a run that finds it there goes on, and ends with the same result.
        previous: a result, or the folder that it was saved to, of a search on the same model and data: all that it has run is
            free.
        seed: of the split and of all draws.
        progress: show a bar on stderr where that is a terminal.

    Raises:
        InfeasibleError: where no plan meets the budget, or no measured plan stays within the tolerance.
        EstimatorError: for too little data, too few passes, or an output that is not finite.
        BudgetError: for a budget or goal that does not fit the resources.
        TableError: for a model without quantizable layers.
    """
    goal = _Goal(budget, tolerance, minimize, front)
    options = checked_precisions(precisions)
    parts = _parts(batches, select, report, seed)
    quantize: Quantizer = RoundToNearest() if quantizer is None else quantizer
    damage = Damage(_known_metric(metric), higher_is_better)
    before = state_fingerprint(model)
    start = time.perf_counter()
    with preserved(model):
        found = find_layers(model, parts["score"][0], exclude=exclude, groups=groups) if layers is None else layers
        decisions = list(found)
        check_layers(model, decisions)
        usage = resource_columns(model, decisions, options, resources, quantize)
        base = CostTable(
            tuple(decisions),
            options,
            np.zeros((len(decisions), len(options))),
            None,
            {name: resource.usage for name, resource in usage.items()},
            {name: resource.fixed for name, resource in usage.items()},
            {name: resource.reference for name, resource in usage.items() if math.isfinite(resource.reference)},
            "nats",
        )
        goal.check(base)
        everything = [batch for part in parts.values() for batch in part]
        identity = {
            **run_identity(model, before, data_fingerprint(everything), decisions, options, quantize, "kl"),
            "parts": " ".join(f"{name}: {sum(map(samples, part))}" for name, part in parts.items()) + f", seed {seed}",
            "metric": metric if isinstance(metric, str) else f"{digest(described(metric))} {higher_is_better}",
            "estimators": digest(*map(described, estimators or ())),
        }
        earlier = SearchResult.load(previous) if isinstance(previous, str | Path) else previous
        if earlier is not None:
            _check_identity(earlier.identity, identity)
        units = units_of(decisions)
        limit = _limit(effort, max_passes, len(units) * len(options))
        with Checkpoint(":memory:" if checkpoint is None else checkpoint, identity) as kept:
            if earlier is not None:
                kept.fill(earlier.finished)
            bar = tqdm(
                total=round(limit, 1), desc="Search", unit="pass", disable=None if progress else True, leave=False
            )
            with bar:
                spending = Spending(limit, free=earlier is not None, watch=bar.update)
                ranges = {}
                if any(option.quantizes_activation for option in options):
                    ranges = input_ranges(model, parts["score"], [layer.name for layer in decisions])
                    spending.charge(_size(parts["score"]) / _size(everything), found=False)
                setting = Setting(
                    model, parts["score"], units, options, quantize, ranges, "kl", _silent, checkpoint=kept
                )
                run = _Run(setting, parts, base, damage, goal, spending, seed, estimators)
                result = run.result()
            finished = kept.rows()
    if state_fingerprint(model) != before:
        raise EstimatorError("the search changed the model's parameters or buffers (the metric, or an estimator?)")
    settings = {
        "effort": effort if max_passes is None else None,
        "max_passes": limit,
        "budget": {} if budget is None else dict(budget),
        "tolerance": tolerance,
        "minimize": minimize if tolerance is not None else None,
        "metric": metric if isinstance(metric, str) else "own",
        "precisions": [str(option) for option in options],
        "quantizer": repr(quantize),
        "seed": seed,
        "samples": {name: _size(part) for name, part in parts.items()},
        "model_fingerprint": before,
        "stages": run.stages,
    }
    return replace(result, settings=settings, seconds=time.perf_counter() - start, identity=identity, finished=finished)


@dataclass(frozen=True)
class _Goal:
    """What is asked for."""

    budget: Budget | None
    tolerance: float | None
    minimize: str
    front: bool

    def check(self, base: CostTable) -> None:
        """Refuse a goal that cannot be met before any pass.

        Raises:
            BudgetError: for none at all, or unknown resources.
            InfeasibleError: with the numbers.
        """
        if self.budget is None and self.tolerance is None and not self.front:
            raise BudgetError("nothing is asked for: give a budget, a tolerance, or front=True")
        if self.tolerance is not None and not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise BudgetError(f"tolerance {self.tolerance}, expected a finite number of 0 or more")
        if self.tolerance is not None and self.front:
            raise BudgetError("a tolerance and a whole front at once; choose one")
        known = (*base.resources, "average_bits")
        if self.over not in known:
            raise BudgetError(f"unknown resource {self.over!r}{nearest(self.over, known)}")
        if self.tolerance is not None and self.budget is not None and self.minimize in self.budget:
            raise BudgetError(f"{self.minimize} is both minimized and limited; choose one")
        if self.budget is not None:
            solve(base, self.budget)

    @property
    def over(self) -> str:
        """The resource of the front."""
        if self.tolerance is None and self.budget is not None:
            return next(iter(self.budget))
        return self.minimize


@dataclass(eq=False)
class _Run:
    """One search: tables, hunts, finalists, report."""

    setting: Setting
    parts: Mapping[str, list[Batch]]
    base: CostTable
    damage: Damage
    goal: _Goal
    spending: Spending
    seed: int
    estimators: Sequence[Estimator] | None
    stages: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.total = sum(_size(part) for part in self.parts.values())
        self.share = {name: _size(part) / self.total for name, part in self.parts.items()}
        self.generator = np.random.default_rng(self.seed)
        self.select, self.score, self.report = (
            PlanMeter(name, self.setting, cut(self.parts[name], pieces), self.damage, self.total, self.spending)
            for name, pieces in (("select", _PIECES), ("score", 1), ("report", 1))
        )
        self.rows = _unit_of_layers(self.base, self.setting)
        #: plans that the report part will be run for, and the unquantized model
        self.reported = 5
        self.finalists = min(8, max(2, int(self.spending.limit / 10)))
        self.reserve = self.share["report"] * self.reported + self.share["score"] * (1 + self.finalists)

    def result(self) -> SearchResult:
        """All stages."""
        self._check_passes()
        with self._stage("tables"):
            self.tables, shifts = self._profile()
        self.costs = {name: self._unit_costs(table) for name, table in self.tables.items()}
        self.prior = _geometric_mean(list(self.costs.values()))
        self.shifts = shifts
        if self.goal.tolerance is not None:
            with self._stage("plans"):
                hunt, chosen = self._least(self.goal.tolerance)
        elif self.goal.front:
            with self._stage("plans"):
                hunt, chosen = self._curve()
        else:
            with self._stage("plans"):
                hunt = self._hunt(self.goal.budget or Budget())
                self._fill(hunt, self.reserve)
            with self._stage("finalists"):
                chosen = self._final(hunt)
        with self._stage("report"):
            return self._report(hunt, chosen)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        before = self.spending.used
        yield
        self.stages[name] = round(self.spending.used - before, 3)

    def _check_passes(self) -> None:
        least = self.reserve + 3 * self.share["score"] + 3 * self.share["select"]
        if self.spending.limit < least:
            raise EstimatorError(
                f"{self.spending.limit:.3g} passes are too few: a sweep, three plans and the report take {least:.3g}; "
                "raise max_passes"
            )

    def _profile(self) -> tuple[dict[str, CostTable], Surrogate | None]:
        """The tables that the effort allows, sharing passes."""
        setting, limit = self.setting, self.spending.limit
        units, options = len(setting.units), len(setting.precisions)
        share = self.share["score"]
        chosen: dict[str, Estimator] = {}
        if self.estimators is not None:
            chosen = {_label(one, self.estimators): one for one in self.estimators}
        else:
            draws = 4 if limit < 20 else 8
            chosen["fisher-projection"] = FisherProjection(draws, seed=self.seed)
            chosen["output-gradient"] = OutputGradient(draws, seed=self.seed)
            measured = KLDivergence()
            if share * measured.cost(len(setting.batches), units, options).forward < 0.45 * limit:
                chosen["kl-divergence"] = measured
        members = list(chosen.values())
        if "kl-divergence" in chosen and self.estimators is None:
            members.append(LogitShift())
        tables = profile(
            setting.model,
            setting.batches,
            members,
            setting.precisions,
            layers=self.base.layers,
            quantizer=setting.quantizer,
            resources=(),
            checkpoint=setting.checkpoint,  # type: ignore[arg-type]
            progress=False,
        )
        spent = setting.checkpoint.get("search | tables")
        stored = spent is not None
        if spent is None:
            passes = [tables[family[0]].origin["passes"] for family in families(members)]
            spent = share * sum(found["forward"] + 2 * found["backward"] for found in passes)
            setting.checkpoint.put("search | tables", spent)
        self.spending.charge(spent, found=stored)
        for name, table in zip(chosen, tables, strict=False):
            if table.unit != "nats" and not (table.sensitivity >= 0).all():
                raise EstimatorError(
                    f"the table of {name} has negative scores; a search starts from damages of 0 or more"
                )
        made = {
            name: replace(
                table,
                usage=self.base.usage,
                fixed_usage=self.base.fixed_usage,
                reference_usage=self.base.reference_usage,
                interactions=None,
            )
            for name, table in zip(chosen, tables, strict=False)
        }
        return made, surrogate(setting)

    def _unit_costs(self, table: CostTable) -> Array:
        """(U, P) damage of each unit, at least a millionth of the largest, 0 where the estimator says exactly 0."""
        merged = np.zeros((len(self.setting.units), len(self.setting.precisions)))
        np.add.at(merged, self.rows, table.sensitivity)
        floor = 1e-6 * np.nanmax(np.abs(merged), initial=0.0)
        return np.where(merged == 0, 0.0, np.maximum(merged, floor))

    def _hunt(self, budget: Budget, *, uniforms: bool = True) -> Hunt:
        """A hunt within a budget, opened with what the tables say."""
        problem = Problem.of(self.base, budget)
        record = Record(problem, self.costs, self.generator)
        hunt = Hunt(record, self.prior, self.select)
        first = [record.exact(self.prior), *(record.exact(costs) for costs in self.costs.values())]
        opening = [options for options in first if options is not None]
        if not opening:
            raise SolverError("no plan was found within the limits, and no proof that there is none")
        if uniforms:
            fitting = [options for options in self._uniform() if record.fits(options)]
            opening += fitting[-1:] if self.spending.limit < 20 else fitting[-2:]
        hunt.open(opening)
        return hunt

    def _uniform(self) -> list[Options]:
        """Uniform plans, where they are allowed, by increasing expected damage reversed: the least damaging last."""
        units = len(self.setting.units)
        plans = [np.full(units, p) for p in range(len(self.setting.precisions))]
        rows = np.arange(units)
        return sorted(plans, key=lambda options: -float(self.prior[rows, options].sum()))

    def _fill(self, hunt: Hunt, reserve: float) -> None:
        """Propose and measure until only the reserve is left; the last third goes to moves around the best plan too."""
        spending = self.spending
        begin = spending.left
        goal = reserve + self.share["select"]
        if self.shifts is not None:
            hunt.go([AdditiveOutput(self.shifts)], lambda: spending.left < goal, most=3)
        hunt.go([Thompson()], lambda: spending.left < goal + (begin - goal) / 3)
        hunt.go([Thompson(), Moves()], lambda: spending.left < goal)

    def _final(self, hunt: Hunt) -> Options:
        """The best plan on select and score parts together, among the best on the select part alone."""
        record = hunt.record
        fitting = [key for key in record.measured if record.fits(np.array(key))]
        ranked = sorted(
            (key for key in fitting if self.select.complete(np.array(key))), key=record.measured.__getitem__
        )
        top = [np.array(key) for key in ranked[: self.finalists]]
        together = [_joined(self.select.measure(options), self.score.measure(options)).value for options in top]
        return top[int(np.argmin(together))]

    def _least(self, tolerance: float) -> tuple[Hunt, Options]:
        """The least use of a resource within a tolerated damage: bisection on the limit, with a short hunt at each."""
        over = self.goal.minimize
        low, high = self._range(over)
        each = (self.spending.left - self.reserve) / (_STEPS + 1)
        best: tuple[Hunt, Options] | None = None
        least = math.inf
        for step in range(_STEPS + 1):
            limit = high if step == 0 else math.sqrt(low * high) if low > 0 else (low + high) / 2
            hunt = self._within(over, limit, adopt=True)
            stop = self.spending.left - each
            value = hunt.record.measured[tuple(hunt.record.best.tolist())]

            def enough(hunt: Hunt = hunt, stop: float = stop) -> bool:
                best_now = hunt.record.measured[tuple(hunt.record.best.tolist())]
                return best_now <= tolerance or self.spending.left < max(stop, self.reserve + self.share["select"])

            hunt.go([Thompson(), Moves()], enough)
            options = hunt.record.best
            value = hunt.record.measured[tuple(options.tolist())]
            least = min(least, value)
            if value <= tolerance:
                best = (hunt, options)
                high = self._use(over, options)
            else:
                low = limit
            if step == 0 and best is None:
                break
            if high - low <= 1e-3 * high or self.spending.left < self.reserve + self.share["select"]:
                break
        if best is None:
            raise InfeasibleError(
                f"no measured plan stays within the tolerance of {tolerance:.6g}: the least damage measured is {least:.6g}"
            )
        return best

    def _curve(self) -> tuple[Hunt, Options]:
        """Hunts at limits spread over the attainable range; the chosen plan is that within the budget, or at the middle."""
        over = self.goal.over
        low, high = self._range(over)
        levels = list(
            np.geomspace(low, high, _LEVELS + 2)[1:-1] if low > 0 else np.linspace(low, high, _LEVELS + 2)[1:-1]
        )
        for options in self._uniform():
            if Record(Problem.of(self.base, Budget()), self.costs, self.generator).fits(options):
                self.select.measure(options)
        hunts = []
        for number, limit in enumerate(levels):
            hunt = self._within(over, float(limit), adopt=True)
            stop = self.spending.left - (self.spending.left - self.reserve) / (len(levels) + 1 - number)
            hunt.go([Thompson(), Moves()], lambda stop=stop: self.spending.left < max(stop, self.reserve))  # type: ignore[misc]
            hunts.append(hunt)
        if self.goal.budget is None:
            hunt = hunts[len(hunts) // 2]
        else:
            hunt = self._hunt(self.goal.budget)
            hunt.adopt([np.array(key) for key in self.select.known if hunt.record.fits(np.array(key))])
            self._fill(hunt, self.reserve)
        return hunt, self._final(hunt)

    def _within(self, over: str, limit: float, *, adopt: bool) -> Hunt:
        """A hunt within a limit on one resource and the rest of the budget."""
        limits = {} if self.goal.budget is None else {n: v for n, v in self.goal.budget.items() if n != over}
        hunt = self._hunt(Budget(**limits, **{over: limit}), uniforms=False)
        if adopt:
            hunt.adopt([np.array(key) for key in self.select.known if hunt.record.fits(np.array(key))])
        return hunt

    def _range(self, over: str) -> tuple[float, float]:
        """Least and most use of a resource within the rest of the budget."""
        limits = {} if self.goal.budget is None else {n: v for n, v in self.goal.budget.items() if n != over}
        least = solve(self.base, Budget(**limits), minimize=over)
        rows = np.arange(len(self.base.layers))
        most = max(
            self._use(over, np.full(len(self.setting.units), p)) for p in range(len(self.setting.precisions))
        ) if rows.size else 0.0  # fmt: skip
        return least.usage[over], most

    def _use(self, over: str, options: Options) -> float:
        return self._usage(options)[over]

    def _usage(self, options: Options) -> dict[str, float]:
        return dict(with_usage(Plan(named(self.base, options[self.rows])), self.base).usage)

    def _report(self, hunt: Hunt, chosen: Options) -> SearchResult:
        """Measure the plan, uniform precisions and the best plan of one table on the report part."""
        names = [str(option) for option in self.setting.precisions]
        uniform = self._best_uniform(hunt.record)
        plans: dict[str, tuple[str, Options]] = {"plan": ("plan", chosen)}
        if uniform is not None:
            plans["uniform"] = (names[int(uniform[0])], uniform)
        above = self._next_uniform(hunt.record)
        if above is not None:
            plans["uniform above"] = (names[int(above[0])], above)
        single = self._best_of_tables(hunt.record)
        if single is not None:
            plans["table"] = single
        batches = self.parts["report"]
        found = report_on(
            self.setting, batches, {role: options for role, (_, options) in plans.items()}, self.damage, self.report
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
            {**self.tables, "posterior": posterior},
            measured,
            round(self.spending.used, 4),
            {},
            0.0,
            {},
            {},
            self.shifts,
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
            every = [o for o in self._uniform() if record.allowed[np.arange(len(o)), o].all()]
            free = Record(Problem.of(self.base, self.goal.budget or Budget()), self.costs, self.generator)
            fitting = [o for o in every if free.fits(o) and self.select.measure(o).value <= self.goal.tolerance]
            return min(fitting, key=lambda o: self._use(self.goal.over, o), default=None)
        fitting = [options for options in self._uniform() if record.fits(options) and not record.new(options)]
        return min(fitting, key=lambda o: record.measured[tuple(o.tolist())], default=None)

    def _next_uniform(self, record: Record) -> Options | None:
        """The cheapest uniform precision that does not fit."""
        beyond = [o for o in self._uniform() if not record.fits(o) and record.allowed[np.arange(len(o)), o].all()]
        return min(beyond, key=lambda o: self._use(self.goal.over, o), default=None)

    def _best_of_tables(self, record: Record) -> tuple[str, Options] | None:
        """The best of the plans that single tables propose, by the select part."""
        single = {name: record.exact(costs) for name, costs in self.costs.items()}
        known = {name: o for name, o in single.items() if o is not None and not record.new(o)}
        if not known:
            return None
        name = min(known, key=lambda name: record.measured[tuple(known[name].tolist())])
        return f"best of {name}", known[name]

    def _verdict(self, plans: Mapping[str, tuple[str, Options]], found: Mapping[str, Measurement]) -> Verdict:
        name, uniform = plans.get("uniform", (None, None))
        chosen = plans["plan"][1]
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
                self.damage.unit,
            )
        difference, se = found["uniform"].over(found["plan"]) if uniform is not None else (math.nan, math.nan)
        same = uniform is not None and np.array_equal(uniform, chosen)
        return verdict(self.damage.unit, name, difference, se, chosen=same)

    def _plan(self, hunt: Hunt, chosen: Options) -> tuple[Plan, CostTable]:
        """The plan with its proof against the posterior table, and that table."""
        costs = hunt.posterior.expected()
        counts = np.bincount(self.rows)
        table = replace(
            self.base,
            sensitivity=(costs / counts[:, None])[self.rows],
            unit=self.damage.unit,
            origin={
                "estimator": f"posterior of {len(hunt.posterior.plans)} measured plans on {', '.join(self.costs)}",
                "quantizer": repr(self.setting.quantizer),
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
                "select": {"damage": measured.value, "se": measured.se, "unit": self.damage.unit},
                "seed": self.seed,
            },
            "table": dict(table.origin),
        }
        return replace(solution.plan, origin=origin), table

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
            self.damage.unit,
            {"part": "select", "samples": _size(self.parts["select"])},
        )


def _silent(iterable: Any, total: int, label: str) -> Any:
    """No bar: the search has its own."""
    return tqdm(iterable, total=total, desc=label, disable=True)


def _unit_of_layers(base: CostTable, setting: Setting) -> NDArray[np.int64]:
    """(L,) unit of each layer of a table."""
    place = {layer.name: u for u, unit in enumerate(setting.units) for layer in unit.layers}
    return np.array([place[layer.name] for layer in base.layers])


def _geometric_mean(tables: Sequence[Array]) -> Array:
    """Of tables, cell by cell; 0 where any of them says 0.

    >>> _geometric_mean([np.array([[1.0, 4.0]]), np.array([[4.0, 4.0]])])
    array([[2., 4.]])
    """
    zero = np.any([table == 0 for table in tables], axis=0)
    logs = np.mean([np.log(np.where(table == 0, 1.0, table)) for table in tables], axis=0)
    found: Array = np.where(zero, 0.0, np.exp(logs))
    return found


def _joined(first: Measurement, second: Measurement) -> Measurement:
    return Measurement(np.append(first.sums, second.sums), np.append(first.counts, second.counts))


def _size(batches: Sequence[Batch]) -> int:
    return sum(map(samples, batches))


def _parts(
    batches: Iterable[Batch], select: Iterable[Batch] | None, report: Iterable[Batch] | None, seed: int
) -> dict[str, list[Batch]]:
    """The three parts; those that are not given are split off."""
    given = {"select": select, "report": report}
    own = {name: collect(part) for name, part in given.items() if part is not None}
    shares = {name: share for name, share in SHARES.items() if name not in own}
    total = sum(shares.values())
    parts = split(collect(batches), {name: share / total for name, share in shares.items()}, seed)
    check_sizes({name: _size(part) for name, part in own.items()} or {"score": 4})
    return {name: parts[name] if name in parts else own[name] for name in SHARES}


def _known_metric(metric: Any) -> Any:
    known = ("kl", "loss", "accuracy")
    if not callable(metric) and metric not in known:
        raise EstimatorError(f"unknown metric {metric!r}{nearest(str(metric), known)}; or give metric(model, batch)")
    return metric


def _limit(effort: str, max_passes: float | None, cells: int) -> float:
    if max_passes is not None:
        if not (math.isfinite(max_passes) and max_passes > 0):
            raise EstimatorError(f"max_passes={max_passes}, expected a finite number above 0")
        return float(max_passes)
    efforts = {"fast": 8.0, "default": 40.0 + cells, "thorough": 4 * (40.0 + cells)}
    if effort not in efforts:
        raise EstimatorError(f"unknown effort {effort!r}{nearest(effort, efforts)}")
    return efforts[effort]


def _label(one: Estimator, among: Sequence[Estimator]) -> str:
    """File name of a table: the class, numbered where it occurs again."""
    name = type(one).__name__
    twins = [other for other in among if type(other).__name__ == name]
    return name if len(twins) == 1 else f"{name}-{[o is one for o in twins].index(True) + 1}"


def _check_identity(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    for name in wanted:
        if found.get(name) != wanted[name]:
            raise EstimatorError(
                f"the previous search was for other {name}: it has {found.get(name)}, this one has {wanted[name]}"
            )
