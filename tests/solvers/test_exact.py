"""`Exact` against enumeration, at all scales, and its bound where it is stopped early."""

import math

import numpy as np
import pytest

from mpsearch.core.solution import Status
from mpsearch.solvers import BruteForce, Exact, exact


def fuzzed(seed):
    """A small table of one of many kinds: ties, masks, opposing and negative use, exact limits, wild scales."""
    g = np.random.default_rng(seed)
    rows, options, resources = int(g.integers(1, 7)), int(g.integers(1, 5)), int(g.integers(0, 4))
    cost = [
        g.random((rows, options)),
        g.integers(0, 4, (rows, options)).astype(float),
        g.normal(size=(rows, options)),
        10.0 ** g.integers(-12, 7, (rows, options)) * g.random((rows, options)),
    ][g.integers(0, 4)] * 10.0 ** g.integers(-12, 13)
    usage = [
        g.integers(0, 20, (resources, rows, options)).astype(float),
        g.integers(0, 10**12, (resources, rows, options)).astype(float),
        g.random((resources, rows, options)),
        g.integers(-5, 6, (resources, rows, options)).astype(float),
    ][g.integers(0, 4)]
    if resources and g.random() < 0.5:
        usage[0] = np.sort(usage[0], axis=1)
    if g.random() < 0.3:
        blocked = g.random((rows, options)) < 0.25
        blocked[np.arange(rows), g.integers(0, options, rows)] = False
        cost[blocked] = np.nan
        usage[:, blocked] = np.nan
    allowed = ~np.isnan(cost)
    pick = np.array([g.choice(np.flatnonzero(allowed[i])) for i in range(rows)])
    limits = np.zeros(resources)
    for r in range(resources):
        low = math.fsum(np.where(allowed, usage[r], np.inf).min(axis=1).tolist())
        high = math.fsum(np.where(allowed, usage[r], -np.inf).max(axis=1).tolist())
        met = math.fsum(usage[r][np.arange(rows), pick].tolist())
        limits[r] = [met, low + g.random() * (high - low), low - (g.random() < 0.3), met + g.integers(0, 3)][
            g.integers(0, 4)
        ]
    for array in (cost, usage, limits):
        array.flags.writeable = False
    return cost, usage, limits


def holds(cost, usage, limits, choice, truth):
    rows = np.arange(len(cost))
    if choice.options is None:
        assert choice.status in (Status.INFEASIBLE, Status.UNSOLVED)
        assert choice.status is Status.UNSOLVED or truth.options is None
        return
    assert not np.isnan(cost[rows, choice.options]).any()
    for use, limit in zip(usage, limits, strict=True):
        assert math.fsum(use[rows, choice.options].tolist()) <= limit
    value, best = (math.fsum(cost[rows, c.options].tolist()) for c in (choice, truth))
    slack = 1e-12 * float(np.nanmax(np.abs(cost)))
    assert choice.bound <= best + slack
    if choice.status is Status.OPTIMAL:
        assert value <= best + slack


@pytest.mark.parametrize("start", range(0, 2000, 250))
def test_two_thousand_tables(start):
    for seed in range(start, start + 250):
        cost, usage, limits = fuzzed(seed)
        choice, truth = Exact().choose(cost, usage, limits), BruteForce().choose(cost, usage, limits)
        holds(cost, usage, limits, choice, truth)
        if (usage[:, ~np.isnan(cost)] == np.floor(usage[:, ~np.isnan(cost)])).all():
            assert choice.status is truth.status, seed  # whole numbers are always decided


@pytest.mark.slow
def test_a_hundred_thousand_tables():
    for seed in range(100_000):
        cost, usage, limits = fuzzed(seed)
        holds(cost, usage, limits, Exact().choose(cost, usage, limits), BruteForce().choose(cost, usage, limits))


@pytest.mark.parametrize("seed", range(200))
def test_stopped_early_it_says_what_it_knows(seed):
    cost, usage, limits = fuzzed(seed)
    truth = BruteForce().choose(cost, usage, limits)
    for solver in (Exact(time_limit_s=0.0), Exact(max_states=1), Exact(max_states=2)):
        choice = solver.choose(cost, usage, limits)
        holds(cost, usage, limits, choice, truth)
        if choice.status is Status.INFEASIBLE:
            assert truth.options is None


@pytest.mark.parametrize("seed", range(150))
def test_blocks_of_a_large_table(monkeypatch, seed):
    """The path of large tables, on small ones: three rows at once, the price guessed from a sample."""
    monkeypatch.setattr(exact, "_ROWS", 3)
    monkeypatch.setattr(exact, "_SAMPLE", 1)
    monkeypatch.setattr(exact, "_WIDEST", 4)
    cost, usage, limits = fuzzed(seed)
    holds(cost, usage, limits, Exact().choose(cost, usage, limits), BruteForce().choose(cost, usage, limits))


def lognormal(rows, options, seed):
    g = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 5, 6, 8, 10, 16])[:options]
    size = np.exp(g.normal(11, 1.5, rows)).astype(np.int64)[:, None] * bits // 8
    cost = np.exp(g.normal(-5, 2, rows))[:, None] * 4.0**-bits * np.exp(g.normal(0, 0.2, (rows, options)))
    return cost, size[None].astype(float), np.array([0.6 * size[:, 0].sum() + 0.4 * size[:, -1].sum()])


@pytest.mark.parametrize(("rows", "options"), [(54, 4), (224, 8), (10_000, 8)])
def test_large_tables_are_proven_from_few_states(rows, options):
    for seed in range(3):
        choice = Exact().choose(*lognormal(rows, options, seed))
        assert choice.status is Status.OPTIMAL
        assert choice.stats["states"] < 5 * rows + 2000  # a table of all used units has millions


def test_a_gap_that_is_near_enough_ends_the_search():
    cost, usage, limits = lognormal(3000, 8, 1)
    rough, proven = Exact(gap=1e-4).choose(cost, usage, limits), Exact().choose(cost, usage, limits)
    values = [math.fsum(cost[np.arange(3000), c.options].tolist()) for c in (rough, proven)]
    assert values[1] <= values[0] <= values[1] * (1 + 1e-4)
    assert rough.bound <= values[1]
    assert rough.stats["states"] <= proven.stats["states"]


def test_several_budgets_at_size():
    cost, usage, limits = lognormal(120, 6, 2)
    g = np.random.default_rng(0)
    usage = np.concatenate([usage, g.integers(1, 1000, (1, 120, 6)).astype(float), g.random((1, 120, 6))])
    low, high = usage.min(axis=2).sum(axis=1), usage.max(axis=2).sum(axis=1)
    limits = low + 0.4 * (high - low)
    choice = Exact().choose(cost, usage, limits)
    value = math.fsum(cost[np.arange(120), choice.options].tolist())
    assert choice.status is Status.OPTIMAL or value - choice.bound <= 1e-6 * value
    for use, limit in zip(usage, limits, strict=True):
        assert math.fsum(use[np.arange(120), choice.options].tolist()) <= limit


def test_limits_that_limit_nothing():
    cost, usage, _ = lognormal(10, 4, 0)
    choice = Exact().choose(cost, np.concatenate([usage, usage]), np.array([np.inf, float(usage[0, :, 0].sum())]))
    assert choice.options.tolist() == [0] * 10
    assert choice.multipliers[0] == 0
    assert Exact().choose(cost, usage, np.array([np.inf])).options.tolist() == cost.argmin(axis=1).tolist()


def test_published_cases(known_optima):
    for name, cost, usage, limits, optimum in known_optima:
        choice = Exact().choose(cost, usage, limits)
        if optimum is None:
            assert choice.status is Status.INFEASIBLE, name
        else:
            assert choice.status is Status.OPTIMAL, name
            value = math.fsum(cost[np.arange(len(cost)), choice.options].tolist())
            assert value == pytest.approx(optimum, rel=1e-12), name
