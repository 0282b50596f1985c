"""Neighbours against the list of all of them, and what is looked at of a large problem."""

import itertools
import tracemalloc

import numpy as np
import pytest

import mpsearch as mps
from mpsearch.core.problem import Problem
from mpsearch.estimation.surrogate import Surrogate
from mpsearch.plan_search.proposers import AdditiveOutput, Moves, Posterior, Record
from mpsearch.plan_search.proposers import neighbours as module
from mpsearch.plan_search.proposers.neighbours import Neighbours, changed

BITS = np.array([2, 3, 4, 6, 8])


def problem_of(rows, resources, seed=0):
    """Sizes that grow with the bits, and for further resources any order; a few options refused."""
    g = np.random.default_rng(seed)
    layers = tuple(mps.Layer(f"l{u}", "linear", (4, 4), 16, "") for u in range(rows))
    costs = np.exp(g.normal(-5, 1, (rows, 1))) * 4.0**-BITS * np.exp(g.normal(0, 0.2, (rows, 5)))
    usage = {
        f"r{r}": g.integers(100, 900, (rows, 1)) * (BITS if r == 0 else g.permuted(BITS)) for r in range(resources)
    }
    limits = {name: float(0.6 * use.min(1).sum() + 0.4 * use.max(1).sum()) for name, use in usage.items()}
    refused = g.random((rows, 5)) < 0.1
    refused[:, 0] = False
    table = mps.CostTable(layers, mps.precisions("w2 w3 w4 w6 w8"), np.where(refused, np.nan, costs), usage=usage)
    record = Record(Problem.of(table, mps.Budget(**limits)), {}, g)
    start = record.exact(costs)
    assert start is not None
    return record, start, costs


def plain(record, columns):
    """All neighbours, change by change."""
    usage, free, rows = record.problem.usage, record.problem.free, np.arange(len(columns))
    room = free - usage[:, rows, columns].sum(1)
    singles = [(u, p) for u, p in np.argwhere(record.allowed).tolist() if p != columns[u]]
    use = {(u, p): usage[:, u, p] - usage[:, u, columns[u]] for u, p in singles}
    shrinks = [move for move in singles if (use[move] <= 0).all() and (use[move] < 0).any()]
    moves = [(move,) for move in singles if (use[move] <= room).all()]
    for grows in [move for move in singles if not (use[move] <= room).all()]:
        moves += [(grows, pays) for pays in shrinks if pays[0] != grows[0] and (use[grows] + use[pays] <= room).all()]
    return moves


def by_gain(moves, gains):
    sums = [sum(gains[move] for move in moves_of_one) for moves_of_one in moves]
    return [moves[place] for place in np.argsort(sums, kind="stable")]


@pytest.mark.parametrize("resources", [1, 2, 3])
@pytest.mark.parametrize("ties", [False, True])
def test_the_best_come_first_as_of_all_of_them(resources, ties):
    record, columns, costs = problem_of(12, resources)
    gains = costs - costs[np.arange(12), columns][:, None]
    if ties:
        gains = np.round(gains / np.abs(gains).max(), 1)
    moves = plain(record, columns)
    assert len(moves) > 20
    assert list(record.neighbours(columns).best(gains)) == by_gain(moves, gains)


@pytest.mark.parametrize("resources", [1, 2])
def test_draws_are_those_of_the_list_of_all(resources):
    record, columns, _ = problem_of(12, resources)
    moves = plain(record, columns)
    chosen = np.random.default_rng(5).choice(len(moves), 20, replace=False)
    drawn = record.neighbours(columns).drawn(20, np.random.default_rng(5))
    assert drawn == [moves[place] for place in chosen]
    assert record.neighbours(columns).drawn(10**6, np.random.default_rng(5)) == moves


def test_of_too_many_pairs_some_are_drawn(monkeypatch):
    record, columns, _ = problem_of(40, 1)
    monkeypatch.setattr(module, "_PAIRS", 500)
    drawn = record.neighbours(columns).drawn(10**6, np.random.default_rng(0))
    assert 0 < len(drawn) < 700
    assert set(drawn) <= set(plain(record, columns))
    assert drawn == record.neighbours(columns).drawn(10**6, np.random.default_rng(0))


def count_looks(monkeypatch):
    looks = []
    payers = Neighbours._payers
    monkeypatch.setattr(Neighbours, "_payers", lambda self, grows: (looks.append(grows), payers(self, grows))[1])
    return looks


@pytest.mark.parametrize("rows", [100, 1600])
def test_with_one_limit_few_changes_are_looked_through_whatever_the_number_of_cells(monkeypatch, rows):
    record, columns, costs = problem_of(rows, 1)
    looks = count_looks(monkeypatch)
    best = record.neighbours(columns).best(costs - costs[np.arange(rows), columns][:, None])
    assert len(list(itertools.islice(best, 20))) == 20
    assert len(looks) <= 60


def test_with_several_limits_no_more_than_a_fixed_number_is_looked_through(monkeypatch):
    record, columns, costs = problem_of(300, 3)
    looks = count_looks(monkeypatch)
    monkeypatch.setattr(module, "_LOOKED_THROUGH", 8)
    gains = costs - costs[np.arange(300), columns][:, None]
    found = list(record.neighbours(columns).best(gains))
    assert len(looks) <= 8
    sums = [sum(gains[move] for move in moves) for moves in found]
    assert sums == sorted(sums)
    for changes in found[::50]:
        assert record.problem.fits(changed(columns, changes))


def test_a_turn_of_moves_takes_memory_in_proportion_to_the_cells():
    def peak_bytes(rows):
        record, columns, costs = problem_of(rows, 1)
        record.measured[tuple(columns.tolist())] = 1.0
        posterior = Posterior(costs)
        posterior.add(columns, 1.0)
        tracemalloc.start()
        assert Moves().propose(record, posterior) is not None
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(1600) < 5 * peak_bytes(400)


def test_additive_output_descends_on_a_large_problem():
    rows = 400
    record, columns, costs = problem_of(rows, 1)
    record.measured[tuple(columns.tolist())] = 1.0
    g = np.random.default_rng(0)
    record.surrogate = Surrogate(
        np.log(np.full((2, 4), 0.25)), g.normal(size=(rows, 5, 2, 4)) * costs[:, :, None, None]
    )
    found = AdditiveOutput(steps=5).propose(record, Posterior(costs))
    assert found is not None
    assert record.fits(found)
    assert record.surrogate.damage(found) < record.surrogate.damage(columns)
