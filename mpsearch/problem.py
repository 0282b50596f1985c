"""From a table and a budget to the arrays that a solver takes, and back to names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsearch.budget import Budget
from mpsearch.errors import BudgetError, SolverError, TableError, nearest
from mpsearch.layer import Layer
from mpsearch.plan import Plan
from mpsearch.precision import Precision
from mpsearch.solution import Choice, Solution, Status, relative_gap
from mpsearch.table import Array, CostTable, Interactions
from mpsearch.undecided import sentence


@dataclass(frozen=True, eq=False)
class Problem:
    """A table, a goal and limits as arrays; layers of one group are one row.

    Attributes:
        table: the table.
        minimized: `sensitivity`, or the resource whose use is to be least.
        limits: resource -> upper limit on the whole model.
        objective: (G, P) float64; nan = option not allowed.
        usage: (R, G, P) float64, a row for each limit, several for a peak resource.
        free: (R,) float64, the limits less the fixed usage.
        row_names: (R,) resource of each row of `usage`.
        row_of_layer: (L,) int64, row of each layer.
        interactions: between rows, or None.
    """

    table: CostTable
    minimized: str
    limits: Mapping[str, float]
    objective: Array
    usage: Array
    free: Array
    row_names: tuple[str, ...]
    row_of_layer: NDArray[np.int64]
    interactions: Interactions | None

    @classmethod
    def of(cls, table: CostTable, budget: Budget, minimized: str = "sensitivity") -> "Problem":
        """Set the problem up.

        Raises:
            BudgetError: for a limit on an unknown resource, or a goal that is none.
            TableError: where the layers of a group have no allowed precision in common.
        """
        limits = budget.limits(table)
        goals = ("sensitivity", *table.usage, "average_bits")
        if minimized not in goals:
            raise BudgetError(f"cannot minimize {minimized!r}{nearest(minimized, goals)}")
        if minimized in limits:
            raise BudgetError(f"{minimized} is both minimized and limited; choose one")
        if minimized != "sensitivity" and table.interactions is not None:
            raise BudgetError(f"cannot minimize {minimized} on a table with interactions; minimize sensitivity")
        row_of_layer = _rows(table.layers)
        interactions, own = _merged_interactions(table, row_of_layer)
        sensitivity = (
            _merged(table.sensitivity, row_of_layer) + own
            if own is not None
            else _merged(table.sensitivity, row_of_layer)
        )
        blocked = np.isnan(sensitivity).all(axis=1)
        if blocked.any():
            row = int(np.argmax(blocked))
            members = [layer.name for layer, at in zip(table.layers, row_of_layer, strict=True) if at == row]
            raise TableError(f"the layers {', '.join(members)} share one precision, but none is allowed in all of them")
        names: list[str] = []
        rows: list[Array] = []
        free: list[float] = []
        for name, limit in limits.items():
            if name in table.peaks:
                peak = table.peaks[name]
                steps = zip(peak.usage, peak.fixed, strict=True)
                parts = [(_merged(usage, row_of_layer), limit - fixed) for usage, fixed in steps]
            elif name == "average_bits":
                parts = [(_merged(table.bits, row_of_layer), limit * _weights(table))]
            elif name == "sensitivity":
                parts = [(sensitivity, limit)]
            else:
                parts = [(_merged(table.usage[name], row_of_layer), limit - table.fixed_usage.get(name, 0.0))]
            names += [name] * len(parts)
            rows += [usage for usage, _ in parts]
            free += [rest for _, rest in parts]
        if minimized == "sensitivity":
            objective = sensitivity
        else:
            amounts = table.bits if minimized == "average_bits" else table.usage[minimized]
            objective = np.where(np.isnan(sensitivity), np.nan, _merged(amounts, row_of_layer))
        usage = rows[0][None] if len(rows) == 1 else np.array(rows).reshape(len(rows), *objective.shape)
        for array in (objective, usage):
            array.flags.writeable = False
        return cls(
            table,
            minimized,
            limits,
            objective,
            usage,
            np.array(free),
            tuple(names),
            row_of_layer,
            interactions,
        )

    def feasible(self, options: NDArray[np.int64]) -> bool:
        """True where a choice of one option a row keeps every limit, in correctly rounded sums."""
        rows = np.arange(len(options))
        return all(math.fsum(u[rows, options]) <= limit for u, limit in zip(self.usage, self.free, strict=True))

    def value(self, options: NDArray[np.int64]) -> float:
        """Objective of a choice of one option a row."""
        value = math.fsum(self.objective[np.arange(len(options)), options])
        return value + self.interactions.total(options) if self.interactions is not None else value

    def shortfall(self) -> str | None:
        """Why a limit cannot be met whatever the plan, with the numbers; None where each alone can be met."""
        allowed = ~np.isnan(self.objective)
        for name, usage, free in zip(self.row_names, self.usage, self.free, strict=True):
            least = np.where(allowed, usage, np.inf).min(axis=1)
            if math.fsum(least) > free:
                limit = self.limits[name]
                scale = _weights(self.table) if name == "average_bits" else 1.0
                fixed = limit * scale - free
                most = int(np.argmax(least))
                layer = next(x.name for x, at in zip(self.table.layers, self.row_of_layer, strict=True) if at == most)
                parts = [f"{least[most] / scale:.3g} of it in layer {layer!r}"]
                if fixed > 0:
                    parts.insert(
                        0,
                        f"{fixed / scale:.6g} of it fixed (what no decision touches, such as norms, biases and layers left alone)",
                    )
                undecided = sentence(self.table.origin.get("undecided", {})) if fixed > 0 else ""
                return (
                    f"{name} <= {limit:.6g} cannot be met: the least any plan uses is {(math.fsum(least) + fixed) / scale:.6g}, "
                    + " and ".join(parts)
                    + (f"; {undecided}" if undecided else "")
                )
        return None

    def solution(self, choice: Choice, solver: str, seconds: float) -> Solution:
        """Names and recomputed totals for what a solver returned.

        Raises:
            SolverError: where it breaks a limit, chooses what is not allowed, or contradicts its own bound.
        """
        stats = {"solver": solver, "seconds": seconds, **choice.stats}
        if choice.options is None:
            return Solution(None, choice.status, math.nan, choice.bound, math.nan, {}, self.minimized, None, stats)
        options = np.asarray(choice.options, np.int64)
        rows = np.arange(len(self.objective))
        if options.shape != rows.shape or (options < 0).any() or (options >= self.objective.shape[1]).any():
            raise SolverError(
                f"{solver} returned options of shape {options.shape}, expected {rows.shape} columns of the table"
            )
        if np.isnan(self.objective[rows, options]).any():
            raise SolverError(
                f"{solver} chose an option that is not allowed, in row {int(np.isnan(self.objective[rows, options]).argmax())}"
            )
        if not self.feasible(options):
            used = [math.fsum(u[rows, options]) for u in self.usage]
            broken = next(r for r, u in enumerate(used) if u > self.free[r])
            raise SolverError(
                f"{solver} returned a plan that uses {used[broken]:.17g} of {self.row_names[broken]}, "
                f"more than the {self.free[broken]:.17g} left by the fixed part"
            )
        value = self.value(options)
        slack = 1e-9 * max(abs(value), float(np.abs(self.objective[rows, options]).max()))
        if choice.bound > value + slack:
            raise SolverError(f"{solver} claims that no plan is below {choice.bound:.17g}, its own has {value:.17g}")
        bound = value if choice.status is Status.OPTIMAL else min(choice.bound, value)
        usage = usage_of(self.table, options[self.row_of_layer])
        sensitivity = usage.pop("sensitivity")
        gap = relative_gap(value, bound)
        if self.minimized != "sensitivity":
            bound = (
                bound / _weights(self.table)
                if self.minimized == "average_bits"
                else bound + self.table.fixed_usage.get(self.minimized, 0.0)
            )
        predicted = {
            "sensitivity": sensitivity,
            "unit": self.table.unit,
            "status": str(choice.status),
            "minimized": self.minimized,
            "bound": bound if math.isfinite(bound) else None,
            "gap": gap if math.isfinite(gap) else None,
        }
        plan = Plan(
            named(self.table, options[self.row_of_layer]),
            dict(self.limits),
            predicted,
            usage,
            {"solver": solver, "table": dict(self.table.origin)},
        )
        prices: dict[str, float] | None = None
        if choice.multipliers is not None:
            steps = dict.fromkeys(self.row_names, 0)
            prices = {}
            for name, price in zip(self.row_names, choice.multipliers, strict=True):
                key = name if self.row_names.count(name) == 1 else f"{name}[{steps[name]}]"
                steps[name] += 1
                prices[key] = float(price)
        return Solution(plan, choice.status, sensitivity, bound, gap, usage, self.minimized, prices, stats)


def named(table: CostTable, options: NDArray[np.int64]) -> dict[str, Precision]:
    """Layer name -> precision for a choice of one column a layer."""
    return {layer.name: table.precisions[p] for layer, p in zip(table.layers, options.tolist(), strict=True)}


def usage_of(table: CostTable, options: NDArray[np.int64]) -> dict[str, float]:
    """Total of every resource, of `average_bits` where it is known, and of `sensitivity`, for one column a layer."""
    rows = np.arange(len(options))
    totals = {
        name: math.fsum(values[rows, options]) + table.fixed_usage.get(name, 0.0)
        for name, values in table.usage.items()
    }
    for name, peak in table.peaks.items():
        totals[name] = max(
            math.fsum(usage[rows, options]) + fixed
            for usage, fixed in zip(peak.usage, peak.fixed.tolist(), strict=True)
        )
    if all(layer.numel or layer.is_cache for layer in table.layers) and _weights(table):
        totals["average_bits"] = math.fsum(table.bits[rows, options]) / _weights(table)
    totals["sensitivity"] = math.fsum(table.sensitivity[rows, options])
    if table.interactions is not None:
        totals["sensitivity"] += table.interactions.total(options)
    return totals


def uniform(table: CostTable) -> list[tuple[str, dict[str, float]]]:
    """The plans that give every layer the same precision, where that is allowed: name and totals as in `usage_of`."""
    found = []
    for column, precision in enumerate(table.precisions):
        if table.allowed[:, column].all():
            found.append((str(precision), usage_of(table, np.full(len(table.layers), column))))
    return found


def attainable(table: CostTable) -> dict[str, tuple[float, float]]:
    """Least and most use of each resource by any plan, fixed part included; of a peak the least is a lower bound.

    Layers of a group share a precision. Where a group has none in common there is no plan: inf and -inf.
    """
    rows = _rows(table.layers)

    def ends(values: Array) -> tuple[float, float]:
        merged = _merged(np.where(table.allowed, values, np.nan), rows)
        low, high = np.where(np.isnan(merged), [[[np.inf]], [[-np.inf]]], merged)
        return math.fsum(low.min(axis=1).tolist()), math.fsum(high.max(axis=1).tolist())

    found = {}
    for name, values in table.usage.items():
        low, high = ends(values)
        fixed = table.fixed_usage.get(name, 0.0)
        found[name] = (low + fixed, high + fixed)
    for name, peak in table.peaks.items():
        steps = [(ends(usage), fixed) for usage, fixed in zip(peak.usage, peak.fixed.tolist(), strict=True)]
        found[name] = (max(low + fixed for (low, _), fixed in steps), max(high + fixed for (_, high), fixed in steps))
    return found


def _weights(table: CostTable) -> float:
    return float(sum(layer.numel for layer in table.layers))


def _rows(layers: tuple[Layer, ...]) -> NDArray[np.int64]:
    if not any(layer.group for layer in layers):
        return np.arange(len(layers))
    rows: dict[tuple[bool, str], int] = {}
    keys = [(bool(layer.group), layer.group or layer.name) for layer in layers]
    return np.array([rows.setdefault(key, len(rows)) for key in keys], np.int64)


def _merged(values: Array, row_of_layer: NDArray[np.int64]) -> Array:
    """Sum of the layers of each row; nan where any of them is nan."""
    count = int(row_of_layer.max()) + 1
    if count == len(row_of_layer):
        return values.view()
    merged = np.zeros((count, values.shape[1]))
    np.add.at(merged, row_of_layer, values)
    return merged


def _merged_interactions(table: CostTable, row_of_layer: NDArray[np.int64]) -> tuple[Interactions | None, Array | None]:
    """Interactions between rows, and those inside a row as (G, P) to add to its own sensitivity."""
    pairs = table.interactions
    if pairs is None:
        return None, None
    first, second = pairs.first.copy(), pairs.second.copy()
    first[:, 0], second[:, 0] = row_of_layer[first[:, 0]], row_of_layer[second[:, 0]]
    inside = first[:, 0] == second[:, 0]
    own = np.zeros((int(row_of_layer.max()) + 1, len(table.precisions)))
    same = inside & (first[:, 1] == second[:, 1])  # a group has one precision, so other pairs never happen
    np.add.at(own, (first[same, 0], first[same, 1]), pairs.value[same])
    return Interactions(first[~inside], second[~inside], pairs.value[~inside]), own
