"""Plans within the limits of a budget, proposed and measured until the passes are spent."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.budget import inequality
from mpsearch.errors import PlanError
from mpsearch.plan_search.evaluator import Measurement, PlanEvaluator
from mpsearch.plan_search.proposers import Columns, Posterior, Proposer, Record

#: A plan is dropped where it is worse than the best one by so many standard errors of the difference.
DROPPED_AT = 3.0
#: A plan that does more than so many times the damage of the best one beyond it tells nothing of plans near the best one.
_FAR = 3.0
#: Plans in a row that were measured before, after which a proposer counts as out of plans.
_REPEATS = 8


@dataclass(eq=False)
class PlanSearch:
    """The search for plans within one budget: it measures what is proposed, and learns from it.

    Attributes:
        record: limits, tables, measured plans.
        prior: (D, P) damage that the posterior starts from, up to a factor.
        evaluator: on the select part.
        between: on samples between the samples; the first `drawn` of them count in what is to be least.
        drawn: as many as the select part has.
        posterior: what is known of each cell by now.
    """

    record: Record
    prior: NDArray[np.float64]
    evaluator: PlanEvaluator
    between: PlanEvaluator | None = None
    drawn: int = 0
    posterior: Posterior = field(init=False)

    def __post_init__(self) -> None:
        self.posterior = Posterior(self.prior)

    @property
    def least(self) -> float:
        """What the best plan so far has made of what is to be least."""
        best = self.record.best
        assert best is not None, "no plan within the limits was measured yet"
        return self.record.measured[tuple(best.tolist())]

    def open(self, plans: Sequence[Columns], enough: Callable[[], bool]) -> None:
        """Measure the first plans, the very first whatever it costs, and set the scale of the prior by them."""
        waiting: list[Columns] = []
        for columns in plans:
            known = bool(self.record.measured or waiting)
            if self.record.new(columns) and self.record.fits(columns) and not (known and self._full(waiting, enough)):
                self._wait(columns, waiting)
                if self.evaluator.at_once == 1:  # else all of them at once, which takes the fewest readings
                    self._measure_waiting(waiting)
        self._measure_waiting(waiting)
        self._learn()

    def adopt(self, plans: Sequence[Columns]) -> None:
        """Take over plans that were measured within other limits; those on the whole part alone."""
        for columns in plans:
            if self.evaluator.complete(columns):
                self._write(columns, self.evaluator.measure(columns).value)
        self._learn()

    def run(self, proposers: Sequence[Proposer], enough: Callable[[], bool], most: float = math.inf) -> None:
        """Ask the proposers in turn, measure what they propose, and learn from it.

        Args:
            proposers: asked in turn.
            enough: True ends it; so does a round in which none has anything to propose.
            most: plans to measure.

        Raises:
            PlanError: for a proposal that is no plan within the limits.
        """
        idle = turns = 0
        waiting: list[Columns] = []
        while idle < len(proposers):
            for proposer in proposers:
                if turns >= most or self._full(waiting, enough):
                    if not waiting:
                        return
                    self._learn_from(self._measure_waiting(waiting))
                    if turns >= most or enough():
                        return
                turns += 1
                columns = self._proposal(proposer)
                if columns is None:
                    idle += 1
                    continue
                idle = 0
                self._wait(columns, waiting)
                if len(waiting) == self.evaluator.at_once:
                    self._learn_from(self._measure_waiting(waiting))
        self._learn_from(self._measure_waiting(waiting))

    def _full(self, waiting: Sequence[Columns], enough: Callable[[], bool]) -> bool:
        """True where no further plan can be measured after those that wait."""
        if not waiting:
            return enough()
        price = self.evaluator.price + (0.0 if self.between is None else self.between.price)
        with self.evaluator.passes.reserved(len(waiting) * price):
            return enough()

    def _wait(self, columns: Columns, waiting: list[Columns]) -> None:
        self.record.pending.add(tuple(columns.tolist()))
        waiting.append(columns)

    def _measure_waiting(self, waiting: list[Columns]) -> list[tuple[Columns, float]]:
        """Measure the plans that wait; each with what is to be least."""
        plans = list(waiting)
        waiting.clear()
        if not plans:
            return []
        try:
            values = [self.measure(plans[0])] if self.evaluator.at_once == 1 else self.measure_together(plans)
        finally:
            self.record.pending.clear()
        return list(zip(plans, values, strict=True))

    def _learn_from(self, measured: Sequence[tuple[Columns, float]]) -> None:
        for columns, value in measured:
            if _near(value, self.least):
                self.posterior.add(columns, value)

    def measure_together(self, plans: Sequence[Columns]) -> list[float]:
        """Measure plans side by side; those that are clearly worse than the best one after the first batch are dropped there.

        Returns:
            what is to be least, of each.
        """
        record, evaluator = self.record, self.evaluator
        keys = [tuple(columns.tolist()) for columns in plans]
        incumbent = record.best
        others = [] if incumbent is None else [tuple(incumbent.tolist())]

        def clearly_worse(measurement: Measurement) -> bool:
            size = len(measurement.sums)
            rivals = [evaluator.known[key] for key in (*others, *keys) if key in evaluator.known]
            best = min(
                (rival.first(size) for rival in rivals if len(rival.sums) >= size), key=lambda rival: rival.value
            )
            difference, se = measurement.over(best)
            return difference > DROPPED_AT * se and difference > 0

        measurements = evaluator.measure_together(plans, clearly_worse)
        values: dict[int, float] = {}
        for place, (columns, measurement) in enumerate(zip(plans, measurements, strict=True)):
            if evaluator.complete(columns):
                values[place] = self._write(columns, measurement.value)
        for place, (columns, measurement) in enumerate(zip(plans, measurements, strict=True)):
            if place not in values:
                assert record.best is not None  # the best one of them was not dropped
                best = evaluator.known[tuple(record.best.tolist())]
                values[place] = self._write(columns, best.value + measurement.over(best)[0], best.value)
        return [values[place] for place in range(len(plans))]

    def measure(self, columns: Columns) -> float:
        """Measure a plan; one that is clearly worse than the best one is dropped as soon as that shows, and then estimated.

        The estimate is what the best plan has, and the difference on the samples that both have seen.

        Returns:
            what is to be least.
        """
        record, evaluator = self.record, self.evaluator
        incumbent = record.best
        best = None if incumbent is None else evaluator.known.get(tuple(incumbent.tolist()))

        def clearly_worse(measurement: Measurement) -> bool:
            if best is None:
                return False
            difference, se = measurement.over(best)
            return difference > DROPPED_AT * se and difference > 0

        measurement = evaluator.measure(columns, clearly_worse)
        if evaluator.complete(columns) or best is None:
            return self._write(columns, measurement.value)
        return self._write(columns, best.value + measurement.over(best)[0], best.value)

    def _proposal(self, proposer: Proposer) -> Columns | None:
        """A plan that is new and keeps the limits; None where the proposer has none, or only names plans that were measured."""
        for _ in range(_REPEATS):
            columns = proposer.propose(self.record, self.posterior)
            if columns is None:
                return None
            check_proposal(proposer, self.record, columns)
            if self.record.new(columns):
                return columns
        return None

    def _write(self, columns: Columns, damage: float, best: float | None = None) -> float:
        """Write down the damage of a plan, and what is to be least; estimated in proportion to the best plan's `best` if given."""
        key, record = tuple(columns.tolist()), self.record
        least = damage
        if self.between is not None and best is None:
            drawn = self.between.measure(columns, lambda measurement: len(measurement.sums) >= self.drawn)
            least += drawn.first(self.drawn).value
        elif best is not None:
            least = self.least * damage / best if best > 0 else self.least + damage
        record.damage[key], record.measured[key] = damage, least
        return least

    def _learn(self) -> None:
        """The posterior from all plans measured so far."""
        if self.record.measured:
            self.posterior = learned(self.prior, self.record.measured)


def check_proposal(proposer: Proposer, record: Record, columns: Columns) -> None:
    """Refuse a proposal that is no plan, takes an option that is refused, or breaks a limit.

    Raises:
        PlanError: with what is wrong.
    """
    shape = record.allowed.shape
    what = f"{proposer!r} proposed"
    if not (
        isinstance(columns, np.ndarray) and columns.shape == shape[:1] and np.issubdtype(columns.dtype, np.integer)
    ):
        raise PlanError(f"{what} {columns!r}, expected the columns of {shape[0]} decisions, an array of whole numbers")
    if columns.size and not (columns.min() >= 0 and columns.max() < shape[1]):
        raise PlanError(f"{what} columns from {columns.min()} to {columns.max()}, expected 0 to {shape[1] - 1}")
    if record.fits(columns):
        return
    refused = np.flatnonzero(~record.allowed[np.arange(shape[0]), columns])
    if len(refused):
        raise PlanError(f"{what} column {columns[refused[0]]} in decision {refused[0]}, which is not allowed there")
    (name, used), *_ = record.problem.broken(columns)
    limit = inequality(name, record.problem.limits[name])
    raise PlanError(f"{what} a plan that breaks a limit: it uses {used:.6g}, expected {limit}")


def learned(prior: NDArray[np.float64], measured: Mapping[tuple[int, ...], float]) -> Posterior:
    """The posterior of a prior that is right up to a factor, from measured plans; the best of them set the factor."""
    rows = np.arange(len(prior))
    least = min(measured.values())
    near = [(np.array(key), value) for key, value in measured.items() if _near(value, least)]
    expected = [float(prior[rows, columns].sum()) for columns, _ in near]
    ratios = [value / total for (_, value), total in zip(near, expected, strict=True) if value > 0 and total > 0]
    scale = float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0
    posterior = Posterior(prior * scale)
    for columns, value in near:
        posterior.add(columns, value)
    return posterior


def _near(value: float, least: float) -> bool:
    return value <= least + _FAR * abs(least)
