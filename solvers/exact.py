"""The exact solver: Lagrangian dual, then a search among the rows that it leaves in doubt."""

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.solution import Choice, SolverCapabilities, Status
from mpsearch.solvers import lists, milp
from mpsearch.solvers.core import Core
from mpsearch.solvers.feasibility import Floats, Options, fits, least_usage, shifted
from mpsearch.solvers.hull import hull_steps
from mpsearch.solvers.prices import best_prices
from mpsearch.solvers.repair import repaired

_ROWS = 1 << 16  # rows worked on at once: a few MB, whatever the table
_SAMPLE = 1 << 17  # rows that a large table's price is first guessed from
_BEAM = 256  # partial plans of the first, quick search
_FEW = 256  # partial plans with several resources before branch and cut takes over
_NOISE = 1e-8  # of the damage: rounding beyond that proves nothing
_WIDEST = 4096  # rows in doubt that the search takes on


@dataclass(frozen=True)
class Exact:
    """Multiple-choice knapsack, solved and proven, or solved with a certified gap.

    With prices m >= 0 for the resources, for every plan x within the limits b

        sum c(x) >= sum_l min_p (c + m w)[l, p] - m b,

    and the best prices make the right side the bound of the linear program. For one resource these are read off the
    sorted slopes of the rows' convex hulls (Sinha and Zoltners, Operations Research 27 (1979) 503-515); for several, from cutting
    planes (Kelley, 1960). A plan is better than a known one only if its reduced costs sum to less than the gap, which leaves few rows in
    doubt: these are searched by dynamic programming (Pisinger, EJOR 83 (1995) 394-410). Where the search outgrows `max_states` or the
    time, the plan comes back as `FEASIBLE` with the bound that is proven.

    Usage in multiples of a power of two, up to 2^53 of them, is summed exactly; other usage is summed with its rounding error on the safe
    side, and plans at the very limit are decided by `math.fsum`. Large tables are read in blocks: memory above the table is some tens of
    bytes a row.

    Attributes:
        time_limit_s: of the search among the rows in doubt.
        gap: relative gap that is near enough; 0 asks for the proof.
        max_states: partial plans kept; some 50 bytes each, and 6 more for each row in doubt.
        max_nodes: of branch and cut, where there are several limits. With `time_limit_s=math.inf` the two counts alone end the search,
            and the same table gives the same plan however busy the machine is.

    >>> choice = Exact().choose(np.array([[4.0, 1.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0]))
    >>> choice.options.tolist(), str(choice.status)
    ([1, 0], 'optimal')
    """

    capabilities: ClassVar[SolverCapabilities] = SolverCapabilities(exact=True)

    time_limit_s: float = 60.0
    max_states: int = 200_000
    gap: float = 0.0
    max_nodes: int = 1_000_000

    def choose(self, sensitivity: Floats, usage: Floats, limits: Floats) -> Choice:
        """See `Solver.choose`."""
        start = time.perf_counter()
        if not len(limits):
            options = _least_cost(sensitivity)
            return Choice(options, Status.OPTIMAL, _total(sensitivity, options), np.zeros(0))
        bounded = limits < math.inf
        if not bounded.all():
            choice = self.choose(sensitivity, usage[bounded], limits[bounded])
            if choice.multipliers is None:
                return choice
            prices = np.zeros(len(limits))
            prices[bounded] = choice.multipliers
            return dataclasses.replace(choice, multipliers=prices)
        usage, limits = shifted(sensitivity, usage, limits)
        for use, limit in zip(usage, limits, strict=True):
            if _least(sensitivity, use) > limit:
                return Choice(None, Status.INFEASIBLE, math.inf)
        limits, blur = _tightened(sensitivity, usage, limits)
        if len(limits) == 1:
            prices, fallback = _one_price(sensitivity, usage[0], float(limits[0]))
        else:
            usage = np.where(np.isnan(sensitivity), 0.0, usage)  # it may be nan where it does not matter
            prices, fallback = best_prices(sensitivity, usage, limits), None
        return self._search(sensitivity, usage, limits, blur, prices, fallback, start)

    def _search(
        self,
        sensitivity: Floats,
        usage: Floats,
        limits: Floats,
        blur: Floats,
        prices: Floats,
        fallback: Options | None,
        start: float,
    ) -> Choice:
        base, bound, rounding = _priced(sensitivity, usage, limits, prices)
        if bound > _most(sensitivity):
            return Choice(None, Status.INFEASIBLE, math.inf, prices)
        slack = np.array([limit - _total(use, base) for use, limit in zip(usage, limits, strict=True)]) + blur
        plan = base if fits(base, usage, limits) else fallback
        if plan is None:
            plan = repaired(sensitivity, prices, usage, limits, base)
        excess = math.inf if plan is None else _total(sensitivity, plan) - bound
        sharp = rounding <= _NOISE * _size(sensitivity)  # else what is proven drowns in the rounding of prices
        deadline = start + self.time_limit_s
        stats: dict[str, Any] = {"rows_in_doubt": 0, "states": 0, "nodes": 0}
        proven = 0.0  # excess that no plan can be below
        rows, stats["rows_in_doubt"] = _doubtful(sensitivity, usage, prices, base, excess + rounding)
        # lists of states with several resources hardly dominate each other: branch and cut takes over early
        for states in (_BEAM, self.max_states) if len(limits) == 1 else (_FEW, 0):
            enough = max(rounding, self.gap * abs(bound + excess) if math.isfinite(excess) else 0.0)
            if excess - proven <= enough or (proven and time.perf_counter() > deadline):
                break
            rows = rows[_cheapest(sensitivity, usage, prices, rows) <= excess + rounding]
            doubt, rest = rows[:_WIDEST], rows[_WIDEST:]
            core = _core(sensitivity, usage, prices, base, doubt, excess + rounding)
            if states:
                outcome = lists.search(
                    core, slack, blur, prices, excess + rounding, usage, limits, max_states=states, deadline=deadline
                )
            else:
                seconds = deadline - time.perf_counter()
                outcome = milp.search(
                    core,
                    slack,
                    prices,
                    excess + rounding,
                    usage,
                    limits,
                    time_limit_s=seconds,
                    max_nodes=self.max_nodes,
                )
            stats["states" if states else "nodes"] = outcome.size
            if outcome.options is not None:
                value = _total(sensitivity, outcome.options) - bound
                if value < excess:
                    plan, excess = outcome.options, value
            outside = float(_cheapest(sensitivity, usage, prices, rest[:1])[0]) if len(rest) else math.inf
            reached = min(outcome.bound, outside)
            if plan is None and math.isinf(reached):
                return Choice(None, Status.INFEASIBLE, math.inf, prices, stats)
            proven = max(proven, min(reached, excess))
        if plan is None:
            return Choice(None, Status.UNSOLVED, bound + proven - rounding, prices, stats)
        value = _total(sensitivity, plan)
        if sharp and excess - proven <= rounding:
            return Choice(plan, Status.OPTIMAL, value, prices, stats)
        return Choice(plan, Status.FEASIBLE, min(bound + proven - rounding, value), prices, stats)


def _blocks(count: int) -> list[slice]:
    return [slice(at, min(at + _ROWS, count)) for at in range(0, count, _ROWS)]


def _total(table: Floats, options: Options) -> float:
    return math.fsum(
        math.fsum(table[block][np.arange(block.stop - block.start), options[block]].tolist())
        for block in _blocks(len(options))
    )


def _least(sensitivity: Floats, use: Floats) -> float:
    """Correctly rounded sum of the least allowed use of each row."""
    parts = (least_usage(~np.isnan(sensitivity[b]), use[None, b])[0] for b in _blocks(len(use)))
    if len(use) <= _ROWS:
        return math.fsum(next(parts).tolist())
    return math.fsum(x for part in parts for x in part.tolist())


def _most(sensitivity: Floats) -> float:
    """More than any plan costs."""
    sums = [np.nanmax(sensitivity[b], axis=1) for b in _blocks(len(sensitivity))]
    return sum(float(s.sum()) for s in sums) + 8 * np.finfo(float).eps * sum(float(np.abs(s).sum()) for s in sums)


def _size(sensitivity: Floats) -> float:
    """What the rows can cost, each at its largest, whatever the sign."""
    return sum(float(np.nanmax(np.abs(sensitivity[b]), axis=1).sum()) for b in _blocks(len(sensitivity)))


def _least_cost(sensitivity: Floats) -> Options:
    columns = np.empty(len(sensitivity), np.int64)
    for block in _blocks(len(columns)):
        columns[block] = np.nanargmin(sensitivity[block], axis=1)
    return columns


def _price_block(sensitivity: Floats, usage: Floats, prices: Floats, block: slice) -> Floats:
    """C + m w of a block of rows; inf where not allowed."""
    priced = sensitivity[block].copy()
    for price, use in zip(prices, usage, strict=True):
        if price:
            priced += price * use[block]
    np.copyto(priced, np.inf, where=np.isnan(priced))
    return priced


def _priced(sensitivity: Floats, usage: Floats, limits: Floats, prices: Floats) -> tuple[Options, float, float]:
    """The least-priced plan (of equals the one of less use), the bound that the prices prove, and its rounding error."""
    base = np.empty(len(sensitivity), np.int64)
    sums, sizes = [], []
    for block in _blocks(len(base)):
        priced = _price_block(sensitivity, usage, prices, block)
        chosen = priced.argmin(axis=1)
        rows = np.arange(len(chosen))
        base[block] = chosen
        sums.append(math.fsum(priced[rows, chosen].tolist()))
        sizes.append(float(np.abs(sensitivity[block][rows, chosen]).sum()))
        for price, use in zip(prices, usage, strict=True):
            sizes.append(price * float(np.abs(use[block][rows, chosen]).sum()))
    paid = [-price * limit for price, limit in zip(prices.tolist(), limits.tolist(), strict=True) if price]
    bound = math.fsum([*sums, *paid])
    rounding = 8 * np.finfo(float).eps * (math.fsum(sizes) + math.fsum(map(abs, paid)))
    return base, bound - rounding, 2 * rounding


def _tightened(sensitivity: Floats, usage: Floats, limits: Floats) -> tuple[Floats, Floats]:
    """The limits that sums can really reach, and the rounding error of sums; none for multiples of a power of two, 2^53 of them at most.

    A row's uses differ by multiples of their common divisor from its least, so the sum does too: a limit between two reachable
    sums is lowered to the lower one.
    """
    tight, blur = limits.astype(np.float64), np.zeros(len(limits))
    for r, (use, limit) in enumerate(zip(usage, limits.tolist(), strict=True)):
        if not math.isfinite(limit):
            continue
        parts = (np.where(np.isnan(sensitivity[block]), 0.0, use[block]) for block in _blocks(len(use)))
        most = sum(float(np.abs(part).max(axis=1).sum()) for part in parts)
        unit = 2.0 ** max(math.frexp(most)[1] - 53, -1022)
        least, divisor, whole = 0.0, 0, True
        for block in _blocks(len(use)):
            part = np.where(np.isnan(sensitivity[block]), 0.0, use[block]) / unit
            whole = whole and bool((part == np.floor(part)).all())
            if not whole:
                break
            low = least_usage(~np.isnan(sensitivity[block]), use[None, block])[0] / unit
            least += float(low.sum())
            if divisor != 1:
                above = np.where(np.isnan(sensitivity[block]), 0.0, part - low[:, None])
                divisor = math.gcd(divisor, int(np.gcd.reduce(above.astype(np.int64), axis=None)))
        if whole and math.isfinite(limit / unit):
            tight[r] = (least + (math.floor(limit / unit) - least) // (divisor or 1) * (divisor or 1)) * unit
        else:
            blur[r] = 8 * np.finfo(float).eps * (most + abs(limit))
    return tight, blur


def _doubtful(sensitivity: Floats, usage: Floats, prices: Floats, base: Options, excess: float) -> tuple[Options, int]:
    """Rows that a plan with less excess may change, the least reduced cost first; `_WIDEST` + 1 of them, and how many in all."""
    where, cost, count = np.empty(0, np.int64), np.empty(0), 0
    for block in _blocks(len(base)):
        priced = _price_block(sensitivity, usage, prices, block)
        rows = np.arange(len(priced))
        least = priced[rows, base[block]].copy()
        priced[rows, base[block]] = np.inf
        second = priced.min(axis=1) - least
        at = np.flatnonzero((second <= excess) & np.isfinite(second))
        count += len(at)
        where, cost = np.append(where, at + block.start), np.append(cost, second[at])
        order = np.argsort(cost, kind="stable")[: _WIDEST + 1]
        where, cost = where[order], cost[order]
    return where, count


def _cheapest(sensitivity: Floats, usage: Floats, prices: Floats, rows: Options) -> Floats:
    """Least reduced cost of a change in each of `rows`."""
    if not len(rows) or sensitivity.shape[1] == 1:
        return np.full(len(rows), np.inf)
    priced = _price_block(sensitivity[rows], usage[:, rows], prices, slice(0, len(rows)))
    two = np.partition(priced, 1, axis=1)[:, :2]
    return np.asarray(two[:, 1] - two[:, 0])


def _core(sensitivity: Floats, usage: Floats, prices: Floats, base: Options, rows: Options, excess: float) -> Core:
    """The options of `rows` that a plan with less excess may take."""
    priced = _price_block(sensitivity[rows], usage[:, rows], prices, slice(0, len(rows)))
    shifts, costs, columns = [], [], []
    for i, row in enumerate(rows.tolist()):
        reduced = np.maximum(priced[i] - priced[i, base[row]], 0.0)
        others = np.flatnonzero(reduced <= excess)
        column = np.append(base[row], others[others != base[row]])
        shifts.append((usage[:, row, column] - usage[:, row, base[row], None]).T)
        costs.append(reduced[column])
        columns.append(column)
    return Core(base, rows, columns, shifts, costs)


def _one_price(sensitivity: Floats, use: Floats, limit: float) -> tuple[Floats, Options]:
    """The best price of one resource, and the plan of the linear program rounded down (it keeps the limit)."""
    count = len(use)
    if count <= 2 * _SAMPLE:
        rows = np.arange(count)
        price, options = _break(sensitivity, use, limit)
        return np.array([price]), options
    step = -(-count // _SAMPLE)
    guess, _ = _break(sensitivity[::step], use[::step], limit / count * len(use[::step]))
    low, high = _bracket(sensitivity, use, limit, guess)
    under, over = _at_price(sensitivity, use, low), _at_price(sensitivity, use, high)  # cheap price: more use
    rows = np.flatnonzero(under != over)
    options = over.astype(np.int64)
    if not len(rows):
        return np.array([high]), options
    rest = limit - (_total(use, options) - math.fsum(use[rows, options[rows]].tolist()))
    price, part = _break(sensitivity[rows], use[rows], rest)
    options[rows] = part
    return np.array([min(max(price, low), high)]), options


def _at_price(sensitivity: Floats, use: Floats, price: float) -> NDArray[np.int16]:
    columns = np.empty(len(use), np.int16)  # half of the memory above a large table would be these
    for block in _blocks(len(use)):
        columns[block] = _price_block(sensitivity, use[None], np.array([price]), block).argmin(axis=1)
    return columns


def _bracket(sensitivity: Floats, use: Floats, limit: float, guess: float) -> tuple[float, float]:
    """Prices at which the least-priced plan uses more than the limit, and no more."""

    def fits_at(price: float) -> bool:
        used = 0.0
        for block in _blocks(len(use)):
            chosen = _price_block(sensitivity, use[None], np.array([price]), block).argmin(axis=1)
            used += float(use[block][np.arange(len(chosen)), chosen].sum())
        return used <= limit

    if guess <= 0:
        guess = np.finfo(float).tiny
    width = 1.003
    if fits_at(guess):
        high, low = guess, guess / width
        while low > np.finfo(float).tiny and fits_at(low):
            high, width = low, width**3
            low = high / width
        return (low if low > np.finfo(float).tiny else 0.0), high
    low, high = guess, guess * width
    while not fits_at(high):
        low, width = high, width**3
        high = low * width
    return low, high


def _break(sensitivity: Floats, use: Floats, limit: float) -> tuple[float, Options]:
    """Price at which the sorted hull steps meet the limit, and the plan of all steps before it."""
    steps = hull_steps(sensitivity, use)
    options = steps.start
    order = np.argsort(steps.slope, kind="stable")
    used = math.fsum(use[np.arange(len(use)), options].tolist()) + np.cumsum(steps.more_use[order])
    taken = int(np.searchsorted(used, limit, side="right"))
    options[steps.row[order[:taken]]] = steps.option[order[:taken]]
    price = -float(steps.slope[order[taken]]) if taken < len(order) else 0.0
    while taken and math.fsum(use[np.arange(len(use)), options].tolist()) > limit:  # the running sum was rounded
        taken -= 1
        options = hull_steps(sensitivity, use).start
        options[steps.row[order[:taken]]] = steps.option[order[:taken]]
    return price, options
