"""From a table and a budget to the arrays that a solver takes, and back to names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.budget import Budget, Limit, inequality, written
from mpsearch.core.layer import Layer
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.core.printing import undecided_text
from mpsearch.core.solution import Choice, Solution, Status, relative_gap
from mpsearch.core.table import Array, CostTable, Interactions
from mpsearch.core.totals import DERIVED, Total, exact_sum, merged, plus, total_of, totals_of
from mpsearch.errors import BudgetError, SolverError, TableError, nearest

_DIGITS = 52  # binary digits of the use of a whole plan that solvers count


@dataclass(frozen=True, eq=False)
class Problem:
    """A table, a goal and limits as arrays; layers of one group are one row.

    What a solver sees of a resource are whole multiples of a power of two, less than 2^53 of them in any plan, so that its sums are
    exact in any order: the use itself, or what it is above the least of the row. Where that has more digits it is rounded down: no plan
    is lost, and one that breaks a limit by less than `blur` looks as if it kept it. `feasible` decides on the very amounts that are
    reported.

    Attributes:
        table: the table.
        minimized: `sensitivity`, or the amount that is to be least.
        limits: name -> (lower, upper) limit on the whole model.
        objective: (G, P) float64; nan = option not allowed.
        usage: (R, G, P) float64, a row for each limit, several for a peak, the negative for a lower limit.
        free: (R,) float64, the limits less the fixed part and what `usage` does not count.
        blur: (R,) float64; a choice with a use of at most `free - blur` keeps the limit for sure. 0: nothing was rounded.
        row_names: (R,) amount of each row of `usage`; `... at least` for a lower limit.
        row_of_layer: (L,) int64, row of each layer.
        interactions: between rows, or None.
    """

    table: CostTable
    minimized: str
    limits: Mapping[str, Limit]
    objective: Array
    usage: Array
    free: Array
    blur: Array
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
        limits = budget.bounds(table)
        goals = ("sensitivity", *table.usage, *DERIVED)
        if minimized not in goals:
            raise BudgetError(f"cannot minimize {minimized!r}{nearest(minimized, goals)}")
        if minimized in limits:
            raise BudgetError(f"{minimized} is both minimized and limited; choose one")
        if minimized != "sensitivity" and table.interactions is not None:
            raise BudgetError(f"cannot minimize {minimized} on a table with interactions; minimize sensitivity")
        row_of_layer = _rows(table.layers)
        interactions, own = _merged_interactions(table, row_of_layer)
        sensitivity, _ = merged(table.sensitivity, row_of_layer)
        if own is not None:
            sensitivity = sensitivity + own
        blocked = np.isnan(sensitivity).all(axis=1)
        if blocked.any():
            row = int(np.argmax(blocked))
            members = [layer.name for layer, at in zip(table.layers, row_of_layer, strict=True) if at == row]
            raise TableError(f"the layers {', '.join(members)} share one precision, but none is allowed in all of them")
        objective = sensitivity
        if minimized != "sensitivity":
            cells, _ = merged(total_of(table, minimized).cells[0], row_of_layer)
            objective = np.where(np.isnan(sensitivity), np.nan, cells)
        objective.flags.writeable = False
        none = np.empty((0, *objective.shape))
        problem = cls(table, minimized, {}, objective, none, np.empty(0), np.empty(0), (), row_of_layer, interactions)
        return problem.limited(limits)

    def limited(self, limits: Mapping[str, Limit]) -> "Problem":
        """The same with other limits; those on other amounts stay."""
        rows: list[tuple[str, Array, float, float]] = []
        for name, (lower, upper) in limits.items():
            total = total_of(self.table, name)
            if lower > -math.inf:
                rows.append((f"{name} at least", *self._row(total.negative, 0, -lower)))
            if upper < math.inf:
                rows += [(name, *self._row(total, step, upper)) for step in range(len(total.cells))]
        others = [r for r, name in enumerate(self.row_names) if name.removesuffix(" at least") not in limits]
        usage = [*self.usage[others], *(row[1] for row in rows)]
        stacked = usage[0][None] if len(usage) == 1 else np.array(usage).reshape(len(usage), *self.objective.shape)
        stacked.flags.writeable = False
        return replace(
            self,
            limits={**self.limits, **limits},
            usage=stacked,
            free=np.array([*self.free[others], *(row[2] for row in rows)]),
            blur=np.array([*self.blur[others], *(row[3] for row in rows)]),
            row_names=(*(self.row_names[r] for r in others), *(row[0] for row in rows)),
        )

    def _row(self, total: Total, step: int, limit: float) -> tuple[Array, float, float]:
        """Usage (G, P), what is free, and the blur, of one step of an amount that is at most `limit`."""
        allowed = ~np.isnan(self.objective)
        cells = total.cells[step]
        room, reached = total.room(step, limit)
        exponent, rounded = 0, 0
        size = float(np.where(self.table.allowed, np.abs(cells), 0.0).max(axis=1).sum())
        if size < 2.0**_DIGITS and ((cells == np.floor(cells)) | ~self.table.allowed).all():
            usage = merged(cells, self.row_of_layer)[0]
        else:  # from the least of each row, which is exact as pairs of floats
            high, low = (np.where(allowed, part, 0.0) for part in merged(cells, self.row_of_layer))
            least = least_options(cells, self.row_of_layer, allowed)
            rows = np.arange(len(least))
            first, second = high[rows, least], low[rows, least]
            high, low = plus(*plus(high, low, -first[:, None]), -second[:, None])
            room -= exact_sum(first) + exact_sum(second)
            size = float(np.where(allowed, high, 0.0).max(axis=1).sum())
            exponent = max(math.frexp(size)[1] - _DIGITS, -1074) if size else 0
            usage = np.ldexp(np.floor(np.ldexp(high, -exponent)), exponent)
            rest = (high - usage) + low
            usage = np.where(allowed, usage - np.ldexp((rest < 0).astype(float), exponent), np.nan)
            rounded = int(((rest != 0) & allowed).any(axis=1).sum())
        unit = Fraction(2) ** exponent
        most = math.floor(room / unit)
        if not reached and most * unit == room:
            most -= 1
        most = max(min(most, 2**53), -(2**53))  # more than that is no limit, less is none that can be kept
        return usage, float(np.ldexp(most, exponent)), float(np.ldexp(rounded, exponent))

    def fits(self, options: NDArray[np.int64]) -> bool:
        """True where a choice of one option a row keeps every limit as a solver sees it."""
        rows = np.arange(len(options))
        return all(
            math.fsum(u[rows, options].tolist()) <= limit for u, limit in zip(self.usage, self.free, strict=True)
        )

    def feasible(self, options: NDArray[np.int64]) -> bool:
        """True where the amounts that are reported of a choice of one option a row keep every limit."""
        if not self.fits(options):
            return False
        return not self.blur.any() or not self.broken(options)

    def broken(self, options: NDArray[np.int64]) -> list[tuple[str, float]]:
        """The limits that a choice of one option a row breaks, and what it uses."""
        columns = options[self.row_of_layer]
        used = {name: total_of(self.table, name).of(columns) for name in self.limits}
        return [(name, used[name]) for name, (low, high) in self.limits.items() if not low <= used[name] <= high]

    def value(self, options: NDArray[np.int64]) -> float:
        """What is minimized, of a choice of one option a row, fixed part included."""
        return total_of(self.table, self.minimized).of(options[self.row_of_layer])

    def shortfall(self) -> str | None:
        """Why a limit cannot be met whatever the plan, with the numbers; None where each alone can be met."""
        allowed = ~np.isnan(self.objective)
        for name, limit in self.limits.items():
            total = total_of(self.table, name)
            for lower, steps in ((True, total.negative), (False, total)):
                bound = -limit[0] if lower else limit[1]
                if math.isinf(bound):
                    continue
                for step in range(len(steps.cells)):
                    least = least_options(steps.cells[step], self.row_of_layer, allowed)
                    amount_of_step = replace(steps, cells=[steps.cells[step]], fixed=[steps.fixed[step]])
                    if (used := amount_of_step.of(least[self.row_of_layer])) > bound:
                        return self._shortfall(amount_of_step, used, least, limit, lower=lower)
        return None

    def _shortfall(self, total: Total, used: float, options: NDArray[np.int64], limit: Limit, *, lower: bool) -> str:
        sign = -1.0 if lower else 1.0
        each = sign * merged(total.cells[0], self.row_of_layer)[0][np.arange(len(options)), options] / total.divisor
        most = int(np.argmax(each))
        layer = next(x.name for x, at in zip(self.table.layers, self.row_of_layer, strict=True) if at == most)
        parts = [f"{each[most]:.3g} of it in layer {layer!r}"]
        fixed = sign * total.fixed[0] / total.divisor
        if fixed > 0:
            parts.insert(
                0,
                f"{fixed:.6g} of it fixed (what no decision touches, such as norms, biases and layers left alone)",
            )
        undecided = undecided_text(self.table.origin.get("undecided", {})) if fixed > 0 else ""
        return (
            f"{inequality(total.name, limit)} cannot be met: the {'most' if lower else 'least'} any plan uses is "
            f"{sign * used:.6g}, " + " and ".join(parts) + (f"; {undecided}" if undecided else "")
        )

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
        if broken := self.broken(options):
            name, used = broken[0]
            raise SolverError(
                f"{solver} returned a plan that uses {used:.17g} of {name}, {'less' if used < self.limits[name][0] else 'more'} than "
                f"is allowed by {inequality(name, self.limits[name])}"
            )
        value = self.value(options)
        bound = choice.bound
        if self.minimized != "sensitivity":
            total = total_of(self.table, self.minimized)
            bound = (bound + total.fixed[0]) / total.divisor
        slack = 1e-9 * max(abs(value), float(np.abs(self.objective[rows, options]).max()))
        if bound > value + slack:
            raise SolverError(f"{solver} claims that no plan is below {bound:.17g}, its own has {value:.17g}")
        bound = value if choice.status is Status.OPTIMAL else min(bound, value)
        usage = usage_of(self.table, options[self.row_of_layer])
        sensitivity = usage.pop("sensitivity")
        gap = relative_gap(value, bound)
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
            {name: written(limit) for name, limit in self.limits.items()},
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
    """Amounts of one column a layer: every resource, average and effective bits where they are known, and `sensitivity`."""
    return {total.name: total.of(options) for total in totals_of(table)}


def uniform(table: CostTable) -> list[tuple[str, dict[str, float]]]:
    """The plans of `uniform_options`: name and totals as in `usage_of`."""
    rows = _rows(table.layers)
    allowed = ~np.isnan(merged(table.sensitivity, rows)[0])
    if not allowed.any(axis=1).all():
        return []
    every = uniform_options(allowed, table.precisions)
    return [(name, usage_of(table, options[rows])) for name, options in every.items()]


def uniform_options(allowed: NDArray[np.bool_], precisions: Sequence[Precision]) -> dict[str, NDArray[np.int64]]:
    """Name -> the plan (G,) that gives every row the same precision.

    A row that may not have it, pinned by the user or refused by a target, takes the next wider option that it has, else its widest, and the
    name says `where allowed`. Precisions that less than half of the rows may have are left out.

    >>> from mpsearch import precisions
    >>> for name, options in uniform_options(np.array([[True, True, False]] * 2 + [[False, False, True]]), precisions("w2 w4 w8")).items():
    ...     print(name, options)
    w2 where allowed [0 0 2]
    w4 where allowed [1 1 2]
    """
    bits = np.array([[p.weight_bits, p.activation_bits] for p in precisions])
    plans: dict[str, NDArray[np.int64]] = {}
    for column, precision in enumerate(precisions):
        can = allowed[:, column]
        if 2 * can.sum() < len(can):
            continue
        wider = (bits >= bits[column]).all(axis=1)
        order = np.lexsort((np.arange(len(bits)), bits[:, 1], bits[:, 0]))  # the narrowest first
        options = np.full(len(can), column)
        for row in np.flatnonzero(~can):
            having = [int(p) for p in order if allowed[row, p]]
            options[row] = next((p for p in having if wider[p]), having[-1])
        if not any(np.array_equal(options, other) for other in plans.values()):
            plans[str(precision) if can.all() else f"{precision} where allowed"] = options
    return plans


def attainable(table: CostTable) -> dict[str, tuple[float, float]]:
    """Least and most use of each resource by any plan, fixed part included; of a peak the least is a lower bound.

    Layers of a group share a precision. Where a group has none in common there is no plan: inf and -inf.
    """
    rows = _rows(table.layers)
    allowed = ~np.isnan(merged(table.sensitivity, rows)[0])
    if not allowed.any(axis=1).all():
        return dict.fromkeys(table.resources, (math.inf, -math.inf))
    ranges = {}
    for name in table.resources:
        total = total_of(table, name)
        steps = [replace(total, cells=[c], fixed=[f]) for c, f in zip(total.cells, total.fixed, strict=True)]
        ends = [
            [step.of(least_options(sign * step.cells[0], rows, allowed)[rows]) for step in steps]
            for sign in (1.0, -1.0)
        ]
        ranges[name] = (max(ends[0]), max(ends[1]))
    return ranges


def least_options(cells: Array, row_of_layer: NDArray[np.int64], allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(G,) the allowed option of each row that uses least, to the last bit."""
    high, low = merged(cells, row_of_layer)
    high = np.where(allowed, high, np.inf)
    return np.asarray(np.where(high == high.min(axis=1)[:, None], low, np.inf).argmin(axis=1))


def _rows(layers: tuple[Layer, ...]) -> NDArray[np.int64]:
    if not any(layer.group for layer in layers):
        return np.arange(len(layers))
    rows: dict[tuple[str, str], int] = {}
    return np.array([rows.setdefault(layer.decision, len(rows)) for layer in layers], np.int64)


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
