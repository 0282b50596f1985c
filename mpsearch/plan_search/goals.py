"""What a search is asked for."""

import math
from dataclasses import dataclass

from mpsearch.allocation.solving import solve
from mpsearch.core.budget import Budget
from mpsearch.core.table import CostTable
from mpsearch.core.totals import DERIVED
from mpsearch.errors import BudgetError, nearest


@dataclass(frozen=True)
class Goal:
    """A budget, a tolerated damage, or a whole front.

    Attributes:
        budget: limits of the whole model, or None.
        tolerance: damage that is tolerated while `minimize` is made least, or None.
        minimize: a resource.
        front: measure plans all over the range of `over`.
    """

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
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise BudgetError(f"expected mps.Budget(average_bits=4) or the like, got {self.budget!r}")
        if self.tolerance is not None and not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise BudgetError(f"tolerance {self.tolerance}, expected a finite number of 0 or more")
        if self.tolerance is not None and self.front:
            raise BudgetError("a tolerance and a whole front at once; choose one")
        known = (*base.resources, *DERIVED)
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
