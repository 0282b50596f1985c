"""The tables that a search starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mpsearch.calibration.calibration import Calibration
from mpsearch.calibration.families import families, planned_passes
from mpsearch.checkpoints.keys import TablesKey
from mpsearch.core.table import Array, CostTable
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimator
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.surrogate import OutputShifts, Surrogate
from mpsearch.metrics.divergences import KL
from mpsearch.models.data.splitting import LEAST
from mpsearch.models.fingerprints import described, digest
from mpsearch.models.running import samples
from mpsearch.plan_search.passes import PassBudget
from mpsearch.plan_search.sampled_cells import SampledCells, leading_samples
from mpsearch.sensitivity import FisherProjection, KLDivergence, OutputDamage, OutputGradient, OutputMSE

#: Fewer passes than these are few: they go into the sweep, not into runs of one perturbation at a time.
FEW = 20.0
#: Tables that the prior is the geometric mean of; the others propose plans.
_LEADING = ("fisher-projection", "kl-divergence", "output-damage")
#: Estimators whose runs skip what a perturbation cannot change.
_PARTIAL = (KLDivergence, OutputDamage, OutputMSE, SampledCells)
#: Share of the passes that one perturbation at a time may take.
_MOST = 0.45


@dataclass(frozen=True, eq=False)
class Scores:
    """What the score part says.

    Attributes:
        tables: name of a signal -> its table.
        costs: the same as (D, P) damage of decisions, at least 0.
        prior: (D, P) the belief that measured plans correct.
        surrogate: of the output, where runs of one perturbation at a time were made.
    """

    tables: Mapping[str, CostTable]
    costs: Mapping[str, Array]
    prior: Array
    surrogate: Surrogate | None

    @property
    def together(self) -> Array:
        """(D, P) geometric mean of all tables."""
        return geometric_mean(list(self.costs.values()))


@dataclass(frozen=True, eq=False)
class Start:
    """What a search starts from.

    Attributes:
        estimators: name of a table -> its estimator.
        shifts: the shifts of the output are taken from the runs of one perturbation at a time, for a surrogate.
    """

    estimators: Mapping[str, Estimator]
    shifts: bool = False

    def passes(self, context: Context) -> float:
        """Passes over the score part that the estimators take at most, as far as they tell."""
        estimators = list(self.estimators.values())
        return sum(_forecast(context, [estimators[place] for place in places]) for places in families(estimators))


def scores(
    calibration: Calibration,
    context: Context,
    base: CostTable,
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    share: float,
    budget: PassBudget,
    start: Start,
) -> Scores:
    """Fill the tables that the passes allow: one sweep of gradients, and one perturbation at a time.

    Args:
        calibration: the prepared model, on the score part.
        context: model, score part, decisions, precisions.
        base: layers and resources.
        rows: (L,) decision of each layer.
        share: of all samples that the score part has.
        budget: of passes; is charged.
        start: the estimators (`starting`).

    Raises:
        EstimatorError: from an estimator, or for scores below 0 of one that only ranks.
    """
    names, estimators = list(start.estimators), list(start.estimators.values())
    shifts = OutputShifts(context.checkpoint)
    profiled = calibration.profile(
        estimators, loss=context.comparison, members=False, observers=[shifts] if start.shifts else []
    )
    for places in families(estimators):
        family = [estimators[place] for place in places]
        key = TablesKey(digest(*map(described, family)))
        origin = profiled[places[0]].origin
        passes, measured = context.checkpoint.get(key), origin["passes_in_this_run"]
        if passes is None:
            passes = _taken(context, family, measured)
            context.checkpoint.put(key, passes)
        earlier = {kind: origin["passes"][kind] - measured[kind] for kind in measured}
        budget.charge(share * passes, key, share * min(passes, earlier["forward"] + 2 * earlier["backward"]))
    tables = {
        name: replace(table, sensitivity=np.where(base.allowed, table.sensitivity, np.nan), interactions=None)
        for name, table in zip(names, profiled, strict=True)
    }
    costs = {name: _decision_costs(name, table, rows) for name, table in tables.items()}
    leading = [costs[name] for name in _LEADING if name in costs]
    return Scores(
        tables,
        costs,
        geometric_mean(leading or list(costs.values())),
        shifts.surrogate(len(context.decisions), context.precisions),
    )


def starting(
    context: Context,
    share: float,
    limit: float,
    room: float,
    estimators: Sequence[Estimator] | None,
    seed: int,
) -> Start:
    """What to start from.

    Args:
        context: score part, decisions, precisions.
        share: of all samples that the score part has.
        limit: passes of the whole search.
        room: passes that tables may take at most, for the rest to be done.
        estimators: instead of the default ones.
        seed: of the default ones.
    """
    if estimators is not None:
        return Start({_label(estimator, estimators): estimator for estimator in estimators})
    draws = 2 if limit < FEW else 8
    gradients: dict[str, Estimator] = {
        "fisher-projection": FisherProjection(draws, seed=seed),
        "output-gradient": OutputGradient(draws, seed=seed),
    }
    name, perturbations = (
        ("kl-divergence", KLDivergence()) if isinstance(context.loss, KL) else ("output-damage", OutputDamage())
    )
    cells = _within(perturbations, context, _MOST * limit / share, few=limit < FEW)
    if cells is not None:
        every = Start({**gradients, name: cells}, shifts=True)
        if share * every.passes(context) <= room:
            return every
    return Start(gradients)


def _within(estimator: OneAtATime, context: Context, most: float, *, few: bool) -> OneAtATime | None:
    """One perturbation at a time in fewer than so many passes over the score part: on all samples, else on as many as fit in.

    None where those are fewer than `LEAST`; where passes are few, where they are not all.
    """
    sizes = len(context.batches), len(context.decisions), len(context.precisions)
    if estimator.cost(*sizes).forward < most:
        return estimator
    total = sum(map(samples, context.batches))
    fitting = int(most / estimator.cost(1, *sizes[1:]).forward * total)
    return None if few or fitting < LEAST else SampledCells(estimator, min(fitting, total), total)


def from_bits(context: Context) -> Scores:
    """What is known before any pass: the noise of rounding falls fourfold with each bit, of weights and of inputs alike."""
    noise = [
        option.quantizes_weight * 4.0**-option.weight_bits + option.quantizes_activation * 4.0**-option.activation_bits
        for option in context.precisions
    ]
    return Scores({}, {}, np.tile(noise, (len(context.decisions), 1)), None)


def _forecast(context: Context, family: Sequence[Estimator]) -> float:
    """Passes that a family says it takes, a backward pass counted twice."""
    sizes = len(context.batches), len(context.decisions), len(context.precisions)
    costs = [cost for estimator in family if (cost := planned_passes(estimator, *sizes)) is not None]
    return max((cost.forward for cost in costs), default=0.0) + 2 * max((cost.backward for cost in costs), default=0.0)


def _taken(context: Context, family: Sequence[Estimator], measured: Mapping[str, float]) -> float:
    """Passes that a family took, the same number where it was interrupted and went on: then `measured` counts the last run alone."""
    planned = _forecast(context, family)
    if all(type(estimator) in _PARTIAL for estimator in family):
        trace = context.trace()
        changing = sum(option.quantizes_weight or option.quantizes_activation for option in context.precisions)
        entries = [
            trace.entry([context.module(layer) for layer in decision.layers], list(context.parameters(decision)))
            for decision in context.decisions
        ]
        part, batches = 1.0, len(context.batches)
        if isinstance(family[0], SampledCells):
            part, batches = family[0].share, len(leading_samples(context.batches, family[0].samples))
        planned = part * (2 + 2 / batches + changing * sum(map(trace.share, entries)))
    passes = measured["forward"] + 2 * measured["backward"]
    if (
        context.blocks is not None
    ):  # blocks run again for their gradients: a search measures as many plans as it would in memory
        return planned
    return planned if passes <= planned * (1 + 1e-6) else passes


def _decision_costs(name: str, table: CostTable, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Array:
    """(D, P) damage of each decision, at least a millionth of the largest, 0 where the estimator says exactly 0."""
    merged = np.zeros((int(rows.max()) + 1, len(table.precisions)))
    np.add.at(merged, rows, table.sensitivity)
    if table.unit == "relative" and (merged < 0).any():
        raise EstimatorError(f"the table of {name} has negative scores; a search starts from damages of 0 or more")
    floor = 1e-6 * float(np.nanmax(np.abs(merged), initial=0.0))
    return np.where(merged == 0, 0.0, np.maximum(merged, floor))


def geometric_mean(tables: Sequence[Array]) -> Array:
    """Of tables, cell by cell; 0 where any of them says 0.

    >>> geometric_mean([np.array([[1.0, 4.0]]), np.array([[4.0, 4.0]])])
    array([[2., 4.]])
    """
    zero = np.any([table == 0 for table in tables], axis=0)
    logs = np.mean([np.log(np.where(table == 0, 1.0, table)) for table in tables], axis=0)
    mean: Array = np.where(zero, 0.0, np.exp(logs))
    return mean


def _label(estimator: Estimator, among: Sequence[Estimator]) -> str:
    """File name of a table: the class, numbered where it occurs again."""
    name = type(estimator).__name__
    twins = [other for other in among if type(other).__name__ == name]
    return name if len(twins) == 1 else f"{name}-{[twin is estimator for twin in twins].index(True) + 1}"
