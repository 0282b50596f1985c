"""What is proposed fits, is allowed and is new; neighbours are all there are."""

import itertools
import time

import numpy as np
import pytest

import mpsearch as mps
from mpsearch.core.problem import Problem
from mpsearch.estimation.surrogate import Surrogate
from mpsearch.plan_search.proposers import AdditiveOutput, Crossing, Moves, Posterior, Record, Thompson
from mpsearch.plan_search.proposers.neighbours import changed

U, P = 5, 3


def record_of(seed, limits=None, names=("memory_bytes", "bitops")):
    """A random problem with two resources and a few cells that are not allowed."""
    generator = np.random.default_rng(seed)
    layers = tuple(mps.Layer(f"l{u}", "linear", (4, 4), 16, "") for u in range(U))
    sensitivity = generator.uniform(0.5, 1.5, (U, P)) * [9, 3, 1]
    blocked = generator.random((U, P)) < 0.15
    blocked[:, 0] = False
    size = generator.integers(1, 9, (U, 1)) * np.array([2.0, 3.0, 5.0])
    ops = generator.integers(1, 9, (U, 1)) * np.array([3.0, 2.0, 6.0])  # the second is faster than the first
    table = mps.CostTable(
        layers,
        mps.precisions("w2 w3 w4"),
        np.where(blocked, np.nan, sensitivity),
        usage={"memory_bytes": size, "bitops": ops},
    )
    least = {name: values.min(1).sum() for name, values in table.usage.items()}
    limits = {name: 1.35 * least[name] for name in names} if limits is None else limits
    record = Record(
        Problem.of(table, mps.Budget(**limits)), {"one": np.nan_to_num(sensitivity)}, np.random.default_rng(seed)
    )
    return record, table


def every_plan(table, record):
    """Allowed plans within the limits, by enumeration of the table itself."""
    limits = record.problem.limits
    for options in itertools.product(range(P), repeat=U):
        rows = np.arange(U)
        if np.isnan(table.sensitivity[rows, options]).any():
            continue
        if all(table.usage[name][rows, options].sum() <= limit for name, (_, limit) in limits.items()):
            yield options


def every_move(record, columns):
    return record.neighbours(columns).drawn(10**9, record.generator)


@pytest.mark.parametrize("names", [("memory_bytes", "bitops"), ("memory_bytes",)])
@pytest.mark.parametrize("seed", range(3))
def test_neighbours_are_all_changes_of_one_and_exchanges_of_two(seed, names):
    record, table = record_of(seed, names=names)
    good = set(every_plan(table, record))
    for options in list(good)[::7]:
        start = np.array(options)
        found = [tuple(changed(start, move).tolist()) for move in every_move(record, start)]
        assert len(set(found)) == len(found)
        assert set(found) <= good
        ones = {plan for plan in good if sum(a != b for a, b in zip(plan, options, strict=True)) == 1}
        assert {plan for plan in found if sum(a != b for a, b in zip(plan, options, strict=True)) == 1} == ones
        twos = set()
        for plan in good:
            differ = [u for u in range(U) if plan[u] != options[u]]
            if len(differ) != 2:
                continue
            for grows, pays in (differ, differ[::-1]):
                alone = (*options[:grows], plan[grows], *options[grows + 1 :])
                change = [
                    values[pays, plan[pays]] - values[pays, options[pays]] for values in map(table.usage.get, names)
                ]
                if alone not in good and max(change) <= 0 and min(change) < 0:
                    twos.add(plan)
        assert set(found) == ones | twos


@pytest.mark.parametrize("seed", range(3))
def test_exact_fits_and_best(seed):
    record, table = record_of(seed)
    good = list(every_plan(table, record))
    costs = np.random.default_rng(seed).random((U, P))
    best = min(good, key=lambda options: costs[np.arange(U), options].sum())
    assert tuple(record.exact(costs).tolist()) == best
    for options in itertools.product(range(P), repeat=U):
        assert record.fits(np.array(options)) == (options in good)
    record.measured = {good[0]: 2.0, good[1]: 1.0, (2,) * U: 0.0}
    if (2,) * U not in good:
        assert tuple(record.best.tolist()) == good[1]
    assert not record.new(np.array(good[0]))
    assert record.new(np.array(good[2]))


PROPOSERS = {
    "thompson": Thompson(),
    "moves": Moves(),
    "crossing": Crossing(mutation=U),
    "additive-output": AdditiveOutput(),
}


def surrogate():
    generator = np.random.default_rng(0)
    shifts = generator.normal(size=(U, P, 6, 4)) * np.array([4, 2, 1])[:, None, None]
    logits = generator.normal(size=(6, 4))
    return Surrogate(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), shifts)


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_proposed_fits_is_allowed_and_is_new(name, seed):
    """Until there is nothing left to propose: no plan twice."""
    record, table = record_of(seed)
    good = set(every_plan(table, record))
    proposer, record.surrogate = PROPOSERS[name], surrogate()
    posterior = Posterior(np.nan_to_num(table.sensitivity))
    start = record.exact(np.nan_to_num(table.sensitivity))
    damage = np.random.default_rng(seed + 10).random
    record.measured[tuple(start.tolist())] = 1.0
    if name == "crossing":  # it takes two
        record.measured[max(good - set(record.measured))] = 2.0
    first = len(record.measured)
    for _ in range(len(good)):
        found = proposer.propose(record, posterior)  # type: ignore[attr-defined]
        if found is None:
            break
        key = tuple(found.tolist())
        assert key in good
        assert key not in record.measured
        record.measured[key] = damage()
        posterior.add(found, record.measured[key])
    else:
        assert set(record.measured) == good
    assert len(record.measured) > first or name == "additive-output"


def test_moves_takes_the_neighbour_that_is_expected_to_be_best():
    record, table = record_of(0, {"memory_bytes": 1e9})
    costs = np.where(np.isnan(table.sensitivity), 9.0, table.sensitivity)
    start = np.zeros(U, np.int64)
    record.measured[tuple(start.tolist())] = 1.0
    found = Moves().propose(record, Posterior(costs))
    gains = np.where(np.isnan(table.sensitivity), np.inf, table.sensitivity - table.sensitivity[:, :1])
    u, p = np.unravel_index(np.argmin(gains), gains.shape)
    assert tuple(found.tolist()) == tuple(p if i == u else 0 for i in range(U))


def test_additive_output_descends_to_a_plan_without_better_neighbours():
    record, table = record_of(1)
    proposer, record.surrogate = AdditiveOutput(), surrogate()
    start = record.exact(np.nan_to_num(table.sensitivity))
    record.measured[tuple(start.tolist())] = 1.0
    found = proposer.propose(record, Posterior(np.nan_to_num(table.sensitivity)))
    if found is None:
        found = start
    value = record.surrogate.damage(found)
    assert value <= record.surrogate.damage(start)
    for move in every_move(record, found):
        assert record.surrogate.damage(changed(found, move)) >= value


def test_thompson_gives_the_optimum_of_the_mean_every_few_turns():
    record, table = record_of(2)
    posterior = Posterior(np.nan_to_num(table.sensitivity))
    record.measured = {tuple([-1 - i] * U): 9.0 for i in range(4)}  # the turn is told by their number
    assert np.array_equal(Thompson(every=4).propose(record, posterior), record.exact(posterior.expected()))


@pytest.mark.parametrize("seed", range(3))
def test_a_child_without_mutations_is_the_best_of_all_that_its_parents_columns_make(seed):
    record, table = record_of(seed)
    good = sorted(every_plan(table, record))
    parents = [good[0], good[-1]]
    record.measured = dict(zip(parents, (1.0, 2.0), strict=True))
    posterior = Posterior(np.nan_to_num(table.sensitivity), row=0.0, cell=0.0)  # its draws are its mean
    child = Crossing(mutation=0.0).propose(record, posterior)
    born = [plan for plan in good if all(p in both for p, *both in zip(plan, *parents, strict=True))]
    best = min(born, key=lambda plan: table.sensitivity[np.arange(U), plan].sum())
    if best in record.measured:
        assert child is None
    else:
        assert tuple(child.tolist()) == best


def test_crossing_needs_two_parents():
    record, table = record_of(0)
    record.measured = {next(every_plan(table, record)): 1.0}
    assert Crossing().propose(record, Posterior(np.nan_to_num(table.sensitivity))) is None


@pytest.mark.parametrize("resources", [1, 3])
def test_a_busy_machine_finds_the_same_plans(monkeypatch, resources):
    """A clock that leaps by a day at each look stands for a machine that does other work."""
    g = np.random.default_rng(resources)
    layers = tuple(mps.Layer(f"l{u}", "linear", (4, 4), 16, "") for u in range(80))
    bits = np.array([2, 3, 4, 5, 6, 8])
    cost = np.exp(g.normal(-5, 2, (80, 1))) * 4.0**-bits * np.exp(g.normal(0, 0.2, (80, 6)))
    usage = {f"r{r}": g.integers(100, 9000, (80, 1)) * (bits if r == 0 else g.permuted(bits)) for r in range(resources)}
    limits = {name: float(np.floor(0.6 * use.min(1).sum() + 0.4 * use.max(1).sum())) for name, use in usage.items()}
    table = mps.CostTable(layers, mps.precisions("w2 w3 w4 w5 w6 w8"), cost, usage=usage)
    record = Record(Problem.of(table, mps.Budget(**limits)), {}, g)
    idle = record.exact(cost)
    days = itertools.count(0.0, 86400.0)
    monkeypatch.setattr(time, "perf_counter", lambda: next(days))
    assert record.exact(cost).tolist() == idle.tolist()
