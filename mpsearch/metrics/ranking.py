"""Rank correlation, with standard errors."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ranks(values: Floats) -> Floats:
    """Ranks from 1, ties at their mean.

    >>> ranks(np.array([10.0, 30.0, 10.0])).tolist()
    [1.5, 3.0, 1.5]
    """
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    starts = np.flatnonzero(np.append(True, sorted_values[1:] != sorted_values[:-1]))
    counts = np.diff(np.append(starts, len(values)))
    found = np.empty(len(values))
    found[order] = np.repeat(starts + (counts + 1) / 2, counts)
    return found


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation; nan where one side has a single value.

    >>> round(spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 12)
    0.5
    """
    x, y = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def kendall(a: Floats, b: Floats) -> float:
    """Kendall's tau-b, from all pairs; nan where one side has a single value.

    >>> round(kendall(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 3)
    0.333
    """
    agree = ties_a = ties_b = 0.0
    for i in range(len(a) - 1):
        x, y = np.sign(a[i + 1 :] - a[i]), np.sign(b[i + 1 :] - b[i])
        agree += float((x * y).sum())
        ties_a += float((x == 0).sum())
        ties_b += float((y == 0).sum())
    pairs = len(a) * (len(a) - 1) / 2
    size = np.sqrt((pairs - ties_a) * (pairs - ties_b))
    return float(agree / size) if size else float("nan")


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
