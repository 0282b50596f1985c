"""Options that use as much as a finer one: a tool keeps 6-bit codes in bytes, so that 8 bits cost what 6 do."""

from dataclasses import replace

import numpy as np

from mpsearch.core.budget import Budget
from mpsearch.core.precision import Precision
from mpsearch.core.problem import Problem
from mpsearch.core.table import CostTable
from mpsearch.core.totals import merged, total_of
from mpsearch.errors import warn
from mpsearch.plan_search.goals import Goal


def finer(a: Precision, b: Precision) -> bool:
    """True where a precision is finer than another in the weight and no coarser in groups and input; of integers alone.

    >>> options = [Precision.parse(text) for text in ("w8g64", "w6g64", "w8g32", "w8a8g64")]
    >>> [[int(finer(a, b)) for b in options] for a in options]
    [[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    """
    if not (a.weight.isdecimal() and b.weight.isdecimal() and a.activation == b.activation):
        return False
    sizes = [precision.group_size or np.inf for precision in (a, b)]
    return a.weight_bits > b.weight_bits and (not a.quantizes_weight or sizes[0] <= sizes[1])


def without_outdone(table: CostTable, goal: Goal) -> CostTable:
    """The table without options that use no less than a finer one of all that the goal limits or saves.

    Which were left out is told in a warning, and under `outdone` in the origin.

    Args:
        table: what is allowed, and what it uses.
        goal: of the search.
    """
    problem = Problem.of(table, goal.budget or Budget())
    amounts = list(problem.usage)
    for resource in goal.saved:
        amounts += [merged(cells, problem.row_of_layer)[0] for cells in total_of(table, resource).cells]
    if not amounts:
        return table
    used = np.stack(amounts)
    allowed = ~np.isnan(problem.objective)
    pairs = [(p, q) for p, a in enumerate(table.precisions) for q, b in enumerate(table.precisions) if finer(b, a)]
    outdone = np.zeros_like(allowed)
    by: dict[tuple[str, str], int] = {}
    for p, q in pairs:
        rows = allowed[:, p] & allowed[:, q] & (used[:, :, q] <= used[:, :, p]).all(axis=0)
        outdone[:, p] |= rows
        if rows.any():
            by.setdefault((str(table.precisions[p]), str(table.precisions[q])), int(rows[problem.row_of_layer].sum()))
    if not by:
        return table
    coarse = {name for name, _ in by}
    pairs_text = ", ".join(
        f"{name} in {count} layers (no less than {better})"
        for (name, better), count in by.items()
        if better not in coarse
    )
    text = f"options that use as much as a finer one are left out: {pairs_text}"
    warn(text)
    sensitivity = np.where(outdone[problem.row_of_layer], np.nan, table.sensitivity)
    return replace(table, sensitivity=sensitivity, origin={**table.origin, "outdone": text})
