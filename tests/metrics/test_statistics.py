"""The mean of a ratio and its standard error: from samples, from their sums, and added up batch by batch."""

import math

import numpy as np
import pytest
import torch

from mpsearch.metrics.statistics import Mean, ratio_of_samples, ratio_of_sums


def samples(size: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, size).astype(float)
    return rng.normal(1, 2, size) * counts, counts


def test_three_ways_to_the_same() -> None:
    s, c = samples()
    mean, se = ratio_of_samples(s, c)
    total = ratio_of_sums(int((c > 0).sum()), s.sum(), (s * s).sum(), (s * c).sum(), c.sum(), (c * c).sum())
    added = Mean()
    for start in range(0, 40, 7):
        added.add_samples(torch.tensor(s[start : start + 7]), torch.tensor(c[start : start + 7]))
    assert [float(x) for x in total] == pytest.approx([mean, se])
    assert (added.value, added.se) == pytest.approx((mean, se))


def test_the_spread_of_repetitions() -> None:
    """Over many data sets the means scatter as the standard error says."""
    pairs = np.array([ratio_of_samples(*samples(60, seed)) for seed in range(400)])
    assert pairs[:, 1].mean() == pytest.approx(pairs[:, 0].std(ddof=1), rel=0.15)


def test_by_hand_and_at_the_ends() -> None:
    assert ratio_of_samples(np.array([1.0, 3.0]), np.array([1.0, 1.0])) == (2.0, 1.0)
    assert ratio_of_samples(np.array([3.0, 0.0]), np.array([2.0, 0.0]))[0] == 1.5
    assert math.isnan(ratio_of_samples(np.array([3.0, 0.0]), np.array([2.0, 0.0]))[1])
    assert all(map(math.isnan, ratio_of_samples(np.zeros(2), np.zeros(2))))
    means, errors = ratio_of_sums(1, np.array([1.0, 2.0]), 5.0, 2.0, np.array([2.0, 0.0]), 4.0)
    assert means[0] == 0.5
    assert np.isnan([means[1], *errors]).all()
