"""The contract suite of solvers: every registered one passes, every way to cheat is caught, and torch stays out."""

import subprocess
import sys
import time

import numpy as np
import pytest

from mpsearch import testing
from mpsearch.core.solution import Choice, Solver, SolverCapabilities, Status
from mpsearch.errors import SolverError
from mpsearch.solvers import ILP, SOLVERS, Annealing, BruteForce, Evolutionary
from mpsearch.testing import check_solver, solver_checks, solvers

SHORT: dict[str, Solver] = {
    "annealing": Annealing(sweeps=5, chains=8),
    "evolutionary": Evolutionary(generations=2, population=6),
}


def registered_checks():
    """Every check of every registered solver, under both names."""
    for name, solver in SOLVERS.items():
        tables = 340 if name not in ("ilp", "evolutionary") else 136
        for check_name, check in solver_checks(SHORT.get(name, solver()), tables=tables, seed=1):
            yield pytest.param(check, id=f"{name}-{check_name}")


@pytest.mark.parametrize("check", list(registered_checks()))
def test_registered_solvers(check):
    check()


def test_ilp_with_cbc():
    check_solver(ILP(backend="cbc"), tables=68, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_registered_solvers_on_many_tables(name):
    check_solver(SHORT.get(name, SOLVERS[name]()), tables=3400, seed=3)


class Cheat:
    """BruteForce with one thing wrong."""

    def __init__(self, wrong):
        self.wrong, self.calls = wrong, 0

    def choose(self, sensitivity, usage, limits):
        self.calls += 1
        return self.wrong(self, BruteForce().choose(sensitivity, usage, limits), sensitivity, usage, limits)


def least_damage(self, choice, sensitivity, usage, limits):
    return Choice(np.nanargmin(sensitivity, axis=1), Status.FEASIBLE)


def second_best(self, choice, sensitivity, usage, limits):
    if choice.options is None:
        return choice
    masked = sensitivity.copy()
    masked[0, choice.options[0]] = np.nan
    other = BruteForce().choose(masked, usage, limits) if not np.isnan(masked[0]).all() else choice
    return choice if other.options is None else Choice(other.options, Status.OPTIMAL)


def high_bound(self, choice, sensitivity, usage, limits):
    return Choice(choice.options, choice.status, choice.bound + 1.0)


def never_infeasible(self, choice, sensitivity, usage, limits):
    return Choice(None, Status.UNSOLVED) if choice.options is None else choice


def merged_statuses(self, choice, sensitivity, usage, limits):
    return Choice(None, Status.INFEASIBLE) if len(limits) > 1 else choice


def writes(self, choice, sensitivity, usage, limits):
    sensitivity.flags.writeable = True
    sensitivity += 1.0
    return choice


def forgets(self, choice, sensitivity, usage, limits):
    if choice.options is None or self.calls % 2 or len(limits):
        return choice
    return Choice(np.where(np.isnan(sensitivity), -np.inf, sensitivity).argmax(axis=1), Status.FEASIBLE)


def wrong_multipliers(self, choice, sensitivity, usage, limits):
    return Choice(choice.options, choice.status, choice.bound, np.full(len(limits), -1.0))


def floats(self, choice, sensitivity, usage, limits):
    return Choice(None if choice.options is None else choice.options.astype(float), choice.status, choice.bound)


def raises(self, choice, sensitivity, usage, limits):
    raise ZeroDivisionError("float division by zero")


def refuses(self, choice, sensitivity, usage, limits):
    raise SolverError("not today")


def scale_dependent(self, choice, sensitivity, usage, limits):
    """Scores below 1e-7 are nothing, as for a float solver."""
    blurred = np.where(np.abs(sensitivity) < 1e-7, 0.0 * sensitivity, sensitivity)
    return BruteForce().choose(blurred, usage, limits)


@pytest.mark.parametrize(
    ("wrong", "exact", "message"),
    [
        (least_damage, False, "break a limit|no plan meets the limits"),
        (second_best, True, "is called optimal"),
        (high_bound, False, "bound .* above the optimum"),
        (never_infeasible, True, "status unsolved, expected infeasible"),
        (merged_statuses, False, "status infeasible, expected"),
        (writes, False, "the arrays were changed"),
        (forgets, False, "and then"),
        (wrong_multipliers, False, "negative multipliers"),
        (floats, False, "expected integers"),
        (raises, False, "ZeroDivisionError"),
        (refuses, False, "refused 68 of 68 tables"),
        (scale_dependent, True, "expected"),
    ],
)
def test_cheats_are_caught(wrong, exact, message):
    with pytest.raises(AssertionError, match=message):
        check_solver(Cheat(wrong), exact, tables=68)


def failing(solver, exact=None):
    """Names of the checks that fail."""
    names = []
    for name, check in solver_checks(solver, exact, tables=68):
        try:
            check()
        except AssertionError:
            names.append(name)
    return names


def test_a_failure_hides_no_other():
    assert failing(BruteForce()) == []
    assert failing(Cheat(high_bound)) == ["bound true"]
    assert failing(Cheat(writes)) == ["arrays untouched"]
    assert failing(Cheat(wrong_multipliers)) == ["multipliers true"]
    assert failing(Cheat(least_damage), exact=True) == ["limits kept", "status true", "optimum proven", *CHANGES[:-1]]
    with pytest.raises(AssertionError, match=r"2 of 8 checks failed\nlimits kept: (?s:.*)\nstatus true: "):
        check_solver(Cheat(least_damage), tables=68)


CHANGES = [
    f"same optimum, {change}"
    for change in ("scores scaled", "rows permuted", "a row raised", "an option duplicated", "larger limits")
]


class Undeclared(Cheat):
    """Takes interactions and does not say so."""

    def choose(self, sensitivity, usage, limits, interactions=None):
        return BruteForce().choose(sensitivity, usage, limits, interactions)


class Boastful(Cheat):
    """Says that it takes interactions, and adds nothing."""

    capabilities = SolverCapabilities(exact=True, interactions=True)

    def choose(self, sensitivity, usage, limits, interactions=None):
        return BruteForce().choose(sensitivity, usage, limits)


def test_what_is_declared_is_held_to():
    assert failing(Undeclared(None)) == ["declaration"]
    assert failing(Boastful(None)) == ["status true", "bound true"]
    with pytest.raises(AssertionError, match=r"choose takes interactions, .*write capabilities = SolverCap.*=True\)"):
        check_solver(Undeclared(None), tables=17)


def test_cycling_is_caught(monkeypatch):
    monkeypatch.setattr(solvers, "_SECONDS", 0.2)

    def sleeps(self, choice, *arrays):
        time.sleep(2)
        return choice

    with pytest.raises(AssertionError, match="no answer in 0 s"):
        check_solver(Cheat(sleeps), exact=False, tables=1)


def test_honest_heuristic_passes():
    def honest(self, choice, sensitivity, usage, limits):
        return Choice(choice.options, Status.FEASIBLE if choice.options is not None else Status.UNSOLVED)

    check_solver(Cheat(honest), exact=False, tables=68)


def test_every_kind_of_table_comes_up():
    tables = list(solvers._tables(200, np.random.default_rng(0)))
    assert {table.kind for table in tables} == set(solvers._KINDS)
    assert {len(table.limits) for table in tables} == {0, 1, 2, 3}
    assert {table.sensitivity.shape[0] for table in tables} == {1, 2, 3, 4, 5, 6}
    infeasible = sum(table.optimum()[0] is None for table in tables)
    assert 10 < infeasible < 80


def test_checking_solvers_loads_no_torch():
    code = "import sys; from mpsearch.testing import check_solver; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'check_everything'"):
        _ = testing.check_everything
