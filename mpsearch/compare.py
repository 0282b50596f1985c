"""How far two tables agree: in the ranks of their cells, and in the plans that they lead to."""

import math
from typing import Any

import numpy as np

from mpsearch._solve import solve
from mpsearch.budget import Budget
from mpsearch.errors import TableError
from mpsearch.plan import Plan
from mpsearch.problem import attainable
from mpsearch.ranking import kendall, spearman
from mpsearch.table import CostTable

#: Sizes at which plans are compared, as shares of the way from the least memory to the most.
SHARES = (0.1, 0.25, 0.5, 0.75)


def agreement(a: CostTable, b: CostTable) -> list[dict[str, Any]]:
    """Rank correlation of the sensitivities, over all cells and for each precision.

    Raises:
        TableError: where layers or precisions differ.
    """
    if [x.name for x in a.layers] != [x.name for x in b.layers] or set(a.precisions) != set(b.precisions):
        raise TableError("the two tables have different layers or precisions, so their ranks cannot be compared")
    other = b.sensitivity[:, [b.precisions.index(precision) for precision in a.precisions]]
    both = ~np.isnan(a.sensitivity) & ~np.isnan(other)
    cells = [("all cells", both)]
    cells += [(str(p), both & (np.arange(both.shape[1]) == j)) for j, p in enumerate(a.precisions)]
    found = []
    for name, mask in cells:
        x, y = a.sensitivity[mask], other[mask]
        if len(x) > 1:
            found.append({"cells": name, "count": len(x), "spearman": spearman(x, y), "kendall": kendall(x, y)})
    return found


def regrets(a: CostTable, b: CostTable) -> list[dict[str, Any]]:
    """Plans of both tables at the same sizes, each judged by the other table: its damage over the other's own best.

    Empty where either table has no `memory_bytes`.
    """
    if "memory_bytes" not in a.usage or "memory_bytes" not in b.usage:
        return []
    low, high = attainable(a)["memory_bytes"]
    found = []
    for share in SHARES:
        size = low + share * (high - low)
        first, second = (solve(table, Budget(memory_bytes=size)) for table in (a, b))
        assert first.plan is not None
        assert second.plan is not None
        found.append(
            {
                "memory_bytes": size,
                "same_layers": sum(first.plan[name] == second.plan[name] for name in first.plan),
                "first_by_second": _ratio(_judged(b, first.plan), second.sensitivity),
                "second_by_first": _ratio(_judged(a, second.plan), first.sensitivity),
            }
        )
    return found


def _judged(table: CostTable, plan: Plan) -> float:
    cells = ((i, table.precisions.index(plan[layer.name])) for i, layer in enumerate(table.layers))
    return math.fsum(table.sensitivity[cell] for cell in cells)


def _ratio(value: float, best: float) -> float:
    return value / best if best else (1.0 if value == best else math.inf)
