"""Fronts against enumeration."""

import itertools
import math

import numpy as np
import pytest

from mpsearch.errors import SolverError
from mpsearch.solvers import frontier
from mpsearch.solvers.hull import hull_steps


def random_table(seed):
    g = np.random.default_rng(seed)
    rows, options = int(g.integers(1, 7)), int(g.integers(1, 5))
    cost = [g.random((rows, options)), g.integers(0, 4, (rows, options)).astype(float), g.normal(size=(rows, options))][
        seed % 3
    ]
    usage = [
        g.integers(0, 9, (rows, options)).astype(float),
        g.random((rows, options)),
        g.integers(-3, 4, (rows, options)).astype(float),
    ][seed % 2]
    if g.random() < 0.3:
        blocked = g.random((rows, options)) < 0.3
        blocked[np.arange(rows), g.integers(0, options, rows)] = False
        cost[blocked] = np.nan
        usage[blocked] = np.nan
    return cost, usage


def staircase(cost, usage):
    """(use, damage) of all plans that no other beats, from all plans."""
    points = []
    for options in itertools.product(*(np.flatnonzero(~np.isnan(row)) for row in cost)):
        at = np.arange(len(cost)), list(options)
        points.append((math.fsum(usage[at].tolist()), math.fsum(cost[at].tolist())))
    kept = []
    for use, damage in sorted(points):
        if not kept or damage < kept[-1][1] - 1e-12:
            kept.append((use, damage))
    return kept


@pytest.mark.parametrize("seed", range(60))
def test_the_exact_front_is_complete(seed):
    cost, usage = random_table(seed)
    front = frontier.exact_front(cost, usage)
    truth = staircase(cost, usage)
    merged = staircase_of(front)
    assert [u for u, _ in merged] == pytest.approx([u for u, _ in truth], abs=1e-9)
    assert [s for _, s in merged] == pytest.approx([s for _, s in truth], abs=1e-9)
    recomputed(front, cost, usage)


def staircase_of(front):
    kept = []
    for use, damage in zip(front.usage.tolist(), front.sensitivity.tolist(), strict=True):
        if not kept or damage < kept[-1][1] - 1e-12:
            kept.append((use, damage))
    return kept


def recomputed(front, cost, usage):
    rows = np.arange(len(cost))
    for i in range(len(front.usage)):
        options = front.options(i)
        assert usage[rows, options].sum() == pytest.approx(front.usage[i], abs=1e-9)
        assert cost[rows, options].sum() == pytest.approx(front.sensitivity[i], abs=1e-9)


@pytest.mark.parametrize("epsilon", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("seed", range(20))
def test_an_epsilon_front_covers_the_exact_one(seed, epsilon):
    cost, usage = random_table(seed)
    front, full = frontier.epsilon_front(cost, usage, epsilon), frontier.exact_front(cost, usage)
    recomputed(front, cost, usage)
    assert len(front.usage) <= len(full.usage)
    base = np.nanmin(cost, axis=1).sum()
    for use, damage in zip(full.usage, full.sensitivity, strict=True):
        best = front.sensitivity[front.usage <= use + 1e-9].min() - base
        assert best <= (1 + epsilon) * (damage - base) + 1e-9
    for use, damage, gap in zip(front.usage, front.sensitivity, front.gap, strict=True):
        assert damage - gap * abs(damage) <= full.sensitivity[full.usage <= use + 1e-9].min() + 1e-9


def test_thinning_thins():
    g = np.random.default_rng(0)
    cost, usage = 4.0 ** -np.arange(4) * g.random((40, 1)), np.exp(g.normal(size=(40, 1))) * np.arange(1, 5)
    sizes = [len(frontier.epsilon_front(cost, usage, e).usage) for e in (1e-1, 1e-2, 1e-3)]
    assert sizes[0] < sizes[1] < sizes[2] < len(frontier.exact_front(cost, usage).usage)
    with pytest.raises(SolverError, match="more than 0"):
        frontier.epsilon_front(cost, usage, 0.0)


@pytest.mark.parametrize("seed", range(60))
def test_hull_points_are_the_best_of_their_size(seed):
    cost, usage = random_table(seed)
    front, truth = frontier.hull_front(cost, usage), staircase(cost, usage)
    recomputed(front, cost, usage)
    assert (np.diff(front.usage) > 0).all()
    for use, damage in zip(front.usage, front.sensitivity, strict=True):
        assert damage == pytest.approx(min(s for u, s in truth if u <= use + 1e-9), abs=1e-9)
    assert front.usage[0] == pytest.approx(truth[0][0], abs=1e-9)
    assert front.sensitivity[-1] == pytest.approx(truth[-1][1], abs=1e-9)


@pytest.mark.parametrize("seed", range(60))
def test_hull_steps_are_the_lower_hull(seed):
    """Against the definition: the hull of a row is what some price makes the cheapest option."""
    cost, usage = random_table(seed)
    steps = hull_steps(cost, usage)
    for row in range(len(cost)):
        mine = {int(steps.start[row]), *steps.option[steps.row == row].tolist()}
        slopes = steps.slope[steps.row == row]
        assert (np.diff(slopes) >= 0).all()
        assert (slopes < 0).all()
        prices = np.concatenate([[0.0], -slopes, (-slopes[1:] - slopes[:-1]) / 2, [1e9]])
        for price in prices:
            priced = cost[row] + price * usage[row]
            assert min(priced[list(mine)]) == pytest.approx(np.nanmin(priced), rel=1e-9, abs=1e-9)


def test_too_many_points_are_refused(monkeypatch):
    monkeypatch.setattr(frontier, "MAX_POINTS", 20)
    g = np.random.default_rng(0)
    with pytest.raises(SolverError, match="use method='hull'"):
        frontier.exact_front(-np.sort(g.random((10, 3)), axis=1), np.sort(g.random((10, 3)), axis=1))
