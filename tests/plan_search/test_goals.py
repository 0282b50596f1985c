"""Goals, as objects and from the keywords of `search`."""

import dataclasses

import numpy as np
import pytest

import mpsearch as mps
from mpsearch.plan_search.goals import Goal, goal_of
from mpsearch.plan_search.strategies import STRATEGIES, Strategy, strategy_of

BITS = mps.Budget(average_bits=3)
MEMORY = mps.Budget(memory_bytes="50%")


@pytest.mark.parametrize(
    ("arguments", "goal", "resource"),
    [
        ({"budget": BITS}, mps.WithinBudget(BITS), "average_bits"),
        ({"budget": BITS, "minimize": "bitops"}, mps.WithinBudget(BITS), "average_bits"),
        ({"budget": None, "tolerance": 0.1}, mps.LeastResource("memory_bytes", tolerance=0.1), "memory_bytes"),
        (
            {"budget": BITS, "tolerance": 0.1, "minimize": "bitops"},
            mps.LeastResource("bitops", tolerance=0.1, budget=BITS),
            "bitops",
        ),
        ({"budget": None, "front": True}, mps.WholeFront("memory_bytes"), "memory_bytes"),
        ({"budget": None, "front": True, "minimize": "bitops"}, mps.WholeFront("bitops"), "bitops"),
        ({"budget": BITS, "front": True, "minimize": "bitops"}, mps.WholeFront(budget=BITS), "average_bits"),
    ],
)
def test_keywords_build_the_goal(arguments, goal, resource):
    assert goal_of(**arguments) == goal
    assert goal.resource == resource
    assert goal_of(goal) is goal


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: goal_of(None), "nothing is asked for"),
        (lambda: goal_of(BITS, tolerance=0.1, front=True), "a tolerance and a whole front at once"),
        (lambda: goal_of(mps.WithinBudget(BITS), tolerance=0.1), "and tolerance= at once; choose one"),
        (lambda: goal_of(mps.WholeFront(), front=True), "and front= at once; choose one"),
        (lambda: mps.WithinBudget(4), r"expected mps.Budget\(average_bits=4\) or the like, got 4"),
        (lambda: mps.WithinBudget(mps.Budget()), "the budget has no limit"),
        (lambda: mps.LeastResource("memory_bytes", tolerance=0.1, budget=MEMORY), "both minimized and limited"),
        (lambda: mps.LeastResource("memory_bytes", tolerance=-1.0), "tolerance=-1.0"),
        (lambda: mps.LeastResource("memory_bytes", tolerance=np.inf), "expected a finite number"),
        (lambda: mps.WholeFront(budget={"average_bits": 3}), "expected mps.Budget"),
    ],
)
def test_goals_that_are_none_are_refused_in_one_line(build, words):
    with pytest.raises(mps.BudgetError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_a_number_of_numpy_is_a_plain_one_in_the_goal():
    tolerance = mps.LeastResource("memory_bytes", tolerance=np.float32(0.5)).tolerance
    assert (type(tolerance), tolerance) == (float, 0.5)


def test_each_kind_of_goal_has_its_strategy_and_another_is_told_what_there_is():
    for kind in (mps.WithinBudget(BITS), mps.LeastResource("memory_bytes", tolerance=0.1), mps.WholeFront()):
        strategy: Strategy = strategy_of(kind)
        assert strategy == STRATEGIES[type(kind)](kind)

    @dataclasses.dataclass(frozen=True)
    class Other(mps.WholeFront):
        """A goal of another kind."""

    assert isinstance(Other(), Goal)
    with pytest.raises(
        mps.BudgetError, match="no strategy for a goal of this kind; known: WithinBudget, LeastResource, WholeFront"
    ):
        strategy_of(Other())
