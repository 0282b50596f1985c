"""Rank correlation of two tables, and regret of the plans that they lead to."""

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
