"""The tables that a search starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpsearch.calibration.calibration import Calibration
from mpsearch.calibration.families import families
from mpsearch.checkpoints.keys import TablesKey
from mpsearch.core.table import Array, CostTable
from mpsearch.errors import EstimatorError
from mpsearch.estimation.estimator import Context, Estimator
from mpsearch.estimation.surrogate import LogitShift, Surrogate, surrogate
from mpsearch.metrics.divergences import KL
from mpsearch.models.fingerprints import described, digest
from mpsearch.models.replay import record
from mpsearch.plan_search.passes import PassBudget
from mpsearch.sensitivity import FisherProjection, KLDivergence, OutputDamage, OutputGradient, OutputMSE

#: Fewer passes than these are few: they go into the sweep, not into runs of one perturbation at a time.
FEW = 20.0
#: Tables that the prior is the geometric mean of; the others propose plans.
_LEADING = ("fisher-projection", "kl-divergence", "output-damage")
#: Estimators whose runs skip what a perturbation cannot change.
_PARTIAL = (KLDivergence, LogitShift, OutputDamage, OutputMSE)
#: Share of the passes that one perturbation at a time may take.
_MOST = 0.45


@dataclass(frozen=True, eq=False)
class Scores:
    """What the score part says.

    Attributes:
        tables: name of a signal -> its table.
        costs: the same as (U, P) damage of units, at least 0.
        prior: (U, P) the belief that measured plans correct.
        surrogate: of the output, where one-at-a-time runs were made.
    """

    tables: Mapping[str, CostTable]
    costs: Mapping[str, Array]
    prior: Array
    surrogate: Surrogate | None

    @property
    def together(self) -> Array:
        """(U, P) geometric mean of all tables."""
        return geometric_mean(list(self.costs.values()))


def scores(
    calibration: Calibration,
    context: Context,
    base: CostTable,
    rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    share: float,
    spending: PassBudget,
    chosen: Mapping[str, Estimator],
    members: Sequence[Estimator],
) -> Scores:
    """Fill the tables that the passes allow: one sweep of gradients, and one perturbation at a time.

    Args:
        calibration: the prepared model, on the score part.
        context: model, score part, units, precisions.
        base: layers and resources.
        rows: (L,) unit of each layer.
        share: of all samples that the score part has.
        spending: is charged.
        chosen: name of a table -> its estimator (`starting`).
        members: these, and what runs along with them.

    Raises:
        EstimatorError: from an estimator, or for scores below 0 of one that only ranks.
    """
    made = calibration.profile(members, loss=context.comparison, members=False)
    for places in families(members):
        family = [members[place] for place in places]
        key = TablesKey(digest(*map(described, family)))
        origin = made[places[0]].origin
        passes, measured = context.checkpoint.get(key), origin["passes_in_this_run"]
        if passes is None:
            passes = _taken(context, family, measured)
            context.checkpoint.put(key, passes)
        earlier = {kind: origin["passes"][kind] - measured[kind] for kind in measured}
        spending.charge(share * passes, key, share * min(passes, earlier["forward"] + 2 * earlier["backward"]))
    tables = {
        name: replace(
            table,
            sensitivity=np.where(base.allowed, table.sensitivity, np.nan),
            usage=base.usage,
            fixed_usage=base.fixed_usage,
            reference_usage=base.reference_usage,
            peaks=base.peaks,
            interactions=None,
        )
        for name, table in zip(chosen, made[: len(chosen)], strict=True)  # what runs along comes behind
    }
    costs = {name: _unit_costs(name, table, rows) for name, table in tables.items()}
    leading = [costs[name] for name in _LEADING if name in costs]
    return Scores(
        tables,
        costs,
        geometric_mean(leading or list(costs.values())),
        surrogate(context.checkpoint, len(context.decisions), context.precisions),
    )


def starting(
    context: Context,
    share: float,
    limit: float,
    room: float,
    estimators: Sequence[Estimator] | None,
    seed: int,
) -> tuple[dict[str, Estimator], list[Estimator]]:
    """Estimators by the name of their table; and these with what runs along with them.

    Args:
        context: score part, units, precisions.
        share: of all samples that the score part has.
        limit: passes of the whole search.
        room: passes that tables may take at most, for the rest to be done.
        estimators: instead of the default ones.
        seed: of the default ones.
    """
    if estimators is not None:
        return {_label(one, estimators): one for one in estimators}, list(estimators)
    draws = 2 if limit < FEW else 8
    chosen: dict[str, Estimator] = {
        "fisher-projection": FisherProjection(draws, seed=seed),
        "output-gradient": OutputGradient(draws, seed=seed),
    }
    name, measured = (
        ("kl-divergence", KLDivergence()) if isinstance(context.loss, KL) else ("output-damage", OutputDamage())
    )
    cost = measured.cost(len(context.batches), len(context.decisions), len(context.precisions))
    every = [*chosen.values(), measured, LogitShift()]
    if share * cost.forward < _MOST * limit and share * forecast(context, every) <= room:
        return {**chosen, name: measured}, every
    return chosen, list(chosen.values())


def from_bits(context: Context) -> Scores:
    """What is known before any pass: the noise of rounding falls fourfold with each bit, of weights and of inputs alike."""
    noise = [
        option.quantizes_weight * 4.0**-option.weight_bits + option.quantizes_activation * 4.0**-option.activation_bits
        for option in context.precisions
    ]
    return Scores({}, {}, np.tile(noise, (len(context.decisions), 1)), None)


def forecast(context: Context, members: Sequence[Estimator]) -> float:
    """Passes over the score part that estimators take at most, as far as they tell."""
    return sum(_told(context, [members[place] for place in family]) for family in families(members))


def _told(context: Context, family: Sequence[Any]) -> float:
    costs = [
        one.cost(len(context.batches), len(context.decisions), len(context.precisions))
        for one in family
        if hasattr(one, "cost")
    ]
    return max((c.forward for c in costs), default=0.0) + 2 * max((c.backward for c in costs), default=0.0)


def _taken(context: Context, family: Sequence[Estimator], measured: Mapping[str, float]) -> float:
    """Passes that a family took, the same number where it was interrupted and went on: then `measured` counts the last run alone."""
    planned = _told(context, family)
    if all(type(one) in _PARTIAL for one in family):
        trace, _ = record(context.model, context.batches[0])
        changing = sum(option.quantizes_weight or option.quantizes_activation for option in context.precisions)
        entries = [
            trace.entry([context.module(layer) for layer in decision.layers], list(context.parameters(decision)))
            for decision in context.decisions
        ]
        planned = 2 + 2 / len(context.batches) + changing * sum(map(trace.share, entries))
    found = measured["forward"] + 2 * measured["backward"]
    return planned if found <= planned * (1 + 1e-6) else found


def _unit_costs(name: str, table: CostTable, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Array:
    """(U, P) damage of each unit, at least a millionth of the largest, 0 where the estimator says exactly 0."""
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
    found: Array = np.where(zero, 0.0, np.exp(logs))
    return found


def _label(one: Estimator, among: Sequence[Estimator]) -> str:
    """File name of a table: the class, numbered where it occurs again."""
    name = type(one).__name__
    twins = [other for other in among if type(other).__name__ == name]
    return name if len(twins) == 1 else f"{name}-{[o is one for o in twins].index(True) + 1}"
