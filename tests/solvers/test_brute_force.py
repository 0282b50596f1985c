"""BruteForce against a plain loop over `itertools.product`."""

import numpy as np
import pytest

from mpsearch.core.solution import Status
from mpsearch.core.table import Interactions
from mpsearch.errors import SolverError
from mpsearch.solvers import BruteForce
from mpsearch.solvers import brute_force as module


@pytest.mark.parametrize("chunk", [5, 1 << 16])
def test_plain_loop(chunk, enumerated, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        sensitivity, usage = rng.normal(size=(5, 3)), rng.random((2, 5, 3))
        sensitivity[2, 0] = np.nan
        limits = usage.mean(axis=2).sum(axis=1)
        first, second, values = [[0, 1], [3, 2]], [[4, 0], [1, 1]], rng.normal(size=2)
        for interactions in (None, Interactions(first, second, values)):
            plans = enumerated(sensitivity, usage, limits, interactions)
            choice = BruteForce().choose(sensitivity, usage, limits, interactions)
            assert choice.stats["plans"] == 3**4 * 2
            assert (choice.status is Status.OPTIMAL) == bool(plans)
            if plans:
                assert tuple(choice.options) == plans[0][1]
                assert choice.bound == pytest.approx(plans[0][0], abs=1e-12)


def test_too_many_plans():
    with pytest.raises(SolverError, match="1024 plans, expected at most 1000 for BruteForce; use Exact"):
        BruteForce(max_plans=1000).choose(np.zeros((10, 2)), np.zeros((0, 10, 2)), np.zeros(0))
    with pytest.raises(SolverError, match="about 1e9031 plans"):
        BruteForce().choose(np.zeros((10_000, 8)), np.zeros((0, 10_000, 8)), np.zeros(0))
