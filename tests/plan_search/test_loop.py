"""Plans proposed, measured, dropped and learned from, on an evaluator that a test can read."""

import numpy as np
import pytest

import mpsearch as mps
from mpsearch.core.problem import Problem
from mpsearch.plan_search.evaluator import Measurement
from mpsearch.plan_search.loop import PlanSearch
from mpsearch.plan_search.proposers import Record

COSTS = np.array([[4.0, 1.0], [2.0, 0.5], [1.0, 0.2]])


class Evaluator:
    """Damage of a plan = sum of its cells, over batches of 4 samples with noise that plans have in common."""

    at_once = 1

    def __init__(self, noise=0.0, batches=4):
        self.costs = COSTS.copy()
        self.noise = np.random.default_rng(0).normal(size=(batches, 4)) * noise
        self.own = np.random.default_rng(1)
        self.known, self.seen = {}, []

    def measure(self, options, stop=None):
        key = tuple(options.tolist())
        value = self.costs[np.arange(3), options].sum()
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


def search_of(limit=11.0, **options):
    layers = tuple(mps.Layer(f"l{u}", "linear", (2, 2), 4, "") for u in range(3))
    size = np.array([[2.0, 4.0]] * 3)
    table = mps.CostTable(layers, mps.precisions("w2 w4"), np.zeros((3, 2)), usage={"memory_bytes": size})
    record = Record(Problem.of(table, mps.Budget(memory_bytes=limit)), {}, np.random.default_rng(0))
    return PlanSearch(record, COSTS / 10, Evaluator(**options))


def opened():
    """A search that has measured one plan."""
    search = search_of()
    search.open([np.array([1, 0, 0])], lambda: False)
    return search


class Listed:
    """Proposes what it is told."""

    def __init__(self, plans):
        self.plans, self.asked = [np.array(plan) for plan in plans], 0

    def propose(self, record, posterior):
        self.asked += 1
        return self.plans.pop(0) if self.plans else None


def test_a_plan_that_is_clearly_worse_is_dropped_after_its_first_batch_and_estimated():
    search = search_of(noise=5.0)
    search.open([np.array([1, 0, 0])], lambda: False)
    value = search.measure(np.array([0, 0, 0]))
    assert [number for key, number in search.evaluator.seen if key == (0, 0, 0)] == [0]
    assert not search.evaluator.complete(np.array([0, 0, 0]))
    noise = search.evaluator.noise.mean()
    assert value == pytest.approx(7.0 + noise, abs=0.05)  # the part of the noise that it never saw included
    assert search.least == pytest.approx(4.0 + noise, abs=0.05)


def test_a_plan_that_is_not_clearly_worse_is_measured_whole():
    search = search_of()
    search.open([np.array([1, 0, 0])], lambda: False)
    search.evaluator.own = np.random.default_rng(2)
    search.evaluator.costs[1, 0] -= 1e-4
    search.measure(np.array([1, 0, 1]))
    assert search.evaluator.complete(np.array([1, 0, 1]))
    assert np.array_equal(search.record.best, [1, 0, 1])


def test_the_scale_of_the_prior_is_that_of_the_plans():
    search = search_of()
    search.open([np.array([1, 0, 0]), np.array([1, 1, 0])], lambda: False)
    assert search.posterior.mean == pytest.approx(COSTS, rel=0.01)
    assert len(search.posterior.plans) == 2
    assert search.posterior.expected() == pytest.approx(COSTS, rel=0.02)


def test_opening_measures_what_fits_once_and_one_plan_whatever_it_costs():
    search = search_of()
    plans = [np.array(plan) for plan in ([1, 1, 1], [1, 0, 0], [1, 0, 0], [0, 1, 1])]
    search.open(plans, lambda: False)
    assert list(search.record.measured) == [(1, 0, 0), (0, 1, 1)]
    search = search_of()
    search.open(plans, lambda: True)
    assert list(search.record.measured) == [(1, 0, 0)]


def test_it_ends_when_enough_when_told_how_many_and_when_nobody_knows_more():
    plans = [[0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]]
    search = opened()
    search.run([Listed(plans)], lambda: len(search.record.measured) == 3)
    assert len(search.record.measured) == 3
    search = opened()
    first = Listed(plans)
    search.run([first], lambda: False, most=2)
    assert first.asked == 2
    search = opened()
    first, second = Listed(plans[:1]), Listed([])
    search.run([first, second], lambda: False)
    assert (first.asked, second.asked) == (2, 2)  # a whole round without a proposal


def test_who_repeats_plans_is_asked_again_a_few_times_and_then_is_out_of_plans():
    class Repeats(Listed):
        def propose(self, record, posterior):
            super().propose(record, posterior)
            return np.array([1, 0, 0])

    search = opened()
    stubborn = Repeats([])
    search.run([stubborn], lambda: False)
    assert stubborn.asked == 8
    assert list(search.record.measured) == [(1, 0, 0)]
    forgetful = Listed([[1, 0, 0], [1, 0, 0], [0, 1, 1]])
    search.run([forgetful], lambda: False)
    assert list(search.record.measured) == [(1, 0, 0), (0, 1, 1)]


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ([1, 1, 1], "a plan that breaks a limit: it uses 12, expected memory_bytes <= 11"),
        ([0, 0], "expected the columns of 3 decisions"),
        ([0.0, 0.0, 0.0], "an array of whole numbers"),
        ([0, 0, 2], "columns from 0 to 2, expected 0 to 1"),
        ([0, 0, -1], "columns from -1 to 0, expected 0 to 1"),
        ([0, 1, 0], "column 1 in decision 1, which is not allowed there"),
    ],
)
def test_a_proposal_that_is_no_plan_within_the_limits_is_refused(plan, words):
    search = opened()
    search.record.allowed[1, 1] = words.startswith(("a plan", "columns"))
    with pytest.raises(mps.PlanError, match=words):
        search.run([Listed([plan])], lambda: False)
    assert list(search.record.measured) == [(1, 0, 0)]


def test_plans_far_from_the_best_teach_nothing():
    search = search_of()
    search.open([np.array([1, 1, 0])], lambda: False)  # damage 2.5
    known = len(search.posterior.plans)
    search.run([Listed([[1, 0, 1], [0, 0, 0]])], lambda: False)  # 3.2, and 7
    assert len(search.posterior.plans) == known + 2
    search.evaluator.costs[0, 0] += 20
    search.run([Listed([[0, 1, 1]])], lambda: False)
    assert len(search.posterior.plans) == known + 2
    assert (0, 1, 1) in search.record.measured


def test_only_whole_measurements_are_adopted():
    search = search_of()
    search.evaluator.measure(np.array([1, 0, 0]))
    search.evaluator.measure(np.array([0, 0, 0]), lambda _: True)
    search.adopt([np.array([1, 0, 0]), np.array([0, 0, 0])])
    assert list(search.record.measured) == [(1, 0, 0)]
    assert len(search.posterior.plans) == 1


def test_no_damage_at_all():
    search = search_of()
    search.prior = np.zeros((3, 2))
    search.open([np.array([1, 0, 0])], lambda: False)
    assert np.isfinite(search.posterior.expected()).all()
