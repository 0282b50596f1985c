"""The Lagrangian bound against scipy's linear program, and `reachable` against enumeration."""

import math

import numpy as np
import pytest
from scipy.optimize import linprog

from mpsearch.solvers import ILP, Annealing, Bisection, BruteForce, DynamicProgramming, Greedy
from mpsearch.solvers.feasibility import reachable
from mpsearch.solvers.lagrangian import bound_at, dual
from mpsearch.testing.solvers import _tables


def linear_program(sensitivity, usage, limits):
    rows, columns = sensitivity.shape
    one_a_row = np.kron(np.eye(rows), np.ones(columns))
    result = linprog(
        sensitivity.ravel(), usage.reshape(len(usage), -1), limits, one_a_row, np.ones(rows), bounds=(0, None)
    )
    return result.fun


@pytest.mark.parametrize("resources", [1, 2, 3])
def test_bound_of_the_linear_program(resources, ordinary):
    for seed in range(8):
        sensitivity, usage, limits = ordinary(20, 4, resources, seed=seed)
        sensitivity *= 1e4  # linprog works to absolute tolerances, too
        found = dual(sensitivity, usage, limits, np.full(sensitivity.shape, True))
        best = linear_program(sensitivity, usage, limits)
        assert found.bound <= best * (1 + 1e-9)
        assert found.bound >= best * (1 - (1e-9 if resources == 1 else 0.1))
        assert found.bound == bound_at(sensitivity, usage, limits, np.full(sensitivity.shape, True), found.multipliers)
        assert (found.multipliers >= 0).all()


def test_what_is_dropped_was_in_no_plan(enumerated):
    dropped = 0
    for table in _tables(300, np.random.default_rng(5)):
        kept = reachable(table.sensitivity, table.usage, table.limits)
        plans = enumerated(table.sensitivity, table.usage, table.limits)
        for _, options in plans:
            assert kept[np.arange(len(options)), options].all(), table
        dropped += int((~kept & ~np.isnan(table.sensitivity)).sum())
        if plans:
            relaxed = dual(table.sensitivity, table.usage, table.limits, kept)
            assert relaxed.bound <= plans[0][0] + 1e-12 * math.fsum(abs(table.sensitivity[kept]))
    assert dropped > 0


@pytest.mark.parametrize(
    "solver", [ILP(), Greedy(), DynamicProgramming(), Annealing(sweeps=5), Bisection(), BruteForce()], ids=repr
)
def test_infinite_limit_is_none(solver, ordinary):
    sensitivity, usage, limits = ordinary(6, 3, resources=2)
    with_infinite = solver.choose(sensitivity, usage, np.array([limits[0], math.inf]))
    without = solver.choose(sensitivity, usage[:1], limits[:1])
    assert with_infinite.options.tolist() == without.options.tolist()
    assert with_infinite.bound == pytest.approx(without.bound)
