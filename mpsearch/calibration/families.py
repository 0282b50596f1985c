"""Estimators that run together, and the layers of a tie that they score alone."""

import math
from collections.abc import Sequence
from typing import Any

from mpsearch.core.decision import Decision
from mpsearch.core.settings import check_settings
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate, Estimator, capabilities_of
from mpsearch.estimation.passes import Passes
from mpsearch.models.streaming.offloading import is_offloaded

#: Most layers of a tie that are scored alone where that takes runs of the model.
_ALONE = 8


def checked_estimators(estimators: Sequence[Estimator]) -> list[Estimator]:
    """The estimators as a list.

    Raises:
        EstimatorError: where there is none, one has no method `estimate`, or a setting is no value of its type.
    """
    if not estimators:
        raise EstimatorError("no estimator given")
    for estimator in estimators:
        if not isinstance(estimator, Estimator):
            raise EstimatorError(f"{estimator!r} is no estimator: it has no method 'estimate'")
        check_settings(estimator, EstimatorError)
    return list(estimators)


def check_caches(estimators: Sequence[Estimator], decisions: Sequence[Decision]) -> None:
    """Refuse estimators that would find nothing in a cache, and call it free.

    Raises:
        EstimatorError: names the estimator and the cache.
    """
    names = [layer.name for decision in decisions for layer in decision.layers if layer.is_cache]
    for estimator in estimators:
        if names and not capabilities_of(estimator).scores_caches:
            raise EstimatorError(
                f"{type(estimator).__name__} looks at weights, and the cache {names[0]!r} has none; take an estimator that perturbs what "
                "goes into it, such as KLDivergence or FisherProjection, or leave out kv_cache=True"
            )


def families(estimators: Sequence[Estimator]) -> list[list[int]]:
    """Places of estimators that run together: those with the same function `together`."""
    places: dict[Any, list[int]] = {}
    for place, estimator in enumerate(estimators):
        together = capabilities_of(estimator).together
        places.setdefault(place if together is None else together, []).append(place)
    return list(places.values())


def estimates_of(context: Context, family: Sequence[Estimator]) -> list[Estimate]:
    """Run a family; an estimate for each member.

    Raises:
        EstimatorError: for one that differentiates the whole model at once, where its weights lie elsewhere.
    """
    for estimator in family:
        if capabilities_of(estimator).takes_all_weights and is_offloaded(context.model):
            raise EstimatorError(
                f"{type(estimator).__name__} differentiates through all blocks at once, and the weights of the model lie elsewhere: take "
                "GaussNewtonTrace or FisherProjection, which run block by block, or load the weights"
            )
    together = capabilities_of(family[0]).together
    return together(context, family) if together else [family[0].estimate(context)]


def members_alone(family: Sequence[Estimator], decisions: Sequence[Decision], *, runs: bool) -> list[Decision]:
    """Layers of groups that a target ties, each as a decision of its own, where the estimators score those too.

    Args:
        family: that runs together.
        decisions: the decisions.
        runs: for estimators that take runs of the model for each decision too, for groups of up to `_ALONE` layers.
    """
    kinds = {capabilities_of(estimator).scores_members for estimator in family}
    if kinds - {"free", "runs"} or ("runs" in kinds and not runs):
        return []
    most = _ALONE if "runs" in kinds else math.inf
    tied = [
        decision
        for decision in decisions
        if 1 < len(decision.layers) <= most and all(layer.target for layer in decision.layers)
    ]
    return [
        Decision(layer.name, (layer,))
        for decision in tied
        if "shared weight" not in decision.name
        for layer in decision.layers
    ]


def planned_passes(estimator: Estimator, batches: int, decisions: int, precisions: int) -> Passes | None:
    """The passes over the data that an estimator says it will take, at most; None for one that does not tell."""
    cost = capabilities_of(estimator).cost
    return None if cost is None else cost(batches, decisions, precisions)
