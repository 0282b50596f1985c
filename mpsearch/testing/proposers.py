"""The contract of a proposer, checked on small problems whose plans can be enumerated."""

import copy
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.budget import Budget
from mpsearch.core.layer import Layer
from mpsearch.core.precision import precisions
from mpsearch.core.problem import Problem
from mpsearch.core.table import CostTable
from mpsearch.estimation.surrogate import Surrogate
from mpsearch.plan_search.proposers import Columns, Posterior, Proposer, Record
from mpsearch.testing.named_checks import Checks

Floats = NDArray[np.float64]

#: Turns that a proposer gets on one problem.
_TURNS = 16
#: Plans in a row that may have been measured before; a search gives up after as many.
_REPEATS = 8
_OPTIONS = precisions("w2 w3 w4 w8")


def proposer_checks(proposer: Proposer, *, problems: int = 18, seed: int = 0) -> Checks:
    """The contract of `mpsearch.plan_search.proposers.Proposer` as named checks, on small random problems.

    They have one or two resources in whole numbers or in fractions, upper and lower limits, refused options, a single decision, one plan
    alone. On each, the proposer gets sixteen turns after the optimum of the table and one other plan, and its plans are measured by a
    damage that is no sum. Each problem is gone through once, whichever check asks first.

    Args:
        proposer: an instance with the settings to check.
        problems: how many; the kinds take turns.
        seed: of the problems.

    Yields:
        Name and check, a function without arguments that raises AssertionError with what was expected and what came.

    >>> from mpsearch.plan_search.proposers import Moves
    >>> [name for name, check in proposer_checks(Moves())][:7]
    ['answers', 'plans', 'options allowed', 'limits kept', 'new plans', 'deterministic', 'no global state']
    """
    runs = _Runs(proposer, problems, seed)
    yield "answers", runs.check_answers
    yield "plans", lambda: runs.each(_check_plan)
    yield "options allowed", lambda: runs.each(_check_allowed)
    yield "limits kept", lambda: runs.each(_check_limits)
    yield "new plans", runs.check_new
    yield "deterministic", runs.check_again
    yield "no global state", runs.check_global_state
    yield "record untouched", runs.check_record
    yield "empty record", runs.check_empty


@dataclass(frozen=True, eq=False)
class _World:
    """A problem, and the damage of its plans.

    Attributes:
        table: whose options are few.
        budget: limits.
        damages: (D, P) of cells; plans do that of their cells, and a fifth more or less.
        seed: of the draws of the proposer, and of what is no sum.
    """

    table: CostTable
    budget: Budget
    damages: Floats
    seed: int

    def record(self) -> Record:
        """A record without a plan."""
        generator = np.random.default_rng(self.seed + 1)
        shape = self.damages.shape
        shifts = generator.normal(size=(*shape, 6, 4)) * 4.0 ** -np.arange(shape[1])[:, None, None]
        logits = generator.normal(size=(6, 4))
        surrogate = Surrogate(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), shifts)
        problem = Problem.of(self.table, self.budget)
        return Record(problem, {"table": self.damages}, np.random.default_rng(self.seed), surrogate=surrogate)

    def damage(self, columns: Columns) -> float:
        """Damage of a plan."""
        total = float(self.damages[np.arange(len(columns)), columns].sum())
        return total * float(np.random.default_rng([self.seed, *columns.tolist()]).uniform(0.8, 1.2))


@dataclass(frozen=True, eq=False)
class _Run:
    """The turns of a proposer on one problem.

    Attributes:
        world: the problem.
        proposals: what came, None included, up to the first that is no plan.
        repeats: most proposals in a row that had been measured before.
        changed: what a turn changed in the record or the posterior; empty for nothing.
        drew: whether a global generator moved.
        fault: an exception in words; empty for none.
    """

    world: _World
    proposals: list[Columns | None] = field(default_factory=list)
    repeats: int = 0
    changed: str = ""
    drew: bool = False
    fault: str = ""


class _Runs:
    """The turns of a proposer on all problems, taken once for all checks."""

    def __init__(self, proposer: Proposer, problems: int, seed: int) -> None:
        self.proposer = proposer
        self.worlds = list(_worlds(problems, seed))

    @functools.cached_property
    def runs(self) -> list[_Run]:
        """One a problem."""
        return [_run(self.proposer, world) for world in self.worlds]

    def each(self, check: Callable[[_World, Record, Columns], None]) -> None:
        """Check every proposal."""
        for run in self.runs:
            record = run.world.record()
            for columns in run.proposals:
                if columns is not None:
                    check(run.world, record, columns)

    def check_answers(self) -> None:
        """Nothing is raised, and of all problems some lead to a plan."""
        for run in self.runs:
            assert not run.fault, f"{self.proposer!r} raised {run.fault}; {_text(run.world)}"
        plans = sum(columns is not None for run in self.runs for columns in run.proposals)
        assert plans, f"{self.proposer!r} proposed no plan on any of {len(self.worlds)} problems"

    def check_new(self) -> None:
        """No more plans in a row that were measured before than a search bears."""
        for run in self.runs:
            assert run.repeats < _REPEATS, (
                f"{self.proposer!r} proposed {run.repeats} plans in a row that had been measured, expected fewer than {_REPEATS}, or None; "
                f"{_text(run.world)}"
            )

    def check_again(self) -> None:
        """The same seed gives the same plans, whatever the global generators say."""
        for run in self.runs:
            random.seed(1)
            again = _run(self.proposer, run.world)
            pairs = zip(run.proposals, again.proposals, strict=False)
            other = next((pair for pair in pairs if not _same(*pair)), None)
            assert other is None, (
                f"{self.proposer!r} proposed other plans with the same seed: {other}; {_text(run.world)}"
            )
            assert len(run.proposals) == len(again.proposals), f"{self.proposer!r} ended early; {_text(run.world)}"

    def check_global_state(self) -> None:
        """All draws come from the generator of the record."""
        drew = any(run.drew for run in self.runs)
        assert not drew, f"{self.proposer!r} drew from a global generator, expected record.generator"

    def check_record(self) -> None:
        """Record and posterior are read alone."""
        for run in self.runs:
            assert not run.changed, f"{self.proposer!r} changed {run.changed}; {_text(run.world)}"

    def check_empty(self) -> None:
        """Before any plan is measured there is a plan that keeps the limits, or none."""
        for world in self.worlds:
            record = world.record()
            try:
                columns = self.proposer.propose(record, Posterior(world.damages))
            except Exception as error:
                raise AssertionError(
                    f"{self.proposer!r} raised {type(error).__name__} on a record without a plan: {error}"
                ) from error
            if columns is not None:
                _check_plan(world, record, columns)
                _check_allowed(world, record, columns)
                _check_limits(world, record, columns)


def _run(proposer: Proposer, world: _World) -> _Run:
    """Turn after turn, from the optimum of the table and one other plan on."""
    run, record = _Run(world), world.record()
    posterior = Posterior(world.damages)
    for costs in (world.damages, np.random.default_rng(world.seed).random(world.damages.shape)):
        start = record.exact(costs)
        assert start is not None
        if record.new(start):
            _measure(world, record, posterior, start)
    state = _global_state()
    row = repeats = 0
    changed = ""
    for _ in range(_TURNS):
        before = _state(record, posterior)
        try:
            columns = proposer.propose(record, posterior)
        except Exception as error:
            return replace(run, repeats=repeats, changed=changed, fault=f"{type(error).__name__}: {error}")
        changed = changed or _difference(before, _state(record, posterior))
        run.proposals.append(columns if columns is None else copy.copy(columns))
        if columns is None:
            row = 0
            continue
        if not _is_plan(record, columns):
            break
        row = 0 if record.new(columns) else row + 1
        repeats = max(repeats, row)
        if not row:
            _measure(world, record, posterior, columns)
    return replace(run, repeats=repeats, changed=changed, drew=state != _global_state())


def _global_state() -> tuple[object, object]:
    return random.getstate(), repr(np.random.get_state())  # noqa: NPY002 (what others draw from)


def _measure(world: _World, record: Record, posterior: Posterior, columns: Columns) -> None:
    key = tuple(int(column) for column in columns)
    record.measured[key] = record.damage[key] = world.damage(columns)
    posterior.add(columns, record.damage[key])


def _state(record: Record, posterior: Posterior) -> dict[str, object]:
    """What a turn must leave as it is; not the generator, nor what is kept of sums that were asked for."""
    return {
        "record.measured": dict(record.measured),
        "record.damage": dict(record.damage),
        "record.allowed": record.allowed.tolist(),
        "record.tables": {name: costs.tolist() for name, costs in record.tables.items()},
        "the posterior": (posterior.mean.tolist(), posterior.plans.tolist(), list(posterior.damage)),
    }


def _difference(before: dict[str, object], after: dict[str, object]) -> str:
    return ", ".join(name for name in before if before[name] != after[name])


def _is_plan(record: Record, columns: object) -> bool:
    shape = record.allowed.shape
    if not (
        isinstance(columns, np.ndarray) and columns.shape == shape[:1] and np.issubdtype(columns.dtype, np.integer)
    ):
        return False
    return bool(((columns >= 0) & (columns < shape[1])).all())


def _check_plan(world: _World, record: Record, columns: Columns) -> None:
    decisions, options = record.allowed.shape
    assert _is_plan(record, columns), (
        f"expected (D,) = ({decisions},) whole numbers from 0 to {options - 1}, got {columns!r}; {_text(world)}"
    )


def _check_allowed(world: _World, record: Record, columns: Columns) -> None:
    if _is_plan(record, columns):
        refused = np.flatnonzero(~record.allowed[np.arange(len(columns)), columns])
        assert not len(refused), (
            f"expected allowed options, got column {columns[refused[0]]} in decision {refused[0]} of {columns.tolist()}; {_text(world)}"
        )


def _check_limits(world: _World, record: Record, columns: Columns) -> None:
    """In exact arithmetic, from the table itself."""
    if not _is_plan(record, columns) or not record.allowed[np.arange(len(columns)), columns].all():
        return
    for name, (lower, upper) in world.budget.bounds(world.table).items():
        use = sum(Fraction(float(x)) for x in world.table.usage[name][np.arange(len(columns)), columns])
        assert lower <= use <= upper, (
            f"expected {lower:.17g} <= {name} <= {upper:.17g}, got {float(use):.17g} of {columns.tolist()}; {_text(world)}"
        )


def _worlds(count: int, seed: int) -> Iterator[_World]:
    """Problems of six kinds in turn; each has a plan within its limits."""
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        kind = number % 6
        decisions = 1 if kind == 3 else int(generator.integers(3, 6))
        options = _OPTIONS if kind != 4 else _OPTIONS[:1]
        shape = (decisions, len(options))
        damages = generator.uniform(0.5, 1.5, shape) * 4.0 ** -np.arange(shape[1])
        refused = generator.random(shape) < (0.25 if kind in (1, 5) else 0.0)
        refused[:, 0] = False
        size = generator.integers(1, 9, (decisions, 1)) * np.arange(2.0, 2.0 + shape[1])
        speed = generator.integers(1, 9, (decisions, 1)) * generator.permutation(shape[1]) + 1.0
        if kind == 2:  # sums of these are rounded
            size, speed = size / 7 + generator.random(shape) / 3, speed / 3
        usage = {"memory_bytes": size, "bitops": speed}
        layers = tuple(Layer(f"l{number}", "linear", (4, 4), 16, "") for number in range(decisions))
        table = CostTable(layers, options, np.where(refused, np.nan, damages), usage=usage)
        names = ("memory_bytes",) if kind in (0, 3) else ("memory_bytes", "bitops")
        plan = np.array([generator.choice(np.flatnonzero(~row)) for row in refused])
        plan[0] = max(plan[0], 1) if kind == 2 else plan[0]  # not the cheapest
        used = {name: float(usage[name][np.arange(decisions), plan].sum()) for name in names}
        room = 1.0 if kind == 4 else 1.0 + float(generator.choice([1e-12, 0.05, 0.5]))
        limits: dict[str, float | tuple[float, float]] = {name: use * room for name, use in used.items()}
        if kind == 2:  # broken by the plan, by less than solvers see
            limits["memory_bytes"] = float(np.nextafter(used["memory_bytes"], 0.0))
        if kind == 5:
            limits["memory_bytes"] = (0.5 * used["memory_bytes"], room * used["memory_bytes"])
        yield _World(table, Budget(**limits), damages, seed + number)


def _same(first: Columns | None, second: Columns | None) -> bool:
    return first is second if first is None or second is None else np.array_equal(first, second)


def _text(world: _World) -> str:
    return f"problem of {len(world.damages)} decisions, seed {world.seed}, {world.budget!r}"
