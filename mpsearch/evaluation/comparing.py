"""How far two tables agree, in the ranks of their cells and in their plans, and how far a table agrees with measured plans."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation.solving import solve
from mpsearch.core.budget import Budget
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.core.problem import attainable, usage_of
from mpsearch.core.table import Array, CostTable
from mpsearch.errors import TableError
from mpsearch.metrics.ranking import kendall, kendall_se, ranks, spearman, spearman_se

#: Sizes at which plans are compared, as shares of the way from the least memory to the most.
SHARES = (0.1, 0.25, 0.5, 0.75)
#: Plans are of equal size where the largest is at most this much larger than the smallest,
SIZE_TOLERANCE = 0.02
#: and are ranked where there are at least so many.
LEAST_PLANS = 5


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
    rows = []
    for name, mask in cells:
        x, y = a.sensitivity[mask], other[mask]
        if len(x) > 1:
            rows.append({"cells": name, "count": len(x), "spearman": spearman(x, y), "kendall": kendall(x, y)})
    return rows


def regrets(a: CostTable, b: CostTable) -> list[dict[str, Any]]:
    """Plans of both tables at the same sizes, each judged by the other table: its damage over the other's own best.

    Empty where either table has no `memory_bytes`.
    """
    if "memory_bytes" not in a.usage or "memory_bytes" not in b.usage:
        return []
    low, high = attainable(a)["memory_bytes"]
    rows = []
    for share in SHARES:
        size = low + share * (high - low)
        first, second = (solve(table, Budget(memory_bytes=size)) for table in (a, b))
        assert first.plan is not None
        assert second.plan is not None
        rows.append(
            {
                "memory_bytes": size,
                "same_layers": sum(first.plan[name] == second.plan[name] for name in first.plan),
                "first_by_second": _ratio(_judged(b, first.plan), second.sensitivity),
                "second_by_first": _ratio(_judged(a, second.plan), first.sensitivity),
            }
        )
    return rows


def _judged(table: CostTable, plan: Plan) -> float:
    cells = ((i, table.precisions.index(plan[layer.name])) for i, layer in enumerate(table.layers))
    return math.fsum(table.sensitivity[cell] for cell in cells)


def _ratio(value: float, best: float) -> float:
    return value / best if best else (1.0 if value == best else math.inf)


def plan_agreement(table: CostTable, measured: MeasuredPlans) -> list[dict[str, Any]]:
    """Rank correlation of predicted and measured damage: over all plans, within equal size, and in each band of equal size.

    Bands are made of `memory_bytes`, else of `average_bits`, where the table knows either: the window of `SIZE_TOLERANCE` that
    holds the most plans first, then the next among those left. "equal size" is the mean over bands, weighted by plans.
    Standard errors are over plans (jackknife).

    Returns:
        For each set of plans: `plans` (its name), `count`, `spearman`, `spearman_se`, `kendall`, `kendall_se`; for a band also
        `smallest` and `largest`, and `first_pick`: measured damage of the plan that the table likes best over the least measured.

    Raises:
        PlanError: where plans and table do not fit.
        TableError: for fewer than 3 plans.
    """
    if len(measured) < 3:
        raise TableError(f"{len(measured)} measured plans, expected 3 or more to rank")
    totals = _totals(table, measured)
    predicted = totals["sensitivity"]
    overall = [{"plans": "all", **_correlations(predicted, measured.damage)}]
    size = next((name for name in ("memory_bytes", "average_bits") if name in totals), None)
    rows = []
    for members in _bands(totals[size]) if size else []:
        guess, truth, sizes = predicted[members], measured.damage[members], totals[size or ""][members]
        rows.append(
            {
                "plans": size,
                "smallest": float(sizes.min()),
                "largest": float(sizes.max()),
                **_correlations(guess, truth),
                "first_pick": _ratio(float(truth[np.argmin(guess)]), float(truth.min())),
            }
        )
    if rows:
        overall.append({"plans": "equal size", **_pooled(rows)})
    return overall + rows


def misranked(table: CostTable, measured: MeasuredPlans, count: int = 5) -> list[dict[str, Any]]:
    """The plans whose ranks differ most, rank 1 = least damage.

    Raises:
        PlanError: where plans and table do not fit.
    """
    predicted = _totals(table, measured)["sensitivity"]
    guess, truth = ranks(predicted), ranks(measured.damage)
    return [
        {
            "plan": n,
            "predicted": float(predicted[n]),
            "measured": float(measured.damage[n]),
            "predicted_rank": float(guess[n]),
            "measured_rank": float(truth[n]),
        }
        for n in np.argsort(-np.abs(guess - truth), kind="stable")[:count].tolist()
    ]


def _totals(table: CostTable, measured: MeasuredPlans) -> dict[str, Array]:
    """(N,) use of every resource and predicted sensitivity of each plan."""
    each = [usage_of(table, options) for options in measured.options(table)]
    return {name: np.array([totals[name] for totals in each]) for name in each[0]}


def _correlations(predicted: Array, damage: Array) -> dict[str, Any]:
    return {
        "count": len(damage),
        "spearman": spearman(predicted, damage),
        "spearman_se": spearman_se(predicted, damage),
        "kendall": kendall(predicted, damage),
        "kendall_se": kendall_se(predicted, damage),
    }


def _bands(sizes: Array) -> list[NDArray[np.int64]]:
    """Plans of equal size, in order of size."""
    rest = np.argsort(sizes, kind="stable")
    bands = []
    while len(rest) >= LEAST_PLANS:
        ordered = sizes[rest]
        ends = np.searchsorted(ordered, ordered * (1 + SIZE_TOLERANCE), side="right")
        start = int(np.argmax(ends - np.arange(len(rest))))
        if ends[start] - start < LEAST_PLANS:
            break
        bands.append(rest[start : ends[start]])
        rest = np.delete(rest, slice(start, ends[start]))
    return sorted(bands, key=lambda members: float(sizes[members[0]]))


def _pooled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over bands, weighted by plans; a band where all damages or all predictions are equal says nothing."""
    ranked = [row for row in rows if not math.isnan(row["spearman"])]
    weights = np.array([row["count"] for row in ranked], np.float64)
    total = float(weights.sum())
    pooled: dict[str, Any] = {"count": int(total)}
    for name in ("spearman", "kendall"):
        values, errors = (np.array([row[key] for row in ranked]) for key in (name, f"{name}_se"))
        pooled[name] = float(weights @ values) / total if ranked else math.nan
        pooled[f"{name}_se"] = math.sqrt(float(np.square(weights * errors).sum())) / total if ranked else math.nan
    return pooled
