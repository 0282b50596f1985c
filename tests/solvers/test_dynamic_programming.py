"""DynamicProgramming: against the recursion over used units, and its exact arithmetic."""

import math

import numpy as np
import pytest

from mpsearch.core.solution import Status
from mpsearch.solvers import DynamicProgramming


def value(sensitivity, options):
    return math.fsum(sensitivity[np.arange(len(options)), options])


def test_known_optima(known_optima):
    for name, sensitivity, usage, limits, optimum in known_optima:
        choice = DynamicProgramming().choose(sensitivity, usage, limits)
        if optimum is None:
            assert choice.status is Status.INFEASIBLE, name
        else:
            assert choice.status is Status.OPTIMAL, name
            assert value(sensitivity, choice.options) == pytest.approx(optimum, rel=1e-10, abs=0), name


def test_recursion_over_used_units(ordinary, optimum_by_table):
    for seed in range(10):
        sensitivity, usage, limits = ordinary(15, 4, seed=seed)
        choice = DynamicProgramming().choose(sensitivity, usage, limits)
        expected = optimum_by_table(sensitivity, usage[0], limits[0])
        assert choice.status is Status.OPTIMAL
        assert value(sensitivity, choice.options) == pytest.approx(expected, rel=1e-13)


def test_few_states_leave_a_bound(ordinary, optimum_by_table):
    open_gaps = 0
    for seed in range(10):
        sensitivity, usage, limits = ordinary(30, 4, seed=seed)
        optimum = optimum_by_table(sensitivity, usage[0], limits[0])
        choice = DynamicProgramming(max_states=3).choose(sensitivity, usage, limits)
        found = value(sensitivity, choice.options)
        assert usage[0, np.arange(30), choice.options].sum() <= limits[0]
        assert choice.bound <= optimum * (1 + 1e-12)
        assert found <= 1.5 * optimum
        assert choice.status is Status.FEASIBLE or found == pytest.approx(optimum, rel=1e-12)
        assert choice.stats["states"] <= 3
        open_gaps += choice.status is Status.FEASIBLE
    assert open_gaps > 0


def test_seconds_are_added_exactly(enumerated):
    """Limits that some plan meets exactly: a running float sum is off by an ulp in about every other one."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sensitivity, usage = rng.random((6, 3)), rng.random((1, 6, 3)) * 10.0 ** rng.integers(-9, 3)
        plan = rng.integers(0, 3, 6)
        limits = np.array([math.fsum(usage[0, np.arange(6), plan])])
        choice = DynamicProgramming().choose(sensitivity, usage, limits)
        best, options = enumerated(sensitivity, usage, limits)[0]
        assert tuple(choice.options) == options
        assert choice.bound == best


def test_limit_is_met_after_rounding_half_to_even():
    """1 + 2^-53 rounds to 1, and keeps a limit of 1; (1 + 2^-52) + 2^-53 rounds up, and breaks one of 1 + 2^-52."""
    sensitivity = np.array([[1.0, 0.0], [1.0, 0.0]])
    for big, fits in ((1.0, True), (1.0 + 2.0**-52, False)):
        usage = np.array([[[0.0, big], [0.0, 2.0**-53]]])
        choice = DynamicProgramming().choose(sensitivity, usage, np.array([big]))
        assert (choice.options.tolist() == [1, 1]) == fits
        assert fits == (math.fsum([big, 2.0**-53]) <= big)


def test_sizes_beyond_64_bits(enumerated):
    """From 1e-12 to 1e12 in one table: whole multiples of one unit need Python's integers."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        sensitivity = rng.random((5, 3))
        usage = rng.random((1, 5, 3)) * 10.0 ** rng.integers(-12, 13, (1, 5, 1))
        plan = rng.integers(0, 3, 5)
        limits = np.array([math.fsum(usage[0, np.arange(5), plan])])
        choice = DynamicProgramming().choose(sensitivity, usage, limits)
        assert tuple(choice.options) == enumerated(sensitivity, usage, limits)[0][1]


def test_several_budgets(enumerated):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        sensitivity, usage = rng.random((6, 3)), rng.integers(1, 9, (3, 6, 3)).astype(float)
        limits = np.floor(usage.mean(axis=2).sum(axis=1) * 0.9)
        choice = DynamicProgramming().choose(sensitivity, usage, limits)
        plans = enumerated(sensitivity, usage, limits)
        assert (choice.options is None) == (not plans)
        if plans:
            assert tuple(choice.options) == plans[0][1]
