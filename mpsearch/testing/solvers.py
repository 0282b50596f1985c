"""The contract of a solver, checked on small adversarial tables that a plain loop enumerates."""

import inspect
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.solution import Choice, Solver, Status
from mpsearch.core.table import Interactions
from mpsearch.errors import SolverError

Floats = NDArray[np.float64]

_SECONDS = 60.0  # for one table of at most 6 x 5; a solver that cycles never returns


def check_solver(solver: Solver, exact: bool, *, tables: int = 200, seed: int = 0) -> None:
    """Hold a solver to the contract of `mpsearch.core.solution.Solver` on small adversarial tables.

    Each table is enumerated by a plain loop. For every solver: limits kept in exact arithmetic, `OPTIMAL` and
    `INFEASIBLE` only where true, bounds (also those recomputed from the multipliers) below the optimum,
    arrays untouched, the same answer twice. For an exact solver also: the optimum always, whether the scores
    are scaled by 10^k, rows permuted, a constant added to a row or an option duplicated, and never a worse
    one for a larger budget. Interactions are checked where `choose` takes them. The tables hold opposing
    resources, ties, a single layer, a single option, zero rows, limits met exactly, options not allowed,
    sensitivities from 1e-12 to 1e6 and below 0, sizes up to 1e12, budgets missed by one unit, and 0 to 3
    resources.

    A solver may refuse with `SolverError` what it does not do; at most three tables in four.

    Args:
        solver: an instance with the settings to check.
        exact: whether it claims the optimum.
        tables: how many tables; the kinds take turns.
        seed: of the tables.

    Raises:
        AssertionError: with what was expected, what came, and the table.

    >>> from mpsearch.solvers import BruteForce
    >>> check_solver(BruteForce(), exact=True, tables=17)
    """
    rng = np.random.default_rng(seed)
    takes_interactions = "interactions" in inspect.signature(solver.choose).parameters
    refused = 0
    for number, table in enumerate(_tables(tables, rng)):
        if takes_interactions and number % 5 == 4:
            table = table.with_interactions(rng)
        optimum, options = table.optimum()
        try:
            choice = _answer(solver, table)
        except SolverError:
            refused += 1
            continue
        _check_choice(choice, table, optimum, options, exact)
        again = _answer(solver, table)
        _hold(_same(choice, again), f"{choice} and then {again} on the same table", table)
        if exact and optimum is not None and options is not None:
            _check_relation(solver, table, optimum, options, number, rng)
    assert 4 * refused <= 3 * tables, f"{solver} refused {refused} of {tables} tables"


@dataclass(frozen=True)
class _Table:
    """One instance, with the kind of adversary it is."""

    kind: str
    sensitivity: Floats
    usage: Floats
    limits: Floats
    interactions: Interactions | None = None

    def value(self, options: tuple[int, ...] | NDArray[np.int64]) -> float:
        cells = [float(self.sensitivity[row, option]) for row, option in enumerate(options)]
        return math.fsum(cells) + (self.interactions.total(np.array(options)) if self.interactions else 0.0)

    def fits(self, options: tuple[int, ...] | NDArray[np.int64]) -> bool:
        return all(
            math.fsum(float(use[row, option]) for row, option in enumerate(options)) <= limit
            for use, limit in zip(self.usage, self.limits, strict=True)
        )

    def optimum(self) -> tuple[float | None, tuple[int, ...] | None]:
        """Least value of a plan within the limits, and the plan, by enumeration; None where there is no plan."""
        allowed = [np.flatnonzero(~np.isnan(row)).tolist() for row in self.sensitivity]
        best: tuple[float | None, tuple[int, ...] | None] = (None, None)
        for options in itertools.product(*allowed):
            if self.fits(options):
                value = self.value(options)
                if best[0] is None or value < best[0]:
                    best = (value, options)
        return best

    def tolerance(self, options: tuple[int, ...]) -> float:
        """1e-9 of what the plan costs above the row minima, and the rounding of the numbers themselves."""
        lowest = np.nanmin(self.sensitivity, axis=1)
        above = self.value(options) - math.fsum(lowest.tolist())
        size = math.fsum(np.nanmax(np.abs(self.sensitivity), axis=1).tolist())
        if self.interactions is not None:
            above += math.fsum(np.abs(self.interactions.value).tolist())
        return 1e-9 * abs(above) + 1e-14 * size * (above > 0) + 1e-15 * math.fsum(np.abs(lowest).tolist())

    def with_interactions(self, rng: np.random.Generator) -> "_Table":
        rows, columns = self.sensitivity.shape
        cells = list(itertools.product(range(rows), range(columns)))
        pairs = [(a, b) for a, b in itertools.combinations(cells, 2) if a[0] != b[0] and rng.random() < 0.5]
        scale = float(np.nanmax(np.abs(self.sensitivity)))
        value = rng.normal(0, 0.3 * scale, len(pairs))
        first, second = (np.array([pair[side] for pair in pairs]).reshape(-1, 2) for side in (0, 1))
        return replace(self, interactions=Interactions(first, second, value))

    def __str__(self) -> str:
        return (
            f"table ({self.kind}):\nsensitivity = {self.sensitivity.tolist()}\nusage = {self.usage.tolist()}\n"
            f"limits = {self.limits.tolist()}\ninteractions = {self.interactions}"
        )


_KINDS = (
    "plain",
    "ties",
    "one layer",
    "one option",
    "zero row",
    "limits met exactly",
    "not allowed",
    "scores near 1e-12",
    "scores near 1e6",
    "scores from 1e-12 to 1e6",
    "negative",
    "sizes to 1e12",
    "missed by one unit",
    "opposing resources",
    "seconds",
    "equal layers",
    "no limits",
)


def _tables(count: int, rng: np.random.Generator) -> Iterator[_Table]:
    """`count` random tables of 1 to 6 rows, 1 to 4 options and 0 to 3 resources; the kinds take turns."""
    for number in range(count):
        kind = _KINDS[number % len(_KINDS)]
        rows = 1 if kind == "one layer" else int(rng.integers(1, 7))
        columns = 1 if kind == "one option" else int(rng.integers(1, 5))
        resources = 0 if kind == "no limits" else int(rng.choice([1, 1, 1, 2, 2, 3]))
        sensitivity = np.sort(rng.lognormal(0, 1.5, (rows, columns)), axis=1)[:, ::-1].copy()
        sizes = rng.integers(1, 60, (rows, 1)) * rng.integers(1, 4, (resources, 1, 1))
        usage = (sizes * np.cumsum(rng.integers(1, 5, columns))).astype(float)
        if kind == "ties":
            sensitivity = rng.integers(0, 3, (rows, columns)).astype(float)
            usage = rng.integers(0, 3, (resources, rows, columns)).astype(float)
        elif kind == "zero row":
            sensitivity[rng.integers(rows)] = 0.0
            usage[:, rng.integers(rows)] = 0.0
        elif kind == "not allowed":
            banned = rng.random((rows, columns)) < 0.4
            banned[np.arange(rows), rng.integers(0, columns, rows)] = False
            sensitivity[banned] = np.nan
            usage[:, banned] = np.nan
        elif kind == "scores near 1e-12":
            sensitivity *= 1e-12
        elif kind == "scores near 1e6":
            sensitivity *= 1e6
        elif kind == "scores from 1e-12 to 1e6":
            sensitivity *= 10.0 ** rng.integers(-12, 7, (rows, 1))
        elif kind == "negative":
            sensitivity -= rng.lognormal(0, 1.5, (rows, 1))
        elif kind in ("sizes to 1e12", "missed by one unit"):
            usage = np.round(usage * 10.0 ** rng.uniform(0, 9)) + rng.integers(0, 3, usage.shape)
        elif kind == "opposing resources":
            usage[1:] = usage[1:, :, ::-1]
        elif kind == "seconds":
            usage = usage * rng.lognormal(0, 0.3, usage.shape) * 1e-6
        elif kind == "equal layers":
            sensitivity[:], usage[:] = sensitivity[0], usage[:, :1]
        yield _Table(kind, sensitivity, usage, _limits(kind, sensitivity, usage, rng))


def _limits(kind: str, sensitivity: Floats, usage: Floats, rng: np.random.Generator) -> Floats:
    """Those that a random plan meets exactly, or limits anywhere between too little and more than enough."""
    least, most = np.nanmin(usage, axis=2).sum(axis=1), np.nanmax(usage, axis=2).sum(axis=1)
    if kind == "missed by one unit":
        return np.asarray(least - 1)
    if kind in ("limits met exactly", "sizes to 1e12", "seconds") or rng.random() < 0.3:
        options = [rng.choice(np.flatnonzero(~np.isnan(row))) for row in sensitivity]
        return np.array([math.fsum(use[np.arange(len(options)), options].tolist()) for use in usage])
    limits = least + rng.uniform(-0.1, 1.1, len(usage)) * (most - least)
    return np.asarray(np.floor(limits) if kind != "seconds" else limits)


def _answer(solver: Solver, table: _Table) -> Choice:
    """`choose` on read-only arrays, in a thread that is given up on after a time."""
    arrays = [table.sensitivity.copy(), table.usage.copy(), table.limits.copy()]
    for array in arrays:
        array.flags.writeable = False
    keywords: dict[str, Any] = {} if table.interactions is None else {"interactions": table.interactions}
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(solver.choose(*arrays, **keywords))
        except BaseException as error:  # raised again in the caller's thread
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    _hold(bool(result), f"no answer in {_SECONDS:.0f} s", table)
    if isinstance(result[0], SolverError):
        raise result[0]
    if isinstance(result[0], BaseException):
        raise AssertionError(f"{result[0]!r} raised\n{table}") from result[0]
    before = (table.sensitivity, table.usage, table.limits)
    same = all(np.array_equal(a, b, equal_nan=True) for a, b in zip(arrays, before, strict=True))
    _hold(same, "the arrays were changed", table)
    answer: Choice = result[0]
    _hold(isinstance(answer, Choice), f"{answer!r} is no Choice", table)
    return answer


def _check_choice(
    choice: Choice, table: _Table, optimum: float | None, best: tuple[int, ...] | None, exact: bool
) -> None:
    """One answer against the enumeration."""
    status, options = choice.status, choice.options
    with_plan = status in (Status.OPTIMAL, Status.FEASIBLE)
    _hold(with_plan == (options is not None), f"status {status} with options {options}", table)
    _hold(not math.isnan(choice.bound), "bound is nan", table)
    if options is not None:
        rows, columns = table.sensitivity.shape
        _hold(options.shape == (rows,), f"options of shape {options.shape}, expected ({rows},)", table)
        _hold(np.issubdtype(options.dtype, np.integer), f"options are {options.dtype}, expected integers", table)
        _hold(bool(((options >= 0) & (options < columns)).all()), f"options {options} outside the table", table)
        chosen = table.sensitivity[np.arange(rows), options]
        _hold(not np.isnan(chosen).any(), f"options {options} hold one that is not allowed", table)
        _hold(table.fits(options), f"options {options} break a limit", table)
    if optimum is None or best is None:
        _hold(not with_plan, f"{choice}, but no plan meets the limits", table)
        _hold(not exact or status is Status.INFEASIBLE, f"status {status}, expected infeasible", table)
        return
    margin = table.tolerance(best)
    expected = f"expected {optimum!r} of {best}"
    _hold(status is not Status.INFEASIBLE, f"status infeasible, {expected}", table)
    _hold(choice.bound <= optimum + margin, f"bound {choice.bound!r} above the optimum, {expected}", table)
    if choice.multipliers is not None:
        recomputed = _lagrangian(table, choice.multipliers)
        _hold(
            recomputed <= optimum + margin,
            f"multipliers {choice.multipliers} prove {recomputed!r}, {expected}",
            table,
        )
    _hold(not exact or status is Status.OPTIMAL, f"status {status}, expected optimal, {expected}", table)
    if status is Status.OPTIMAL and options is not None:
        value = table.value(options)
        _hold(value <= optimum + margin, f"{value!r} of {options} is called optimal, {expected}", table)


def _lagrangian(table: _Table, multipliers: Floats) -> float:
    """Bound that the multipliers prove, computed anew, less its own rounding."""
    _hold(multipliers.shape == table.limits.shape, f"multipliers of shape {multipliers.shape}", table)
    _hold(bool((multipliers >= 0).all()), f"negative multipliers {multipliers}", table)
    priced = table.sensitivity + np.tensordot(multipliers, table.usage, axes=1)
    paid = multipliers * table.limits
    terms = [*np.nanmin(priced, axis=1).tolist(), *(-paid).tolist()]
    if table.interactions is not None:
        return -math.inf  # the formula knows no pairs
    magnitude = math.fsum(abs(term) for term in terms) + float(
        np.nansum(np.abs(multipliers) @ np.nanmax(np.abs(table.usage), 2))
    )
    return math.fsum(terms) - 1e-14 * magnitude


def _check_relation(
    solver: Solver,
    table: _Table,
    optimum: float,
    best: tuple[int, ...],
    number: int,
    rng: np.random.Generator,
) -> None:
    """One change of the table, of five in turn, after which the optimum is known."""
    rows, columns = table.sensitivity.shape
    order, row, factor = rng.permutation(rows), int(rng.integers(rows)), 10.0 ** int(rng.integers(-12, 13))
    shift = float(rng.normal() * np.nanmax(np.abs(table.sensitivity)))
    plain = replace(table, interactions=None)
    changes: list[tuple[str, _Table, Callable[[NDArray[np.int64]], Any], float]] = [
        (f"scores x {factor:.0e}", replace(plain, sensitivity=plain.sensitivity * factor), lambda x: x, 0.0),
        (
            f"rows in order {order}",
            replace(plain, sensitivity=plain.sensitivity[order], usage=plain.usage[:, order]),
            lambda x: x[np.argsort(order)],
            0.0,
        ),
        (
            f"{shift!r} added to row {row}",
            replace(plain, sensitivity=plain.sensitivity + shift * (np.arange(rows) == row)[:, None]),
            lambda x: x,
            4e-16 * abs(shift) * rows,
        ),
        (
            "last option duplicated",
            replace(
                plain,
                sensitivity=np.concatenate([plain.sensitivity, plain.sensitivity[:, -1:]], axis=1),
                usage=np.concatenate([plain.usage, plain.usage[:, :, -1:]], axis=2),
            ),
            lambda x: np.minimum(x, columns - 1),
            0.0,
        ),
        (
            "larger limits",
            replace(plain, limits=plain.limits + rng.uniform(0, 1) * np.abs(plain.limits)),
            lambda x: x,
            0.0,
        ),
    ]
    if table.interactions is not None:
        return
    name, changed, back, rounding = changes[number % len(changes)]
    choice = _answer(solver, changed)
    _hold(choice.options is not None, f"{choice} after {name}, expected {optimum!r}", table)
    options = back(np.asarray(choice.options))
    larger = name == "larger limits"
    _hold(larger or table.fits(options), f"{options} breaks a limit after {name}", table)
    value, margin = table.value(options), table.tolerance(best) + rounding
    _hold(value <= optimum + margin, f"{value!r} of {options} after {name}, expected {optimum!r}", table)


def _same(one: Choice, other: Choice) -> bool:
    return one.status is other.status and np.array_equal(np.asarray(one.options), np.asarray(other.options))


def _hold(condition: bool, message: str, table: _Table) -> None:
    """Assert, also under `python -O`."""
    if not condition:
        raise AssertionError(f"{message}\n{table}")
