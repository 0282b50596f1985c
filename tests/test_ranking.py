import numpy as np
import pytest
from scipy import stats

from mpsearch.ranking import kendall, ranks, spearman


@pytest.mark.parametrize("seed", range(10))
def test_against_scipy(seed):
    generator = np.random.default_rng(seed)
    a, b = generator.integers(0, 6, 30).astype(float), generator.normal(size=30).round(1)
    assert ranks(a).tolist() == stats.rankdata(a).tolist()
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
    assert np.isnan(spearman(a, np.ones(30)))
    assert np.isnan(kendall(a, np.ones(30)))
