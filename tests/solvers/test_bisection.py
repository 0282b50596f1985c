"""Bisection: on a table against a scan of the whole list, and with measurements that are not monotone."""

import math

import numpy as np
import pytest

from mpsearch.core.solution import Status
from mpsearch.errors import SolverError
from mpsearch.solvers import Bisection


def value(sensitivity, options):
    return math.fsum(sensitivity[np.arange(len(options)), options])


def steps_down(sensitivity):
    """All plans from the best one down, one (layer, option) after another in the order of the layer's damage."""
    options = np.full(len(sensitivity), sensitivity.shape[1] - 1)  # more bits are better in these tables
    plans = [options.copy()]
    cells = [(row[p] - row[-1], index, p) for index, row in enumerate(sensitivity) for p in range(len(row) - 1)]
    for _, row, option in sorted(cells):
        options[row] = option
        plans.append(options.copy())
    return plans


def test_first_plan_that_fits(ordinary):
    for seed in range(10):
        sensitivity, usage, limits = ordinary(20, 4, seed=seed, fraction=0.6)
        fitting = [p for p in steps_down(sensitivity) if usage[0, np.arange(20), p].sum() <= limits[0]]
        choice = Bisection().choose(sensitivity, usage, limits)
        assert value(sensitivity, choice.options) == min(value(sensitivity, p) for p in fitting)
        assert choice.stats["plans"] < 20 < choice.stats["steps"] == 60
        assert choice.bound <= value(sensitivity, choice.options)


def test_cheapest_plan_within_the_tolerance(ordinary):
    sensitivity, usage, _ = ordinary(40, 4)
    plans = steps_down(sensitivity)
    calls = []

    def measure(options):
        calls.append(options)
        return value(sensitivity, options)

    for target in (0, 1, 17, 60, 119, 120):
        calls.clear()
        tolerance = value(sensitivity, plans[target])
        choice = Bisection(measure, tolerance).choose(sensitivity, usage, usage.max(axis=2).sum(axis=1))
        assert choice.options.tolist() == plans[target].tolist()
        assert choice.stats["measured"] == tolerance
        assert len(calls) <= math.ceil(math.log2(120)) + 2 + 2 * 4


def test_best_plan_seen_where_damage_is_not_monotone(ordinary):
    """Measured damage with dips and bumps: the plan returned was measured, is good, and none seen was cheaper."""
    sensitivity, usage, _ = ordinary(40, 4)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        noise = {}
        seen = []

        def measure(options, rng=rng, noise=noise, seen=seen):
            damage = value(sensitivity, options) * noise.setdefault(options.tobytes(), rng.lognormal(0, 0.3))
            seen.append((damage, usage[0, np.arange(40), options].sum()))
            return damage

        tolerance = 0.3 * value(sensitivity, np.zeros(40, int))
        choice = Bisection(measure, tolerance).choose(sensitivity, usage, usage.max(axis=2).sum(axis=1))
        used = usage[0, np.arange(40), choice.options].sum()
        assert choice.stats["measured"] <= tolerance
        assert used == min(use for damage, use in seen if damage <= tolerance)


def test_limits_hold_beside_the_tolerance(ordinary):
    sensitivity, usage, limits = ordinary(20, 4)
    choice = Bisection(lambda x: value(sensitivity, x), 1e9).choose(sensitivity, usage, limits)
    assert usage[0, np.arange(20), choice.options].sum() <= limits[0]
    never = Bisection(lambda x: 5.0, 4.0).choose(sensitivity, usage, limits)
    assert never.status is Status.UNSOLVED
    assert never.stats["reason"] == "least measured damage 5, expected at most 4 within the limits"


def test_objective_and_tolerance_go_together():
    with pytest.raises(SolverError, match="objective and tolerance together"):
        Bisection(tolerance=0.1)
