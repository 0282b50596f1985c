"""ILP: known optima by either backend, and each trap of float solvers."""

import math
import subprocess
import sys

import numpy as np
import pulp
import pytest

from mpsearch.core.solution import Status
from mpsearch.core.table import Interactions
from mpsearch.errors import SolverError
from mpsearch.solvers import ILP

BACKENDS = ["highs", "cbc"]


def value(sensitivity, options):
    return math.fsum(sensitivity[np.arange(len(options)), options])


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_optima(backend, known_optima):
    for name, sensitivity, usage, limits, optimum in known_optima:
        choice = ILP(backend).choose(sensitivity, usage, limits)
        if optimum is None:
            assert choice.status is Status.INFEASIBLE, name
        else:
            assert choice.status is Status.OPTIMAL, name
            assert value(sensitivity, choice.options) == pytest.approx(optimum, rel=1e-10, abs=0), name
            assert choice.bound == value(sensitivity, choice.options), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_of_ordinary_size(backend, ordinary, optimum_by_table):
    for seed in range(4):
        sensitivity, usage, limits = ordinary(20, 4, seed=seed)
        choice = ILP(backend).choose(sensitivity, usage, limits)
        assert choice.status is Status.OPTIMAL
        expected = optimum_by_table(sensitivity, usage[0], limits[0])
        assert value(sensitivity, choice.options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("power", [-12, -6, 6, 12])
def test_same_plan_at_any_scale(backend, power, ordinary):
    sensitivity, usage, limits = ordinary(30, 4, resources=2)
    plain, scaled = (ILP(backend).choose(s, usage, limits) for s in (sensitivity, sensitivity * 10.0**power))
    assert plain.options.tolist() == scaled.options.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_from_1e_minus_12_to_1e6(backend, enumerated):
    """The row of 1e6 can be satisfied for free; what is left are the rows that a fixed scale cannot see."""
    sensitivity = np.array([[1e6, 0.0], [5e-12, 1e-12], [4e-12, 2e-12], [9e-12, 1e-12]])
    usage = np.array([[[1.0, 2.0], [1.0, 3.0], [1.0, 2.0], [1.0, 4.0]]])
    limits = np.array([7.0])
    choice = ILP(backend).choose(sensitivity, usage, limits)
    best, options = enumerated(sensitivity, usage, limits)[0]
    assert tuple(choice.options) == options
    assert choice.bound == best
    assert choice.stats["rounds"] > 1  # scaled again


@pytest.mark.parametrize("backend", BACKENDS)
def test_units_of_1e13_are_counted(backend, enumerated):
    """Plans that exceed the limit by single units in 10^13 look feasible to a float solver: they are cut off."""
    cuts = 0
    for seed in range(8):
        rng = np.random.default_rng(seed)
        sensitivity = np.sort(rng.random((5, 3)))[:, ::-1].copy()
        usage = (1e13 * np.array([1.0, 2.0, 3.0]) + rng.integers(0, 9, (1, 5, 3))).astype(float)
        limits = np.array([8e13 + 15])
        choice = ILP(backend).choose(sensitivity, usage, limits)
        best, options = enumerated(sensitivity, usage, limits)[0]
        assert tuple(choice.options) == options
        assert choice.status is Status.OPTIMAL
        assert choice.bound == best
        cuts += choice.stats["cuts"]
    assert cuts > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_infeasible_together(backend):
    """Each limit can be met alone, but not both."""
    sensitivity = np.zeros((3, 2))
    usage = np.array([[[1.0, 2.0]] * 3, [[2.0, 1.0]] * 3])
    assert ILP(backend).choose(sensitivity, usage, np.array([4.0, 4.0])).status is Status.INFEASIBLE
    assert ILP(backend).choose(sensitivity, usage, np.array([4.0, 5.0])).status is Status.OPTIMAL


@pytest.mark.parametrize("backend", BACKENDS)
def test_interactions(backend, enumerated):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        sensitivity, usage = rng.random((4, 3)), rng.integers(1, 9, (1, 4, 3)).astype(float)
        sensitivity[0, 1] = np.nan
        cells = [((i, p), (k, q)) for i in range(4) for k in range(i) for p in range(3) for q in range(3)]
        first, second = np.array(cells).transpose(1, 0, 2)
        interactions = Interactions(first, second, rng.normal(0, 1, len(cells)))
        limits = np.array([18.0])
        best, options = enumerated(sensitivity, usage, limits, interactions)[0]
        choice = ILP(backend).choose(sensitivity, usage, limits, interactions)
        assert tuple(choice.options) == options
        assert choice.bound == pytest.approx(best)
        assert choice.status is Status.OPTIMAL


@pytest.mark.parametrize("backend", BACKENDS)
def test_stopped_by_time(backend, ordinary, optimum_by_table):
    """PuLP calls a plan found before the time limit "Optimal"; only a proof may be called so here."""
    sensitivity, usage, limits = ordinary(60, 8, seed=1)
    optimum = optimum_by_table(sensitivity, usage[0], limits[0])
    for seconds in (0.0, 0.03):
        choice = ILP(backend, time_limit_s=seconds).choose(sensitivity, usage, limits)
        assert choice.bound <= optimum * (1 + 1e-9)
        assert choice.status is not Status.INFEASIBLE
        if choice.status is Status.OPTIMAL:
            assert value(sensitivity, choice.options) == pytest.approx(optimum, rel=1e-9)
    assert ILP(backend, time_limit_s=0.0).choose(sensitivity, usage, limits).status is Status.UNSOLVED


def test_sol_status_decides(monkeypatch, ordinary):
    """Status "Optimal" beside a solution status of "integer feasible" is a plan without a proof."""
    solve = pulp.LpProblem.solve

    def stopped(problem, solver):
        solve(problem, solver)
        problem.sol_status = pulp.LpSolutionIntegerFeasible
        return problem.status

    monkeypatch.setattr(pulp.LpProblem, "solve", stopped)
    choice = ILP().choose(*ordinary(10, 4))
    assert choice.status is Status.FEASIBLE
    assert choice.bound <= value(ordinary(10, 4)[0], choice.options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_silent(backend, ordinary, capfd):
    ILP(backend).choose(*ordinary(10, 4))
    assert capfd.readouterr() == ("", "")


def test_unknown_backend():
    with pytest.raises(SolverError, match="'gurobi' is unknown to ILP, expected 'highs' or 'cbc'"):
        ILP("gurobi")


def test_import_stays_light():
    code = (
        "import mpsearch.solvers, sys; print([m for m in ('pulp', 'highspy', 'optuna', 'torch') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
