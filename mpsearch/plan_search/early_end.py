"""Budgets that leave nothing to search: the highest precision fits, or only one plan does."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation.solving import choose
from mpsearch.core.precision import Precision
from mpsearch.core.problem import Problem
from mpsearch.core.solution import Status
from mpsearch.solvers import Exact

Columns = NDArray[np.int64]

_EXACT = Exact(time_limit_s=math.inf, max_states=50_000, max_nodes=2_000)  # no clock: the same answer on a busy machine


@dataclass(frozen=True, eq=False)
class EarlyEnd:
    """The plan that a search ends with before it spends a pass, and why.

    Attributes:
        columns: (D,) column of each decision.
        reason: in words.
    """

    columns: Columns
    reason: str


def early_end(problem: Problem) -> EarlyEnd | None:
    """The one plan that is left to take, where there is one.

    >>> import mpsearch as mps
    >>> layers = (mps.Layer("a", weight_shape=(8,)), mps.Layer("b", weight_shape=(8,)))
    >>> table = mps.CostTable(layers, mps.precisions("w2 w4"), np.zeros((2, 2)))
    >>> [getattr(early_end(Problem.of(table, mps.Budget(average_bits=limit))), "reason", None) for limit in (2, 3, 4)]
    ['only one plan fits the budget', None, 'the highest precision fits the budget, w4 in every layer']
    """
    columns = _widest(problem)
    if columns is not None and problem.feasible(columns):
        names = sorted({str(problem.table.precisions[p]) for p in columns})
        each = f"{names[0]} in every layer" if len(names) == 1 else "every layer at its widest option"
        return EarlyEnd(columns, f"the highest precision fits the budget, {each}")
    columns = _only(problem)
    return None if columns is None else EarlyEnd(columns, "only one plan fits the budget")


def _widest(problem: Problem) -> Columns | None:
    """Each row at the option that is at least as fine as all others in every respect; None where a row has none."""
    precisions = problem.table.precisions
    finer = np.array([[_as_fine(first, other) for other in precisions] for first in precisions])
    allowed = ~np.isnan(problem.objective)
    best = allowed & (finer[None] | ~allowed[:, None, :]).all(axis=2)
    return np.asarray(best.argmax(axis=1)) if best.any(axis=1).all() else None


def _as_fine(first: Precision, other: Precision) -> bool:
    """True where a layer at `first` is surely no worse off than at `other`: as many bits, and of as many the same format."""
    if first == other:
        return True
    parts: Sequence[tuple[str, int, str, int, bool]] = (
        (first.weight, first.weight_bits, other.weight, other.weight_bits, first.quantizes_weight),
        (first.activation, first.activation_bits, other.activation, other.activation_bits, first.quantizes_activation),
    )
    for mine, bits, others, other_bits, quantized in parts:
        if quantized and (bits < other_bits or (bits == other_bits and mine != others)):
            return False
    same = first.weight == other.weight and first.quantizes_weight
    return (
        not same
        or first.group_size == other.group_size
        or (first.group_size is not None and (other.group_size is None or first.group_size <= other.group_size))
    )


def _only(problem: Problem) -> Columns | None:
    """The plan within the limits where there is no other, proven row by row."""
    free = replace(problem, objective=np.where(np.isnan(problem.objective), np.nan, 0.0), interactions=None)
    columns = choose(_EXACT, free).options
    if columns is None:
        return None
    for row, column in enumerate(columns.tolist()):
        objective = free.objective.copy()
        objective[row, column] = np.nan
        if np.isnan(objective[row]).all():
            continue
        other = choose(_EXACT, replace(free, objective=objective))
        if other.status is not Status.INFEASIBLE:
            return None
    return columns
