"""How plans are looked for: one strategy a file, one for each kind of goal."""

from collections.abc import Callable, Mapping
from typing import Any

from mpsearch.errors import BudgetError
from mpsearch.plan_search.goals import Goal, LeastResource, WholeFront, WithinBudget
from mpsearch.plan_search.strategies.budget import BudgetStrategy
from mpsearch.plan_search.strategies.front import FrontStrategy
from mpsearch.plan_search.strategies.strategy import Outcome as Outcome
from mpsearch.plan_search.strategies.strategy import Strategy as Strategy
from mpsearch.plan_search.strategies.tolerance import ToleranceStrategy

STRATEGIES: Mapping[type, Callable[[Any], Strategy]] = {
    WithinBudget: BudgetStrategy,
    LeastResource: ToleranceStrategy,
    WholeFront: FrontStrategy,
}


def strategy_of(goal: Goal) -> Strategy:
    """The strategy for a goal.

    Raises:
        BudgetError: for a goal of another kind.
    """
    if type(goal) not in STRATEGIES:
        known = ", ".join(kind.__name__ for kind in STRATEGIES)
        raise BudgetError(f"{goal!r}: no strategy for a goal of this kind; known: {known}")
    return STRATEGIES[type(goal)](goal)
