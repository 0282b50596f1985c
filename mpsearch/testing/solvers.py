"""The contract of a solver, checked on small adversarial tables that a plain loop enumerates."""

import functools
import inspect
import itertools
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.solution import Choice, Solver, Status, capabilities_of, takes_interactions
from mpsearch.core.table import Interactions
from mpsearch.errors import SolverError
from mpsearch.testing.named_checks import Checks, run_all

Floats = NDArray[np.float64]

_SECONDS = 60.0  # for one table of at most 6 x 5; a solver that cycles never returns


def check_solver(solver: Solver, exact: bool | None = None, *, tables: int = 200, seed: int = 0) -> None:
    """Run all of `solver_checks` and tell every one that fails.

    Args:
        solver: an instance with the settings to check.
        exact: whether it must prove the optimum; by default, whether it declares so.
        tables: how many tables; the kinds take turns.
        seed: of the tables.

    Raises:
        AssertionError: with what was expected, what came, and the table, for each failing check.

    >>> from mpsearch.solvers import BruteForce
    >>> check_solver(BruteForce(), tables=17)
    """
    run_all(repr(solver), solver_checks(solver, exact, tables=tables, seed=seed))


def solver_checks(solver: Solver, exact: bool | None = None, *, tables: int = 200, seed: int = 0) -> Checks:
    """The contract of `mpsearch.core.solution.Solver` as named checks, on small adversarial tables that a plain loop enumerates.

    For every solver: it declares what it takes, answers every table or refuses it with `SolverError` (at most three tables in four),
    leaves the arrays as they are, gives the same answer twice, keeps the limits in exact arithmetic, says `OPTIMAL` and `INFEASIBLE` only
    where true, and its bounds (also those recomputed from its multipliers) lie below the optimum. For an exact solver also: the optimum
    always, whether the scores are scaled by 10^k, rows permuted, a constant added to a row or an option duplicated, and never a worse one
    for a larger budget. Where it declares `interactions`, every fifth table has some.

    The tables hold opposing resources, ties, a single layer, a single option, zero rows, limits met exactly, options not allowed,
    sensitivities from 1e-12 to 1e6 and below 0, sizes up to 1e12, budgets missed by one unit, and 0 to 3 resources. Each is enumerated and
    answered once, whichever check asks first.

    Args:
        solver: an instance with the settings to check.
        exact: whether it must prove the optimum; by default, whether it declares so.
        tables: how many tables; the kinds take turns.
        seed: of the tables.

    Yields:
        Name and check, a function without arguments that raises AssertionError with what was expected, what came, and the table.

    >>> from mpsearch.solvers import Greedy
    >>> [name for name, check in solver_checks(Greedy())]
    ['declaration', 'answers', 'arrays untouched', 'limits kept', 'status true', 'bound true', 'multipliers true', 'deterministic']
    """
    exact = capabilities_of(solver).exact if exact is None else exact
    answers = _Answers(solver, tables, seed)
    yield "declaration", lambda: _check_declaration(solver)
    yield "answers", answers.check
    yield "arrays untouched", answers.check_arrays
    yield "limits kept", lambda: answers.each(_check_options)
    yield "status true", lambda: answers.each(_check_status)
    yield "bound true", lambda: answers.each(_check_bound)
    yield "multipliers true", lambda: answers.each(_check_multipliers)
    yield "deterministic", lambda: answers.each(_check_again)
    if exact:
        yield "optimum proven", lambda: answers.each(_check_proof)
        for place, name in enumerate(_CHANGES):
            yield f"same optimum, {name}", functools.partial(_check_change, solver, answers, name, place, seed)


@dataclass(frozen=True)
class _Case:
    """A table, its optimum by enumeration, and the answer of a solver, once and again; `fault` is why there is none."""

    table: "_Table"
    optimum: float | None
    best: tuple[int, ...] | None
    choice: Choice | None
    refused: bool = False
    fault: str = ""
    changed: bool = False
    again: "_Case | None" = None

    @property
    def expected(self) -> str:
        """The optimum, in words."""
        return f"expected {self.optimum!r} of {self.best}"


class _Answers:
    """The answers of a solver to all tables, asked for once for all checks, and each a second time right after the first."""

    def __init__(self, solver: Solver, tables: int, seed: int) -> None:
        self.solver, self.tables, self.seed = solver, tables, seed

    @functools.cached_property
    def cases(self) -> list[_Case]:
        """One a table, up to the first that gets no answer in time."""
        rng = np.random.default_rng(self.seed)
        interactions = takes_interactions(self.solver)
        cases = []
        for number, table in enumerate(_tables(self.tables, rng)):
            table = table.with_interactions(rng) if interactions and number % 5 == 4 else table
            case = _case(self.solver, table)
            if case.choice is not None:
                case = replace(case, again=_case(self.solver, table))
            cases.append(case)
            if case.fault.startswith("no answer"):
                break
        return cases

    def check(self) -> None:
        """Every table is answered by a `Choice` or refused, and not too many are refused."""
        for case in self.cases:
            _hold(not case.fault, case.fault, case.table)
        refusals = sum(case.refused for case in self.cases)
        assert 4 * refusals <= 3 * self.tables, f"{self.solver} refused {refusals} of {self.tables} tables"

    def check_arrays(self) -> None:
        """No array that the solver was handed is changed."""
        for case in self.cases:
            _hold(not case.changed, "the arrays were changed", case.table)

    def each(self, check: Callable[[_Case, Choice], None]) -> None:
        """Check every answer."""
        for case in self.cases:
            if case.choice is not None:
                check(case, case.choice)


@dataclass(frozen=True)
class _Table:
    """One instance, with the kind of adversary it is."""

    kind: str
    sensitivity: Floats
    usage: Floats
    limits: Floats
    interactions: Interactions | None = None

    def cells(self, options: tuple[int, ...] | NDArray[np.int64]) -> list[float]:
        return [float(self.sensitivity[row, option]) for row, option in enumerate(options)]

    def value(self, options: tuple[int, ...] | NDArray[np.int64]) -> float:
        return math.fsum(self.cells(options)) + (
            self.interactions.total(np.array(options)) if self.interactions else 0.0
        )

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


def _case(solver: Solver, table: _Table) -> _Case:
    """`choose` on read-only arrays, in a thread that is given up on after a time."""
    optimum, best = table.optimum()
    arrays = [table.sensitivity.copy(), table.usage.copy(), table.limits.copy()]
    for array in arrays:
        array.flags.writeable = False
    keywords: dict[str, Any] = {} if table.interactions is None else {"interactions": table.interactions}
    result: list[Any] = []

    def work() -> None:
        try:
            result.append(solver.choose(*arrays, **keywords))
        except BaseException as error:  # told as the case's fault
            result.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    case = _Case(table, optimum, best, None)
    if not result:
        return replace(case, fault=f"no answer in {_SECONDS:.0f} s")
    before = (table.sensitivity, table.usage, table.limits)
    changed = not all(np.array_equal(a, b, equal_nan=True) for a, b in zip(arrays, before, strict=True))
    case = replace(case, changed=changed)
    if isinstance(result[0], SolverError):
        return replace(case, refused=True)
    if isinstance(result[0], BaseException):
        return replace(case, fault=f"{result[0]!r} raised")
    if not isinstance(result[0], Choice):
        return replace(case, fault=f"{result[0]!r} is no Choice")
    fault = _malformed(result[0], table)
    return replace(case, fault=fault) if fault else replace(case, choice=result[0])


def _malformed(choice: Choice, table: _Table) -> str:
    """What is wrong with the form of an answer; empty where nothing is."""
    options = choice.options
    if (choice.status in (Status.OPTIMAL, Status.FEASIBLE)) != (options is not None):
        return f"status {choice.status} with options {options}"
    if math.isnan(choice.bound):
        return "bound is nan"
    if options is None:
        return ""
    rows, columns = table.sensitivity.shape
    if np.shape(options) != (rows,):
        return f"options of shape {np.shape(options)}, expected ({rows},)"
    if not np.issubdtype(options.dtype, np.integer):
        return f"options are {options.dtype}, expected integers"
    return "" if ((options >= 0) & (options < columns)).all() else f"options {options} outside the table"


def _check_declaration(solver: Solver) -> None:
    takes = "interactions" in inspect.signature(solver.choose).parameters
    declares = capabilities_of(solver).interactions
    assert takes == declares, (
        f"{solver}: choose {'takes' if takes else 'does not take'} interactions, capabilities declare interactions={declares}; "
        f"write capabilities = SolverCapabilities(interactions={takes})"
    )


def _check_options(case: _Case, choice: Choice) -> None:
    options, table = choice.options, case.table
    if options is not None:
        chosen = table.sensitivity[np.arange(len(options)), options]
        _hold(not np.isnan(chosen).any(), f"options {options} hold one that is not allowed", table)
        _hold(table.fits(options), f"options {options} break a limit", table)


def _check_status(case: _Case, choice: Choice) -> None:
    status, options, table = choice.status, choice.options, case.table
    if case.optimum is None or case.best is None:
        _hold(options is None, f"{choice}, but no plan meets the limits", table)
        return
    _hold(status is not Status.INFEASIBLE, f"status infeasible, {case.expected}", table)
    if status is Status.OPTIMAL and options is not None and not np.isnan(table.cells(options)).any():
        value = table.value(options)
        near = value <= case.optimum + table.tolerance(case.best)
        _hold(near, f"{value!r} of {options} is called optimal, {case.expected}", table)


def _check_bound(case: _Case, choice: Choice) -> None:
    if case.optimum is not None and case.best is not None:
        below = choice.bound <= case.optimum + case.table.tolerance(case.best)
        _hold(below, f"bound {choice.bound!r} above the optimum, {case.expected}", case.table)


def _check_multipliers(case: _Case, choice: Choice) -> None:
    if case.optimum is None or case.best is None or choice.multipliers is None:
        return
    proof = _lagrangian(case.table, choice.multipliers)
    below = proof <= case.optimum + case.table.tolerance(case.best)
    _hold(below, f"multipliers {choice.multipliers} prove {proof!r}, {case.expected}", case.table)


def _check_again(case: _Case, choice: Choice) -> None:
    assert case.again is not None
    other = case.again.choice
    answer = other or case.again.fault or "a refusal"
    _hold(other is not None and _same(choice, other), f"{choice} and then {answer} on the same table", case.table)


def _check_proof(case: _Case, choice: Choice) -> None:
    table = case.table
    if case.optimum is None or case.best is None:
        _hold(choice.status is Status.INFEASIBLE, f"status {choice.status}, expected infeasible", table)
        return
    # a sum of pairs may cancel to 0, where nothing is proven relative to it; a bound as near as rounding allows is as good
    near = table.interactions is not None and case.optimum - choice.bound <= table.tolerance(case.best)
    proven = choice.status is Status.OPTIMAL or (choice.status is Status.FEASIBLE and near)
    _hold(proven, f"status {choice.status}, expected optimal, {case.expected}", table)


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


@dataclass(frozen=True)
class _Change:
    """A table changed so that the optimum is known: `back` turns its options into those of the table before."""

    name: str
    table: _Table
    back: Callable[[NDArray[np.int64]], NDArray[np.int64]] = np.asarray
    rounding: float = 0.0
    may_use_more: bool = False


def _scaled(table: _Table, rng: np.random.Generator) -> _Change:
    factor = 10.0 ** int(rng.integers(-12, 13))
    return _Change(f"scores x {factor:.0e}", replace(table, sensitivity=table.sensitivity * factor))


def _permuted(table: _Table, rng: np.random.Generator) -> _Change:
    order = rng.permutation(len(table.sensitivity))
    rows = replace(table, sensitivity=table.sensitivity[order], usage=table.usage[:, order])
    return _Change(f"rows in order {order}", rows, lambda options: options[np.argsort(order)])


def _raised(table: _Table, rng: np.random.Generator) -> _Change:
    rows = len(table.sensitivity)
    row, shift = int(rng.integers(rows)), float(rng.normal() * np.nanmax(np.abs(table.sensitivity)))
    raised = replace(table, sensitivity=table.sensitivity + shift * (np.arange(rows) == row)[:, None])
    return _Change(f"{shift!r} added to row {row}", raised, rounding=4e-16 * abs(shift) * rows)


def _duplicated(table: _Table, rng: np.random.Generator) -> _Change:
    columns = table.sensitivity.shape[1]
    wider = replace(
        table,
        sensitivity=np.concatenate([table.sensitivity, table.sensitivity[:, -1:]], axis=1),
        usage=np.concatenate([table.usage, table.usage[:, :, -1:]], axis=2),
    )
    return _Change("last option duplicated", wider, lambda options: np.minimum(options, columns - 1))


def _loosened(table: _Table, rng: np.random.Generator) -> _Change:
    limits = table.limits + rng.uniform(0, 1) * np.abs(table.limits)
    return _Change("larger limits", replace(table, limits=limits), may_use_more=True)


_CHANGES: dict[str, Callable[[_Table, np.random.Generator], _Change]] = {
    "scores scaled": _scaled,
    "rows permuted": _permuted,
    "a row raised": _raised,
    "an option duplicated": _duplicated,
    "larger limits": _loosened,
}


def _check_change(solver: Solver, answers: _Answers, name: str, place: int, seed: int) -> None:
    """One change of every fifth table, after which the optimum is known."""
    rng = np.random.default_rng([seed, place])
    for number, case in enumerate(answers.cases):
        table = case.table
        if number % len(_CHANGES) != place or case.choice is None or case.optimum is None or case.best is None:
            continue
        if table.interactions is not None:  # the changes know no pairs
            continue
        change = _CHANGES[name](table, rng)
        choice = _case(solver, change.table).choice
        _hold(
            choice is not None and choice.options is not None, f"{choice} after {change.name}, {case.expected}", table
        )
        assert choice is not None
        options = change.back(np.asarray(choice.options))
        _hold(not np.isnan(table.cells(options)).any(), f"{options} is not allowed, after {change.name}", table)
        _hold(change.may_use_more or table.fits(options), f"{options} breaks a limit after {change.name}", table)
        value, margin = table.value(options), table.tolerance(case.best) + change.rounding
        _hold(value <= case.optimum + margin, f"{value!r} of {options} after {change.name}, {case.expected}", table)


def _same(one: Choice, other: Choice) -> bool:
    return one.status is other.status and np.array_equal(np.asarray(one.options), np.asarray(other.options))


def _hold(condition: bool, message: str, table: _Table) -> None:
    """Assert, also under `python -O`."""
    if not condition:
        raise AssertionError(f"{message}\n{table}")
