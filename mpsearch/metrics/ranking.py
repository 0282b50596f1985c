"""Rank correlation, with standard errors.

`scipy.stats` is loaded in the functions that need it, since that takes longer than all else that a search loads.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ranks(values: Floats) -> Floats:
    """Ranks from 1, ties at their mean.

    >>> ranks(np.array([10.0, 30.0, 10.0])).tolist()
    [1.5, 3.0, 1.5]
    """
    from scipy import stats

    return np.asarray(stats.rankdata(values))


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation, that of Pearson between the ranks; nan where one side has a single value.

    Two lines of its own, since `scipy.stats.spearmanr` makes a p-value too, at many times the cost, and warns of a single value;
    the jackknife and the search for proxies ask thousands of times.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 12)
    0.5
    """
    x, y = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def kendall(a: Floats, b: Floats) -> float:
    """Kendall's tau-b; nan where one side has a single value.

    >>> round(kendall(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 3)
    0.333
    >>> kendall(np.array([1.0, 2.0]), np.array([2.0, 1.0]))
    -1.0
    """
    from scipy import stats

    if len(a) < 2:
        return float("nan")
    # the p-value, which nobody reads, is cheapest so; of two pairs its variance is no number
    return float(stats.kendalltau(a, b, method="asymptotic" if len(a) > 2 else "auto").statistic)


def spearman_se(a: Floats, b: Floats) -> float:
    """Standard error of `spearman`, by the jackknife over the N pairs of values; nan with fewer than 3, or where it is undefined.

        se^2 = (N - 1) / N sum_i (r_(i) - mean r_(i))^2,   r_(i) without pair i     (Efron and Tibshirani 1993, section 11.5)

    >>> round(spearman_se(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 3)    # without each: -1, 1, 1
    1.333
    """
    return jackknife_se(np.array([spearman(np.delete(a, i), np.delete(b, i)) for i in range(len(a))]))


def kendall_se(a: Floats, b: Floats) -> float:
    """Standard error of `kendall`, by the jackknife as in `spearman_se`; all N leave-one-out values from one run over the pairs.

    >>> round(kendall_se(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 3)
    1.333
    """
    rows = np.zeros((len(a), 3))  # of each value: agreement, untied pairs in a, untied pairs in b
    for i in range(len(a)):
        x, y = np.sign(a - a[i]), np.sign(b - b[i])
        rows[i] = (x * y).sum(), np.abs(x).sum(), np.abs(y).sum()
    agree, untied_a, untied_b = (rows.sum(axis=0) / 2 - rows).T
    with np.errstate(invalid="ignore", divide="ignore"):
        return jackknife_se(agree / np.sqrt(untied_a * untied_b))


def jackknife_se(without: Floats) -> float:
    """Standard error of a statistic from its values without each of N observations, (N,).

    For the mean it is the usual one; the values 1, 2, 6 have the mean 3 and the leave-one-out means 4, 3.5, 1.5:

    >>> round(jackknife_se(np.array([4.0, 3.5, 1.5])), 6)    # sqrt((4 + 1 + 9) / (2 * 3))
    1.527525
    """
    n = len(without)
    return float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum()))
