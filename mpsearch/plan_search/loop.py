"""Plans within the limits of a budget, proposed and measured until the passes are spent."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mpsearch.plan_search.evaluator import Measurement, PlanEvaluator
from mpsearch.plan_search.proposers import Posterior, Proposer, Record

Options = NDArray[np.int64]

#: A plan is dropped where it is worse than the best one by so many standard errors of the difference.
DROPPED_AT = 3.0
#: A plan that does more than so many times the damage of the best one beyond it tells nothing of plans near the best one.
_FAR = 3.0


@dataclass(eq=False)
class PlanSearch:
    """One budget: measures what is proposed, and learns from it.

    Attributes:
        record: limits, tables, measured plans.
        prior: (U, P) damage that the posterior starts from, up to a factor.
        meter: on the select part.
        between: on vicinal samples; the first `drawn` of them count in what is made least.
        drawn: as many as the select part has.
        posterior: after the first measurement.
    """

    record: Record
    prior: NDArray[np.float64]
    meter: PlanEvaluator
    between: PlanEvaluator | None = None
    drawn: int = 0
    posterior: Posterior = field(init=False)

    def __post_init__(self) -> None:
        self.posterior = Posterior(self.prior)

    @property
    def least(self) -> float:
        """Damage of the best plan so far."""
        return self.record.measured[tuple(self.record.best.tolist())]

    def open(self, plans: Sequence[Options], enough: Callable[[], bool]) -> None:
        """Measure the first plans, the very first whatever it costs, and set the scale of the prior by them."""
        for options in plans:
            if self.record.new(options) and self.record.fits(options) and not (self.record.measured and enough()):
                self.measure(options)
        self._learn()

    def adopt(self, plans: Sequence[Options]) -> None:
        """Take over plans that were measured within other limits; those on the whole part alone."""
        for options in plans:
            if self.meter.complete(options):
                self._keep(options, self.meter.measure(options).value)
        self._learn()

    def go(self, proposers: Sequence[Proposer], enough: Callable[[], bool], most: float = math.inf) -> None:
        """Ask the proposers in turn and measure.

        Args:
            proposers: asked in turn.
            enough: True ends it; so does a round in which none has anything to propose.
            most: plans to measure.
        """
        idle = asked = 0
        while idle < len(proposers):
            for proposer in proposers:
                if asked >= most or enough():
                    return
                asked += 1
                options = proposer.propose(self.record, self.posterior)
                if options is None:
                    idle += 1
                    continue
                idle = 0
                value = self.measure(options)
                if _near(value, self.least):
                    self.posterior.add(options, value)

    def measure(self, options: Options) -> float:
        """What is made least, of a plan; it is dropped as soon as it is clearly worse than the best one, and then estimated.

        The estimate is that of the best plan and the difference on the samples that both have seen.
        """
        record, meter = self.record, self.meter
        best: Measurement | None = None
        if any(record.fits(np.array(key)) for key in record.measured):
            best = meter.known.get(tuple(record.best.tolist()))

        def clearly_worse(found: Measurement) -> bool:
            if best is None:
                return False
            difference, se = found.over(best)
            return difference > DROPPED_AT * se and difference > 0

        found = meter.measure(options, clearly_worse)
        if meter.complete(options) or best is None:
            return self._keep(options, found.value)
        return self._keep(options, best.value + found.over(best)[0], best.value)

    def _keep(self, options: Options, damage: float, best: float | None = None) -> float:
        """Write down the damage of a plan, and what is made least; estimated in proportion to the best plan's `best` if given."""
        key, record = tuple(options.tolist()), self.record
        least = damage
        if self.between is not None and best is None:
            least += self.between.measure(options, lambda found: len(found.sums) >= self.drawn).first(self.drawn).value
        elif best is not None:
            least = self.least * damage / best if best > 0 else self.least + damage
        record.damage[key], record.measured[key] = damage, least
        return least

    def _learn(self) -> None:
        """The posterior from all plans measured so far."""
        if self.record.measured:
            self.posterior = learned(self.prior, self.record.measured)


def learned(prior: NDArray[np.float64], measured: Mapping[tuple[int, ...], float]) -> Posterior:
    """The posterior of a prior that is right up to a factor, from measured plans; the best of them set the factor."""
    rows = np.arange(len(prior))
    least = min(measured.values())
    near = [(np.array(key), value) for key, value in measured.items() if _near(value, least)]
    expected = [float(prior[rows, options].sum()) for options, _ in near]
    ratios = [value / sum_ for (_, value), sum_ in zip(near, expected, strict=True) if value > 0 and sum_ > 0]
    scale = float(np.exp(np.mean(np.log(ratios)))) if ratios else 1.0
    posterior = Posterior(prior * scale)
    for options, value in near:
        posterior.add(options, value)
    return posterior


def _near(value: float, least: float) -> bool:
    return value <= least + _FAR * abs(least)
