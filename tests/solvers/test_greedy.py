"""Greedy: its guarantee, opposing resources, what it may and may not prove."""

import math

import numpy as np
import pytest

from mpsearch.core.solution import Status
from mpsearch.solvers import Greedy


def value(sensitivity, options):
    return math.fsum(sensitivity[np.arange(len(options)), options])


def test_within_one_row_of_the_optimum(ordinary, optimum_by_table):
    """One budget: the convex hulls leave one row undecided, so no more than one row's range is lost."""
    for seed in range(5):
        sensitivity, usage, limits = ordinary(20, 4, seed=seed)
        choice = Greedy().choose(sensitivity, usage, limits)
        optimum = optimum_by_table(sensitivity, usage[0], limits[0])
        assert choice.bound <= optimum <= value(sensitivity, choice.options) * (1 + 1e-12)
        assert value(sensitivity, choice.options) <= choice.bound + np.ptp(sensitivity, axis=1).max()
        assert value(sensitivity, choice.options) <= 1.1 * optimum


@pytest.mark.parametrize("seed", range(20))
def test_opposing_resources_do_not_cycle(seed):
    """Bytes rise with bits, latency falls: the classical greedy steps back and forth for ever."""
    rng = np.random.default_rng(seed)
    sensitivity = np.sort(rng.lognormal(0, 1, (30, 4)), axis=1)[:, ::-1].copy()
    rising = rng.integers(1, 99, (30, 1)) * np.arange(1.0, 5.0)
    falling = rng.integers(1, 99, (30, 1)) * np.arange(4.0, 0.0, -1.0)
    usage = np.stack([rising, falling])
    plan = rng.integers(0, 4, 30)
    limits = usage[:, np.arange(30), plan].sum(axis=1)  # met exactly by some plan
    choice = Greedy().choose(sensitivity, usage, limits)
    assert choice.status is not Status.INFEASIBLE
    assert choice.stats["steps"] < 2000
    if choice.options is not None:
        assert (usage[:, np.arange(30), choice.options].sum(axis=1) <= limits).all()
        assert choice.bound <= value(sensitivity, choice.options)


def test_opposing_resources_are_usually_solved():
    solved = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sensitivity = rng.random((10, 4))
        usage = rng.integers(1, 9, (2, 10, 4)).astype(float)
        limits = usage.mean(axis=2).sum(axis=1)
        solved += Greedy().choose(sensitivity, usage, limits).options is not None
    assert solved == 20


def test_proofs(ordinary):
    sensitivity, usage, _ = ordinary(10, 4)
    roomy = Greedy().choose(sensitivity, usage, usage.max(axis=2).sum(axis=1))
    assert roomy.status is Status.OPTIMAL
    assert roomy.bound == value(sensitivity, roomy.options)
    assert Greedy().choose(sensitivity, usage, usage.min(axis=2).sum(axis=1) - 1).status is Status.INFEASIBLE
    tight = Greedy().choose(sensitivity, usage, usage.min(axis=2).sum(axis=1))
    assert tight.status is Status.OPTIMAL  # one plan is left


def test_infeasible_together_is_proven_by_prices():
    """Each limit can be met alone: 3 rows use 9 units of both together, of which 8 are allowed."""
    usage = np.array([[[1.0, 2.0]] * 3, [[2.0, 1.0]] * 3])
    choice = Greedy().choose(np.zeros((3, 2)), usage, np.array([4.0, 4.0]))
    assert choice.options is None
    assert choice.status in (Status.INFEASIBLE, Status.UNSOLVED)


def test_gap_closes_with_size(ordinary):
    sensitivity, usage, limits = ordinary(5000, 4)
    choice = Greedy().choose(sensitivity, usage, limits)
    found = value(sensitivity, choice.options)
    assert 0 <= found - choice.bound <= 1e-5 * found
