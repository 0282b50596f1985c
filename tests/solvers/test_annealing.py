"""Annealing: against enumeration where tables are small, against Viterbi where interactions form a chain."""

import itertools
import math

import numpy as np
import pytest

from mpsearch.core.solution import Status
from mpsearch.core.table import Interactions
from mpsearch.solvers import Annealing


def all_pairs(rng, rows, columns, scale):
    cells = [
        ((i, p), (k, q))
        for i, k in itertools.combinations(range(rows), 2)
        for p in range(columns)
        for q in range(columns)
    ]
    first, second = np.array(cells).transpose(1, 0, 2)
    return Interactions(first, second, rng.normal(0, scale, len(cells)))


def test_small_tables(enumerated):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        sensitivity, usage = rng.random((5, 3)), rng.integers(1, 9, (2, 5, 3)).astype(float)
        sensitivity[1, 2] = np.nan
        limits = usage.mean(axis=2).sum(axis=1)
        interactions = all_pairs(rng, 5, 3, 1.0)
        best, options = enumerated(sensitivity, usage, limits, interactions)[0]
        choice = Annealing(sweeps=30).choose(sensitivity, usage, limits, interactions)
        assert tuple(choice.options) == options
        assert choice.bound <= best
        assert choice.multipliers is None  # they would certify the separable part alone


def least_on_chain(sensitivity, blocks, use, limit):
    """Viterbi over (option, units used): the optimum where only neighbours interact and sizes are small."""
    states = {(p, use[0, p]): damage for p, damage in enumerate(sensitivity[0]) if use[0, p] <= limit}
    for row in range(1, len(sensitivity)):
        following = {}
        for ((p, used), damage), q in itertools.product(states.items(), range(sensitivity.shape[1])):
            key = (q, used + use[row, q])
            if key[1] <= limit:
                total = damage + sensitivity[row, q] + blocks[row - 1][p, q]
                following[key] = min(following.get(key, math.inf), total)
        states = following
    return min(states.values())


@pytest.mark.parametrize("seed", range(2))
def test_chain_of_54_layers_within_1_percent(seed):
    rng = np.random.default_rng(seed)
    sensitivity = rng.lognormal(0, 1, (54, 1)) * 4.0 ** -np.array([0.0, 1.0, 2.0, 6.0])
    use = rng.integers(1, 6, (54, 1)) * np.array([2, 3, 4, 8])
    blocks = rng.normal(0, 0.5, (53, 4, 4))
    limit = int(1.5 * use.min(axis=1).sum())
    cells = list(itertools.product(range(53), range(4), range(4)))
    interactions = Interactions(
        [(i, p) for i, p, _ in cells], [(i + 1, q) for i, _, q in cells], [blocks[cell] for cell in cells]
    )
    choice = Annealing(seed=seed).choose(sensitivity, use[None].astype(float), np.array([float(limit)]), interactions)
    optimum = least_on_chain(sensitivity, blocks, use, limit)
    found = math.fsum(sensitivity[np.arange(54), choice.options]) + interactions.total(choice.options)
    assert use[np.arange(54), choice.options].sum() <= limit
    assert optimum - 1e-9 <= found <= optimum + 0.01 * abs(optimum)
    assert choice.bound <= optimum


def test_seed_decides(ordinary):
    rng = np.random.default_rng(0)
    sensitivity, usage, limits = ordinary(12, 4)
    interactions = all_pairs(rng, 12, 4, 1e-4)
    short = [Annealing(seed, sweeps=1, chains=2).choose(sensitivity, usage, limits, interactions) for seed in (3, 3, 4)]
    assert short[0].options.tolist() == short[1].options.tolist() != short[2].options.tolist()
    long = Annealing(3, sweeps=60, chains=16).choose(sensitivity, usage, limits, interactions)

    def energy(choice):
        return math.fsum(sensitivity[np.arange(12), choice.options]) + interactions.total(choice.options)

    assert energy(long) < energy(short[0])


def test_proofs(ordinary):
    sensitivity, usage, _ = ordinary(8, 4)
    assert Annealing(sweeps=2).choose(sensitivity, usage, usage.min(axis=2).sum(axis=1) - 1).status is Status.INFEASIBLE
    roomy = Annealing(sweeps=2).choose(sensitivity, usage, usage.max(axis=2).sum(axis=1))
    assert roomy.status is Status.OPTIMAL


def test_limits_are_kept_to_the_last_bit():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sensitivity, usage = rng.random((5, 3)), rng.random((1, 5, 3))
        sensitivity[np.arange(5), usage[0].argmin(axis=1)] += 1.0
        met = math.fsum(usage[0][np.arange(5), rng.integers(0, 3, 5)].tolist())
        for limit in (met, math.nextafter(met, 0.0)):
            choice = Annealing(sweeps=6, chains=8).choose(sensitivity, usage, np.array([limit]))
            if choice.options is not None:
                assert math.fsum(usage[0][np.arange(5), choice.options].tolist()) <= limit
