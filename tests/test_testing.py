"""The public contract suites: every registered solver passes, every way to cheat is caught."""

import time

import numpy as np
import pytest

from mpsearch import testing
from mpsearch.errors import SolverError
from mpsearch.solution import Choice, Status
from mpsearch.solvers import SOLVERS, Annealing, BruteForce, Evolutionary
from mpsearch.testing import check_solver

EXACT = {"exact", "ilp", "dynamic-programming", "brute-force"}
SHORT = {"annealing": Annealing(sweeps=5, chains=8), "evolutionary": Evolutionary(generations=2, population=6)}


@pytest.mark.parametrize("name", SOLVERS)
def test_registered_solvers(name):
    tables = 340 if name not in ("ilp", "evolutionary") else 136
    check_solver(SHORT.get(name, SOLVERS[name]()), name in EXACT, tables=tables, seed=1)


def test_ilp_with_cbc():
    check_solver(SOLVERS["ilp"](backend="cbc"), exact=True, tables=68, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_registered_solvers_on_many_tables(name):
    check_solver(SHORT.get(name, SOLVERS[name]()), name in EXACT, tables=3400, seed=3)


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


def test_cycling_is_caught(monkeypatch):
    monkeypatch.setattr(testing, "_SECONDS", 0.2)

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
    tables = list(testing._tables(200, np.random.default_rng(0)))
    assert {table.kind for table in tables} == set(testing._KINDS)
    assert {len(table.limits) for table in tables} == {0, 1, 2, 3}
    assert {table.sensitivity.shape[0] for table in tables} == {1, 2, 3, 4, 5, 6}
    infeasible = sum(table.optimum()[0] is None for table in tables)
    assert 10 < infeasible < 80
