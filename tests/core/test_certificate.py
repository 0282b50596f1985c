"""The independent checker confirms what holds and catches what does not."""

import dataclasses

import numpy as np
import pytest

import mpsearch as mps
from mpsearch.core.certificate import check_solution


def table(seed, rows=12, options=4):
    generator = np.random.default_rng(seed)
    layers = tuple(mps.Layer(f"l{i}", weight_shape=(int(generator.integers(5, 50)),)) for i in range(rows))
    sensitivity = generator.random((rows, options)) * 4.0 ** -np.arange(options)
    usage = {
        "memory_bytes": generator.integers(10, 99, (rows, options)).cumsum(axis=1),
        "latency_s": generator.random((rows, options)),
    }
    return mps.CostTable(layers, mps.precisions("w2 w4 w8 w16"), sensitivity, usage=usage)


def budgets(cost):
    low = {name: float(use.min(axis=1).sum()) for name, use in cost.usage.items()}
    high = {name: float(use.max(axis=1).sum()) for name, use in cost.usage.items()}
    one = mps.Budget(memory_bytes=0.6 * low["memory_bytes"] + 0.4 * high["memory_bytes"])
    return one, mps.Budget(**one, latency_s=0.5 * low["latency_s"] + 0.5 * high["latency_s"])


@pytest.mark.parametrize("seed", range(15))
def test_every_answer_of_the_exact_solver_is_confirmed(seed):
    cost = table(seed)
    for budget in budgets(cost):
        solution = mps.solve(cost, budget)
        assert solution.status is mps.Status.OPTIMAL
        assert check_solution(cost, budget, solution)
    cheapest = mps.solve(cost, mps.Budget(sensitivity=1.5), minimize="memory_bytes")
    assert check_solution(cost, mps.Budget(sensitivity=1.5), cheapest, minimize="memory_bytes")


@pytest.mark.parametrize("seed", range(15))
def test_a_plan_that_is_not_the_best_is_not_confirmed(seed):
    cost = table(seed)
    for budget in budgets(cost):
        best, second = mps.solve(cost, budget, top=2)
        claimed = dataclasses.replace(second, status=mps.Status.OPTIMAL, multipliers=best.multipliers)
        with pytest.raises(AssertionError, match="below the bound"):
            check_solution(cost, budget, claimed)
        honest = dataclasses.replace(
            second, status=mps.Status.FEASIBLE, bound=best.sensitivity, multipliers=best.multipliers
        )
        assert check_solution(cost, budget, honest)


def test_other_lies():
    cost = table(0)
    budget = budgets(cost)[0]
    best = mps.solve(cost, budget)
    for lie, words in (
        ({"sensitivity": best.sensitivity * 0.9}, "recomputed"),
        ({"multipliers": {"memory_bytes": -1.0}}, "negative"),
        ({"status": mps.Status.FEASIBLE, "bound": best.sensitivity * 2}, "above the plan's"),
        ({"plan": mps.Plan(dict.fromkeys(best.plan, mps.Precision("16")))}, "breaks a limit"),
        ({"plan": None}, "no plan"),
    ):
        with pytest.raises(AssertionError, match=words):
            check_solution(cost, budget, dataclasses.replace(best, **lie))


def test_too_many_partial_plans_leave_the_lagrangian_bound():
    cost = table(1)
    budget = budgets(cost)[0]
    assert not check_solution(
        cost, budget, dataclasses.replace(mps.solve(cost, budget), multipliers={"memory_bytes": 0.0}), max_states=10
    )
