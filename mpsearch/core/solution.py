"""What a solver returns (`Choice`), what `solve` makes of it (`Solution`), and what a solver is (`Solver`)."""

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mpsearch.core import shown
from mpsearch.core.plan import Plan

if TYPE_CHECKING:
    from mpsearch.core.table import Interactions


class Status(enum.Enum):
    """How a solve ended. `INFEASIBLE` and `UNSOLVED` are never merged.

    Attributes:
        OPTIMAL: proven, gap 0.
        FEASIBLE: the plan keeps the limits; how far it may be from the best is its gap, nan where no bound is known.
        INFEASIBLE: proven that no plan keeps the limits.
        UNSOLVED: the solver gave up without a plan, which proves nothing.
    """

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNSOLVED = "unsolved"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Choice:
    """What `Solver.choose` returns, in rows and columns instead of names.

    Attributes:
        options: (L,) int64, the column chosen in each row, or None without a plan.
        status: how the solve ended.
        bound: proven lower bound on the objective of any choice within the limits; `-inf` where none is known.
        multipliers: (R,) Lagrange multipliers >= 0 from which a third party can recompute a bound:
            `sum_l min_p (sensitivity[l, p] + multipliers @ usage[:, l, p]) - multipliers @ limits`;
            None where the method has none.
        stats: counts and times worth reporting, JSON values only.
    """

    options: NDArray[np.int64] | None
    status: Status
    bound: float = -math.inf
    multipliers: NDArray[np.float64] | None = None
    stats: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SolverCapabilities:
    """What a solver can do beyond its plain contract, declared as its attribute `capabilities`.

    Attributes:
        exact: proves its answers, the optimum or that no plan keeps the limits, as far as its settings of time and size let it.
        interactions: `choose` takes the keyword `interactions` and adds them to what is minimized (`InteractionSolver`).
        lower_limits: takes a lower limit, which reaches a solver as an upper one on a negative use.
    """

    exact: bool = False
    interactions: bool = False
    lower_limits: bool = True


@runtime_checkable
class Solver(Protocol):
    """Chooses one option in each row. Frozen settings; all work happens in `choose`.

    A solver that can do more than that declares it (`DeclaredSolver`); without a word it is not exact, and takes no interactions.
    """

    def choose(
        self, sensitivity: NDArray[np.float64], usage: NDArray[np.float64], limits: NDArray[np.float64]
    ) -> Choice:
        """Choose one column in each row so that the sum of `sensitivity` is least within the limits.

        The door has checked and merged everything: `nan` in `sensitivity` means "option not allowed", every row
        has at least one allowed option, there are no other non-finite numbers where an option is allowed, and
        ties are one row already.

        Args:
            sensitivity: (L, P) float64, may be negative, any scale; read-only.
            usage: (R, L, P) float64, R >= 0 resources; may be negative, may oppose each other; read-only.
            limits: (R,) float64; a choice is feasible when `math.fsum(usage[r, l, options[l]] over l) <= limits[r]`
                for every r.

        Returns:
            The column of each row, or None; how the solve ended, and what is proven.
        """
        ...


@runtime_checkable
class DeclaredSolver(Solver, Protocol):
    """A solver that says what it can do: `capabilities = SolverCapabilities(exact=True)`, on the class or as a property."""

    @property
    def capabilities(self) -> SolverCapabilities:
        """What it can do beyond the plain contract."""
        ...


class InteractionSolver(DeclaredSolver, Protocol):
    """A solver that declares `interactions`."""

    def choose(
        self,
        sensitivity: NDArray[np.float64],
        usage: NDArray[np.float64],
        limits: NDArray[np.float64],
        interactions: "Interactions | None" = None,
    ) -> Choice:
        """See `Solver.choose`; the values of `interactions` are added to the objective."""
        ...


def capabilities_of(solver: Solver) -> SolverCapabilities:
    """What a solver declares; nothing, where it says nothing. The one place that adapts to solvers that only have `choose`.

    >>> class Plain:
    ...     def choose(self, sensitivity, usage, limits): ...
    >>> capabilities_of(Plain())
    SolverCapabilities(exact=False, interactions=False, lower_limits=True)
    """
    return solver.capabilities if isinstance(solver, DeclaredSolver) else SolverCapabilities()


def takes_interactions(solver: Solver) -> TypeGuard[InteractionSolver]:
    """True where a solver declares that it takes interactions."""
    return capabilities_of(solver).interactions


@dataclass(frozen=True)
class Solution:
    """Outcome of a solve, in names, recomputed from the table by the door.

    Attributes:
        plan: the plan, or None.
        status: how the solve ended; `OPTIMAL` means proven.
        sensitivity: predicted damage of the plan, in the table's unit; nan without a plan.
        bound: no plan within the budget has less of what was minimized than this; -inf where unknown.
        gap: (value - bound) / |value| of what was minimized: 0 where proven optimal, nan where no bound is known.
        usage: use of every resource of the table by the plan, fixed part included.
        minimized: `sensitivity`, or the resource whose use was to be least.
        multipliers: price of one unit of each limited resource (the certificate of `bound`), or None.
        stats: what the solver reports of its work, and `seconds`.
    """

    plan: Plan | None
    status: Status
    sensitivity: float
    bound: float
    gap: float
    usage: Mapping[str, float]
    minimized: str = "sensitivity"
    multipliers: Mapping[str, float] | None = None
    stats: Mapping[str, Any] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        return shown.html().solution(self)


def relative_gap(value: float, bound: float) -> float:
    """Relative distance of `value` from its lower bound; nan where there is no bound.

    >>> relative_gap(2.0, 1.5), relative_gap(0.0, 0.0)
    (0.25, 0.0)
    """
    if not math.isfinite(bound) or not math.isfinite(value):
        return math.nan
    if value <= bound:
        return 0.0
    return (value - bound) / max(abs(value), abs(bound))
