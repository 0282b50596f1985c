"""From what an estimator returns to a cost table."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mpsearch.allocation.ties import in_proportion
from mpsearch.core.decision import Decision
from mpsearch.core.layer import Layer
from mpsearch.core.table import CostTable, Interactions
from mpsearch.errors import EstimatorError, warn
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.models.modules.experts import filled, report


def check_estimate(estimator: Any, estimate: Estimate, context: Context) -> None:
    """Hold an estimate against its contract: its shape, and finite numbers.

    Raises:
        EstimatorError: for another shape, or an infinite score.
    """
    shape = (len(context.decisions), len(context.precisions))
    for name, values in (("sensitivity", estimate.sensitivity), ("sensitivity_se", estimate.sensitivity_se)):
        if values is not None and np.shape(values) != shape:
            raise EstimatorError(f"{estimator!r} returned {name} of shape {np.shape(values)}, expected {shape}")
    if np.isinf(estimate.sensitivity).any():
        u, p = np.argwhere(np.isinf(estimate.sensitivity))[0]
        raise EstimatorError(
            f"sensitivity of layer {context.decisions[u].name!r} at {context.precisions[p]} is {estimate.sensitivity[u, p]}, "
            f"expected a finite number ({estimator!r})"
        )


def scored_table(
    base: CostTable,
    decisions: Sequence[Decision],
    alone: Sequence[Decision],
    estimate: Estimate,
    origin: Mapping[str, Any],
    unseen: set[str],
) -> CostTable:
    """The table of an estimate.

    Args:
        base: what is allowed, and what it costs.
        decisions: the first rows of the estimate.
        alone: the other rows: layers of ties, scored alone, that the score of their tie is shared out by.
        estimate: of both.
        origin: of the table.
        unseen: layers that no sample reached; they take the mean of their like.
    """
    row_of_layer = {layer.name: u for u, decision in enumerate(decisions) for layer in decision.layers}
    rows = np.array([row_of_layer[layer.name] for layer in base.layers])
    own = {
        decision.name: np.maximum(row, 0.0)
        for decision, row in zip(alone, estimate.sensitivity[len(decisions) :], strict=True)
    }
    ones = np.ones(len(base.precisions))
    # the sum over a group is its score
    share = in_proportion(np.array([own.get(layer.name, ones) for layer in base.layers]), rows)
    together = [
        decision.name for decision in decisions if len(decision.layers) > 1 and decision.layers[0].name not in own
    ]
    if together:
        origin = {**origin, "scored_together": together}
    scores = estimate.sensitivity[rows] * share
    se = None if estimate.sensitivity_se is None else estimate.sensitivity_se[rows] * share
    idle = np.array([all(layer.name in unseen for layer in decisions[u].layers) for u in rows])
    if idle.any():
        names = [layer.name for layer, of_none in zip(base.layers, idle, strict=True) if of_none]
        report(names)
        scores, origin = filled(scores, base.layers, idle), {**origin, "scored_by_mean_of_experts": names}
        se = None if se is None else np.where(idle[:, None], np.nan, se)
    return replace(
        base,
        sensitivity=np.where(base.allowed, scores, np.nan),
        sensitivity_se=se,
        unit=estimate.unit,
        origin=origin,
        interactions=None if estimate.pairs is None else _interactions(estimate.pairs, decisions, base.layers),
    )


def warn_of_no_effect(context: Context, estimate: Estimate, unseen: set[str]) -> None:
    """Warn of layers that a rise of the loss calls free at every precision, though their weights change."""
    if estimate.unit == "relative":
        return
    free = dict.fromkeys(
        layer.name
        for decision, scores in zip(context.decisions, estimate.sensitivity, strict=True)
        if not scores.any()
        for layer in context.parameters(decision).values()
        if layer.name not in unseen and any(context.perturbation(layer, option).any() for option in context.precisions)
    )
    if free:
        shown = ", ".join(list(free)[:5]) + (f", ... ({len(free)} in all)" if len(free) > 5 else "")
        warn(
            f"the loss does not depend on {shown}: plans give them the fewest bits; exclude them if another output of the model counts, or "
            "if the model cuts their gradients off"
        )


def _interactions(pairs: np.ndarray, decisions: Sequence[Decision], decided: Sequence[Layer]) -> Interactions:
    """Pairs of decisions as pairs of rows: of a group, the first member carries them."""
    row = {layer.name: number for number, layer in enumerate(decided)}
    rows = [row[decision.layers[0].name] for decision in decisions]
    count = pairs.shape[1]
    places = [
        (u, p, v, q) for u, v in itertools.combinations(range(len(decisions)), 2) for p, q in np.ndindex(count, count)
    ]
    coupled = [place for place in places if pairs[place] != 0]
    return Interactions(
        np.array([(rows[u], p) for u, p, _, _ in coupled], np.int64).reshape(-1, 2),
        np.array([(rows[v], q) for _, _, v, q in coupled], np.int64).reshape(-1, 2),
        np.array([pairs[place] for place in coupled], np.float64),
    )
