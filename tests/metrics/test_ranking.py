import numpy as np
import pytest
from scipy import stats

from mpsearch.metrics.ranking import kendall, kendall_se, ranks, spearman, spearman_se


@pytest.mark.parametrize("seed", range(10))
def test_against_scipy(seed):
    generator = np.random.default_rng(seed)
    a, b = generator.integers(0, 6, 30).astype(float), generator.normal(size=30).round(1)
    assert ranks(a).tolist() == stats.rankdata(a).tolist()
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
    assert np.isnan(spearman(a, np.ones(30)))
    assert np.isnan(kendall(a, np.ones(30)))


@pytest.mark.parametrize("seed", range(5))
def test_jackknife_against_a_loop_with_scipy(seed):
    generator = np.random.default_rng(seed)
    a, b = generator.integers(0, 6, 12).astype(float), generator.normal(size=12).round(1)
    for se, statistic in ((spearman_se, stats.spearmanr), (kendall_se, stats.kendalltau)):
        without = [statistic(np.delete(a, i), np.delete(b, i)).statistic for i in range(12)]
        assert se(a, b) == pytest.approx(np.sqrt(11 * np.var(without)))


@pytest.mark.parametrize(("statistic", "se"), [(spearman, spearman_se), (kendall, kendall_se)])
def test_standard_errors_against_the_spread_of_repetitions(statistic, se):
    generator = np.random.default_rng(0)
    values, errors = [], []
    for _ in range(300):
        a = generator.normal(size=40)
        b = a + generator.normal(size=40)
        values.append(statistic(a, b))
        errors.append(se(a, b))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_standard_errors_that_do_not_exist():
    for se in (spearman_se, kendall_se):
        assert np.isnan(se(np.array([1.0, 2.0]), np.array([1.0, 2.0])))
        assert np.isnan(se(np.arange(5.0), np.ones(5)))
        assert se(np.arange(5.0), np.arange(5.0)) == 0
