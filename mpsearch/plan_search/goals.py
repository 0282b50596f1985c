"""What a search is asked for: the least damage within a budget, the least use of a resource, or a whole front."""

import math
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mpsearch.allocation.solving import solve
from mpsearch.core.budget import Budget
from mpsearch.core.settings import checked_number
from mpsearch.core.table import CostTable
from mpsearch.core.totals import DERIVED
from mpsearch.errors import BudgetError, nearest


@runtime_checkable
class Goal(Protocol):
    """What a search is asked for; how plans are looked for under it says `mpsearch.plan_search.strategies`."""

    @property
    def budget(self) -> Budget | None:
        """Limits of the whole model, or None."""
        ...

    @property
    def resource(self) -> str:
        """The resource that measured plans are drawn over."""
        ...

    @property
    def saved(self) -> tuple[str, ...]:
        """Resources of which less is better, whatever the limits."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What is written down of the goal with the result: `budget`, `tolerance`, `minimize`."""
        ...

    def check(self, base: CostTable) -> None:
        """Refuse a goal that cannot be met before any pass.

        Args:
            base: which options are allowed, and what they use.

        Raises:
            BudgetError: for unknown resources.
            InfeasibleError: with the numbers.
        """
        ...


@dataclass(frozen=True)
class WithinBudget:
    """The plan with the least damage within a budget.

    Attributes:
        budget: limits of the whole model.

    >>> WithinBudget(Budget(average_bits=4)).resource
    'average_bits'
    """

    budget: Budget

    def __post_init__(self) -> None:
        _check_budget(self.budget)
        if not self.budget:
            raise BudgetError("the budget has no limit: give one, such as mps.Budget(average_bits=4)")

    @property
    def resource(self) -> str:
        """The first one that is limited."""
        return next(iter(self.budget))

    @property
    def saved(self) -> tuple[str, ...]:
        """See `Goal.saved`."""
        return ()

    @property
    def settings(self) -> dict[str, Any]:
        """See `Goal.settings`."""
        return {"budget": dict(self.budget), "tolerance": None, "minimize": None}

    def check(self, base: CostTable) -> None:
        """See `Goal.check`."""
        _check_resource(base, self.resource)
        solve(base, self.budget)


@dataclass(frozen=True)
class LeastResource:
    """The plan that uses least of a resource, with a damage of at most a tolerance.

    Attributes:
        resource: such as `memory_bytes`.
        tolerance: in the unit of what is measured (nats for the KL).
        budget: limits on other resources, or None.

    >>> LeastResource("memory_bytes", tolerance=0.02).saved
    ('memory_bytes',)
    """

    resource: str
    tolerance: float = field(kw_only=True)
    budget: Budget | None = None

    def __post_init__(self) -> None:
        tolerance = checked_number(self.tolerance, "tolerance", float, 0.0, BudgetError)
        object.__setattr__(self, "tolerance", tolerance)  # a number of numpy is none of JSON
        if not math.isfinite(tolerance):
            raise BudgetError(f"tolerance {tolerance}, expected a finite number of 0 or more")
        _check_budget(self.budget)
        if self.resource in (self.budget or {}):
            raise BudgetError(f"{self.resource} is both minimized and limited; choose one")

    @property
    def saved(self) -> tuple[str, ...]:
        """See `Goal.saved`."""
        return (self.resource,)

    @property
    def settings(self) -> dict[str, Any]:
        """See `Goal.settings`."""
        return {"budget": dict(self.budget or {}), "tolerance": self.tolerance, "minimize": self.resource}

    def check(self, base: CostTable) -> None:
        """See `Goal.check`."""
        _check_resource(base, self.resource)
        if self.budget is not None:
            solve(base, self.budget)


@dataclass(frozen=True)
class WholeFront:
    """Plans of little damage all over the range of a resource; the one that is chosen is within the budget, or at the middle.

    Attributes:
        over: the resource; None for the first one that is limited, or `memory_bytes`.
        budget: limits of the chosen plan, or None.

    >>> WholeFront().resource, WholeFront(budget=Budget(bitops="50%")).resource
    ('memory_bytes', 'bitops')
    """

    over: str | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        _check_budget(self.budget)

    @property
    def resource(self) -> str:
        """See `over`."""
        return next(iter(self.budget or ()), "memory_bytes") if self.over is None else self.over

    @property
    def saved(self) -> tuple[str, ...]:
        """See `Goal.saved`."""
        return (self.resource,)

    @property
    def settings(self) -> dict[str, Any]:
        """See `Goal.settings`."""
        return {"budget": dict(self.budget or {}), "tolerance": None, "minimize": None}

    def check(self, base: CostTable) -> None:
        """See `Goal.check`."""
        _check_resource(base, self.resource)
        if self.budget is not None:
            solve(base, self.budget)


def goal_of(
    budget: Budget | Goal | None, *, tolerance: float | None = None, minimize: str = "memory_bytes", front: bool = False
) -> Goal:
    """The goal that the arguments of `search` ask for.

    Args:
        budget: a goal, or the limits of one.
        tolerance: asks for `LeastResource`.
        minimize: its resource, or that of a front without a budget.
        front: asks for `WholeFront`.

    Raises:
        BudgetError: for none, or two at once.

    >>> goal_of(None, tolerance=0.1)
    LeastResource(resource='memory_bytes', tolerance=0.1, budget=None)
    >>> goal_of(None)
    Traceback (most recent call last):
    mpsearch.errors.BudgetError: nothing is asked for: give a budget, a tolerance, or front=True
    """
    if isinstance(budget, Goal):
        if tolerance is not None or front:
            raise BudgetError(f"{budget!r} and {'front' if front else 'tolerance'}= at once; choose one")
        return budget
    _check_budget(budget)
    if tolerance is not None and front:
        raise BudgetError("a tolerance and a whole front at once; choose one")
    if tolerance is not None:
        return LeastResource(minimize, tolerance=tolerance, budget=budget)
    if front:
        return WholeFront(None if budget else minimize, budget)
    if budget is None:
        raise BudgetError("nothing is asked for: give a budget, a tolerance, or front=True")
    return WithinBudget(budget)


def _check_budget(budget: Budget | None) -> None:
    if budget is not None and not isinstance(budget, Budget):
        raise BudgetError(f"expected mps.Budget(average_bits=4) or the like, got {budget!r}")


def _check_resource(base: CostTable, name: str) -> None:
    known = (*base.resources, *DERIVED)
    if name not in known:
        raise BudgetError(f"unknown resource {name!r}{nearest(name, known)}")
