"""What an estimator is, what it returns, and what it may declare beside its one method."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mpsearch.estimation.context import Context
from mpsearch.estimation.passes import Passes


@dataclass(frozen=True)
class Estimate:
    """What an estimator returns.

    Attributes:
        sensitivity: (D, P) damage; larger = worse.
        sensitivity_se: (D, P) standard errors, or None.
        unit: of the damage, `relative` where it only ranks.
        facts: worth keeping in the table's origin; JSON values.
        pairs: (D, P, D, P) symmetric damage of pairs of cells beyond the sum of the two, or None; where both cells
            are chosen, [u, p, v, q] is added once.
    """

    sensitivity: NDArray[np.float64]
    sensitivity_se: NDArray[np.float64] | None = None
    unit: str = "nats"
    facts: Mapping[str, Any] = field(default_factory=dict)
    pairs: NDArray[np.float64] | None = None


@runtime_checkable
class Estimator(Protocol):
    """Scores every precision of every decision. Frozen settings; all work happens in `estimate`.

    What else it can do it declares by the protocols below, each of one member: `ForecastingEstimator`, `JointEstimator`,
    `CacheEstimator`, `MemberEstimator`, `SeededEstimator`, `WholeModelEstimator`. None is needed; `capabilities_of` has what holds without.
    """

    def estimate(self, context: Context) -> Estimate:
        """Score every cell.

        The door has put the model in evaluation mode and checked data and names; it restores the model, spreads decisions
        over their layers, and checks what comes back.

        Args:
            context: model, data, decisions, precisions and helpers.

        Returns:
            (D, P) sensitivity, finite or nan (= option not allowed), 0 where nothing is quantized.
        """
        ...


@runtime_checkable
class ForecastingEstimator(Estimator, Protocol):
    """An estimator that says before any work how often it will run the model."""

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward and backward passes over the data, at most.

        Args:
            batches: number of batches.
            decisions: number of decisions.
            precisions: number of options.
        """
        ...


@runtime_checkable
class JointEstimator(Estimator, Protocol):
    """An estimator that shares its runs with others: those with the very same function `together` are one family."""

    @staticmethod
    def together(context: Context, estimators: Sequence[Any]) -> list[Estimate]:
        """Score for several estimators of the family at once; an estimate for each, in their order."""
        ...


@runtime_checkable
class CacheEstimator(Estimator, Protocol):
    """An estimator that says whether it scores caches of keys and values, which have no weight."""

    @property
    def scores_caches(self) -> bool:
        """True where it perturbs, or reads the gradient of, what goes into a layer."""
        ...


#: Whether layers of a tie are scored alone too: not at all, at no further pass, or at the price of runs of their own.
Members = Literal["no", "free", "runs"]


@runtime_checkable
class MemberEstimator(Estimator, Protocol):
    """An estimator that says whether decisions may overlap, so that the layers of a tie are scored alone too."""

    @property
    def scores_members(self) -> Members:
        """`free`: at no further pass; `runs`: each takes its runs; `no`: decisions must not overlap."""
        ...


@runtime_checkable
class SeededEstimator(Estimator, Protocol):
    """An estimator that draws; another order of layers is another draw."""

    @property
    def seed(self) -> int:
        """Of all draws."""
        ...


@runtime_checkable
class WholeModelEstimator(Estimator, Protocol):
    """An estimator that says whether it differentiates through the whole model at once, which takes all of its weights in memory."""

    @property
    def takes_all_weights(self) -> bool:
        """True where a model whose weights lie elsewhere is refused."""
        ...


@dataclass(frozen=True)
class Capabilities:
    """What an estimator declares, with what holds for one that declares nothing.

    Attributes:
        cost: see `ForecastingEstimator`; None: nothing is said before work.
        together: see `JointEstimator`; None: the estimator runs alone.
        scores_caches: see `CacheEstimator`; by default caches are refused.
        scores_members: see `MemberEstimator`; by default decisions must not overlap.
        seeded: the estimator draws (`SeededEstimator`).
        takes_all_weights: see `WholeModelEstimator`; by default models whose weights lie elsewhere are run.
    """

    cost: Callable[[int, int, int], Passes] | None = None
    together: Callable[[Context, Sequence[Any]], list[Estimate]] | None = None
    scores_caches: bool = False
    scores_members: Members = "no"
    seeded: bool = False
    takes_all_weights: bool = False


def capabilities_of(estimator: Estimator) -> Capabilities:
    """What an estimator declares: the one place that looks. A class with `estimate` alone declares nothing, and that is enough.

    >>> class Flat:
    ...     def estimate(self, context): ...
    >>> capabilities_of(Flat()) == Capabilities()
    True
    >>> from mpsearch.sensitivity import Fisher
    >>> capabilities_of(Fisher()).cost(3, 2, 2), capabilities_of(Fisher()).seeded
    (Passes(forward=2, backward=1), True)
    """
    return Capabilities(
        cost=estimator.cost if isinstance(estimator, ForecastingEstimator) else None,
        together=estimator.together if isinstance(estimator, JointEstimator) else None,
        scores_caches=isinstance(estimator, CacheEstimator) and estimator.scores_caches,
        scores_members=estimator.scores_members if isinstance(estimator, MemberEstimator) else "no",
        seeded=isinstance(estimator, SeededEstimator),
        takes_all_weights=isinstance(estimator, WholeModelEstimator) and estimator.takes_all_weights,
    )
