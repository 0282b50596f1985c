"""Evolutionary: what is measured decides, nothing global changes, the start is warm."""

import math
import random

import numpy as np
import optuna
import pytest

from mpsearch.core.solution import Status
from mpsearch.solvers import Evolutionary


def value(sensitivity, options):
    return math.fsum(sensitivity[np.arange(len(options)), options])


def test_measured_objective_decides(ordinary, enumerated):
    """The table says one thing, the measurement another: on 3^6 plans the measured optimum is found."""
    sensitivity, usage, limits = ordinary(6, 3)
    truth = np.random.default_rng(1).random((6, 3))
    seen = []

    def measure(options):
        seen.append(tuple(options.tolist()))
        return value(truth, options)

    choice = Evolutionary(generations=30, population=20, objective=measure).choose(sensitivity, usage, limits)
    assert len(seen) == len(set(seen)) == choice.stats["evaluations"]  # nothing is measured twice
    assert choice.stats["measured"] == min(value(truth, np.array(plan)) for plan in seen)
    assert choice.stats["measured"] == value(truth, choice.options)
    feasible = {plan for _, plan in enumerated(sensitivity, usage, limits)}
    assert set(seen) <= feasible  # time is spent on plans within the limits alone
    assert choice.status is Status.FEASIBLE
    assert choice.bound == -math.inf


def test_starts_at_the_relaxation(ordinary, optimum_by_table):
    sensitivity, usage, limits = ordinary(20, 4)
    choice = Evolutionary(generations=1, population=10).choose(sensitivity, usage, limits)
    optimum = optimum_by_table(sensitivity, usage[0], limits[0])
    assert choice.bound <= optimum * (1 + 1e-12)
    assert value(sensitivity, choice.options) <= 1.1 * optimum


def test_failed_measurements_are_passed_over(ordinary):
    sensitivity, usage, limits = ordinary(6, 3)
    calls = iter(range(10**6))
    measure = lambda options: math.nan if next(calls) % 2 else value(sensitivity, options)  # noqa: E731
    choice = Evolutionary(generations=2, population=10, objective=measure).choose(sensitivity, usage, limits)
    assert math.isfinite(choice.stats["measured"])


def test_seed_decides_and_nothing_global_changes(ordinary, capfd):
    sensitivity, usage, limits = ordinary(12, 4)
    truth = np.random.default_rng(1).random((12, 4))
    optuna.logging.set_verbosity(optuna.logging.INFO)
    before = (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002

    def run(seed):
        seen = []
        solver = Evolutionary(3, 10, seed, objective=lambda x: seen.append(x.tolist()) or value(truth, x))
        return solver.choose(sensitivity, usage, limits).options.tolist(), seen

    assert run(0) == run(0)
    assert run(0)[1] != run(1)[1]
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert before == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002
    assert capfd.readouterr().err == ""


def test_verbosity_is_put_back_after_an_error(ordinary):
    def broken(options):
        raise RuntimeError("out of memory")

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with pytest.raises(RuntimeError, match="out of memory"):
        Evolutionary(objective=broken).choose(*ordinary(4, 3))
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING


def test_infeasible(ordinary):
    sensitivity, usage, _ = ordinary(6, 3)
    choice = Evolutionary().choose(sensitivity, usage, usage.min(axis=2).sum(axis=1) - 1)
    assert choice.status is Status.INFEASIBLE
