"""The best few plans against the sorted list of all plans."""

import itertools

import numpy as np
import pytest

from mpsearch.core.solution import Status
from mpsearch.solvers import ILP, BruteForce, DynamicProgramming
from mpsearch.solvers.top import ranked


def top_choices(solver, sensitivity, usage, limits, count):
    def choose(allowed):
        return solver.choose(np.where(allowed, sensitivity, np.nan), usage, limits)

    first = choose(~np.isnan(sensitivity))
    return list(itertools.islice(ranked(choose, first, sensitivity, usage, limits), count))


class Counting:
    def __init__(self, solver):
        self.solver, self.calls = solver, 0

    def choose(self, *arrays):
        self.calls += 1
        return self.solver.choose(*arrays)


@pytest.mark.parametrize("solver", [BruteForce(), DynamicProgramming(), ILP()], ids=repr)
def test_sorted_list(solver, enumerated):
    for seed in range(3 if isinstance(solver, ILP) else 15):
        rng = np.random.default_rng(seed)
        sensitivity = rng.integers(0, 9, (4, 3)).astype(float)  # with ties
        sensitivity[1, 1] = np.nan
        usage = rng.integers(1, 9, (seed % 3, 4, 3)).astype(float)
        limits = usage.mean(axis=2).sum(axis=1)
        plans = enumerated(sensitivity, usage, limits)
        found = top_choices(solver, sensitivity, usage, limits, 12)
        values = [sensitivity[np.arange(4), c.options].sum() for c in found]
        assert values == [value for value, _ in plans[:12]]
        assert len({tuple(c.options) for c in found}) == len(found) == min(12, len(plans))
        assert {tuple(c.options) for c in found} <= {options for _, options in plans}
        assert [c.stats["rank"] for c in found] == list(range(1, len(found) + 1))
        assert all(c.stats["rank_proven"] for c in found)
        assert [c.status for c in found] == [Status.OPTIMAL] + [Status.FEASIBLE] * (len(found) - 1)


def test_multipliers_save_solves(ordinary):
    sensitivity, usage, limits = ordinary(20, 4)
    solver = Counting(DynamicProgramming())
    found = top_choices(solver, sensitivity, usage, limits, 10)
    values = [sensitivity[np.arange(20), c.options].sum() for c in found]
    assert values == sorted(values)
    assert solver.calls < 10 * 20 / 2  # Lawler's partition alone solves one part for each plan and row


def test_not_proven(ordinary):
    found = top_choices(DynamicProgramming(max_states=1), *ordinary(20, 4), 3)  # type: ignore[call-arg]
    assert not any(c.stats["rank_proven"] for c in found)
