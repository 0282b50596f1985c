"""Plans proposed, measured, dropped and learned from, on a meter that a test can read."""

import numpy as np
import pytest

import mpsearch as mps
from mpsearch.core.problem import Problem
from mpsearch.plan_search.evaluator import Measurement
from mpsearch.plan_search.loop import PlanSearch
from mpsearch.plan_search.proposers import Record

COSTS = np.array([[4.0, 1.0], [2.0, 0.5], [1.0, 0.2]])


class Meter:
    """Damage of a plan = sum of its cells, over batches of 4 samples with noise that plans have in common."""

    def __init__(self, noise=0.0, batches=4):
        self.noise = np.random.default_rng(0).normal(size=(batches, 4)) * noise
        self.own = np.random.default_rng(1)
        self.known, self.seen = {}, []

    def measure(self, options, stop=None):
        key = tuple(options.tolist())
        value = COSTS[np.arange(3), options].sum()
        found = self.known.get(key, Measurement(np.zeros(0), np.zeros(0)))
        for number in range(len(found.sums) // 4, len(self.noise)):
            sums = value + self.noise[number] + self.own.normal(size=4) * 0.01
            self.seen.append((key, number))
            found = Measurement(np.append(found.sums, sums), np.append(found.counts, np.ones(4)))
            if stop is not None and number + 1 < len(self.noise) and stop(found):
                break
        self.known[key] = found
        return found

    def complete(self, options):
        found = self.known.get(tuple(options.tolist()))
        return found is not None and len(found.sums) == self.noise.size


def hunt_of(limit=11.0, **options):
    layers = tuple(mps.Layer(f"l{u}", "linear", (2, 2), 4, "") for u in range(3))
    size = np.array([[2.0, 4.0]] * 3)
    table = mps.CostTable(layers, mps.precisions("w2 w4"), np.zeros((3, 2)), usage={"memory_bytes": size})
    record = Record(Problem.of(table, mps.Budget(memory_bytes=limit)), {}, np.random.default_rng(0))
    return PlanSearch(record, COSTS / 10, Meter(**options))


class Listed:
    """Proposes what it is told."""

    def __init__(self, plans):
        self.plans, self.asked = [np.array(plan) for plan in plans], 0

    def propose(self, record, posterior):
        self.asked += 1
        return self.plans.pop(0) if self.plans else None


def test_a_plan_that_is_clearly_worse_is_dropped_after_its_first_batch_and_estimated():
    hunt = hunt_of(noise=5.0)
    hunt.open([np.array([1, 0, 0])], lambda: False)
    value = hunt.measure(np.array([0, 0, 0]))
    assert [number for key, number in hunt.meter.seen if key == (0, 0, 0)] == [0]
    assert not hunt.meter.complete(np.array([0, 0, 0]))
    noise = hunt.meter.noise.mean()
    assert value == pytest.approx(7.0 + noise, abs=0.05)  # the part of the noise that it never saw included
    assert hunt.least == pytest.approx(4.0 + noise, abs=0.05)


def test_a_plan_that_is_not_clearly_worse_is_measured_whole():
    hunt = hunt_of()
    hunt.open([np.array([1, 0, 0])], lambda: False)
    hunt.meter.own = np.random.default_rng(2)
    COSTS[1, 0] -= 1e-4
    try:
        hunt.measure(np.array([1, 0, 1]))
    finally:
        COSTS[1, 0] += 1e-4
    assert hunt.meter.complete(np.array([1, 0, 1]))
    assert np.array_equal(hunt.record.best, [1, 0, 1])


def test_the_scale_of_the_prior_is_that_of_the_plans():
    hunt = hunt_of()
    hunt.open([np.array([1, 0, 0]), np.array([1, 1, 0])], lambda: False)
    assert hunt.posterior.mean == pytest.approx(COSTS, rel=0.01)
    assert len(hunt.posterior.plans) == 2
    assert hunt.posterior.expected() == pytest.approx(COSTS, rel=0.02)


def test_opening_measures_what_fits_once_and_one_plan_whatever_it_costs():
    hunt = hunt_of()
    plans = [np.array(plan) for plan in ([1, 1, 1], [1, 0, 0], [1, 0, 0], [0, 1, 1])]
    hunt.open(plans, lambda: False)
    assert list(hunt.record.measured) == [(1, 0, 0), (0, 1, 1)]
    hunt = hunt_of()
    hunt.open(plans, lambda: True)
    assert list(hunt.record.measured) == [(1, 0, 0)]


def test_it_ends_when_enough_when_told_how_many_and_when_nobody_knows_more():
    plans = [[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]
    hunt = hunt_of()
    hunt.open([np.array([1, 0, 0])], lambda: False)
    hunt.go([Listed(plans)], lambda: len(hunt.record.measured) == 3)
    assert len(hunt.record.measured) == 3
    first = Listed(plans)
    hunt.go([first], lambda: False, most=2)
    assert first.asked == 2
    first, second = Listed(plans[:1]), Listed([])
    hunt.go([first, second], lambda: False)
    assert (first.asked, second.asked) == (2, 2)  # a whole round without a proposal


def test_plans_far_from_the_best_teach_nothing():
    hunt = hunt_of()
    hunt.open([np.array([1, 1, 0])], lambda: False)  # damage 2.5
    known = len(hunt.posterior.plans)
    hunt.go([Listed([[1, 0, 1], [0, 0, 0]])], lambda: False)  # 3.2, and 7
    assert len(hunt.posterior.plans) == known + 2
    COSTS[0, 0] += 20
    try:
        hunt.go([Listed([[0, 1, 1]])], lambda: False)
    finally:
        COSTS[0, 0] -= 20
    assert len(hunt.posterior.plans) == known + 2
    assert (0, 1, 1) in hunt.record.measured


def test_only_whole_measurements_are_adopted():
    hunt = hunt_of()
    hunt.meter.measure(np.array([1, 0, 0]))
    hunt.meter.measure(np.array([0, 0, 0]), lambda _: True)
    hunt.adopt([np.array([1, 0, 0]), np.array([0, 0, 0])])
    assert list(hunt.record.measured) == [(1, 0, 0)]
    assert len(hunt.posterior.plans) == 1


def test_no_damage_at_all():
    hunt = hunt_of()
    hunt.prior = np.zeros((3, 2))
    hunt.open([np.array([1, 0, 0])], lambda: False)
    assert np.isfinite(hunt.posterior.expected()).all()
