"""One way to add: what a plan reports, given back as a budget, admits it; against an enumeration with correctly rounded sums."""

import itertools
import math

import numpy as np
import pytest

import mpsearch as mps
from mpsearch import solvers
from mpsearch.core.problem import Problem, attainable, usage_of
from mpsearch.core.solution import Status
from mpsearch.core.table import Interactions, Peak

SMALL = {
    "exact": (solvers.Exact(), 60),
    "dynamic-programming": (solvers.DynamicProgramming(), 40),
    "brute-force": (solvers.BruteForce(), 40),
    "ilp": (solvers.ILP(), 6),
    "greedy": (solvers.Greedy(), 30),
    "bisection": (solvers.Bisection(), 20),
    "annealing": (solvers.Annealing(sweeps=3, chains=4), 5),
    "evolutionary": (solvers.Evolutionary(generations=2, population=4), 2),
}
PROVING = ("exact", "dynamic-programming", "brute-force", "ilp")


def decimals(generator, shape):
    """Of few digits, so that different sums are the same number but for their rounding."""
    return generator.integers(1, 60, shape) / 10.0 ** generator.integers(1, 4)


def table_of(seed, *, peaks=False, interactions=False, columns=3, rows=4):
    """Decimals, whole numbers, a fixed part, groups, an option that is not allowed."""
    generator = np.random.default_rng(seed)
    groups = [("", "", "", ""), ("g", "g", "", ""), ("g", "g", "g", ""), ("a", "b", "a", "b")][seed % 4]
    layers = tuple(
        mps.Layer(f"l{i}", weight_shape=(int(generator.integers(1, 9)),), group=groups[i]) for i in range(rows)
    )
    sensitivity = decimals(generator, (rows, columns))
    if not any(groups):
        sensitivity[0, 0] = np.nan
    usage = {
        "latency_s": decimals(generator, (rows, columns)),
        "memory_bytes": generator.integers(1, 9, (rows, columns)).astype(float),
        "energy_j": generator.random((rows, columns)) * 10.0 ** generator.integers(-9, 9, (rows, columns)),
    }
    fixed = {"latency_s": 0.7, "memory_bytes": 5.0, "energy_j": 1e-3}
    pairs = None
    if interactions:
        first = generator.integers(0, 2, 5)
        cells = generator.integers(0, columns, (2, 5))
        pairs = Interactions(
            np.stack([first, cells[0]], 1), np.stack([first + 2, cells[1]], 1), decimals(generator, 5) - 1
        )
    peak = {"activation_bytes": Peak(decimals(generator, (2, rows, columns)), [0.1, 0.3])} if peaks else {}
    return mps.CostTable(
        layers,
        mps.precisions("w2 w4 w8 w16"[: 3 * columns]),
        sensitivity,
        usage=usage,
        fixed_usage=fixed,
        interactions=pairs,
        peaks=peak,
    )


def plans(table):
    """Every plan and its amounts, by plain sums."""
    count = sum(layer.numel for layer in table.layers)
    for options in itertools.product(range(len(table.precisions)), repeat=len(table.layers)):
        chosen = {}
        pairs = zip(table.layers, options, strict=True)
        if any(layer.group and chosen.setdefault(layer.group, p) != p for layer, p in pairs):
            continue
        cells = list(enumerate(options))
        if any(math.isnan(table.sensitivity[cell]) for cell in cells):
            continue
        used = {
            name: math.fsum([*(values[cell] for cell in cells), table.fixed_usage[name]])
            for name, values in table.usage.items()
        }
        for name, peak in table.peaks.items():
            steps = zip(peak.usage, peak.fixed, strict=True)
            used[name] = max(math.fsum([*(use[cell] for cell in cells), fixed]) for use, fixed in steps)
        bits = [layer.numel * table.precisions[p].weight_bits for layer, p in zip(table.layers, options, strict=True)]
        used["average_bits"] = sum(bits) / count
        used["effective_bits"] = 8 * math.fsum(table.usage["memory_bytes"][cell] for cell in cells) / count
        damage = [table.sensitivity[cell] for cell in cells]
        if table.interactions is not None:
            ends = zip(table.interactions.first, table.interactions.second, table.interactions.value, strict=True)
            damage += [v for (a, p), (b, q), v in ends if options[a] == p and options[b] == q]
        used["sensitivity"] = math.fsum(damage)
        yield np.array(options), used


def check(table, limits, solver, name, *, own=None):
    """A solve against the enumeration."""
    found = mps.solve(table, mps.Budget(**limits), solver, throw=False)
    pairs = {key: value if isinstance(value, tuple) else (-math.inf, value) for key, value in limits.items()}
    fitting = [
        used["sensitivity"]
        for _, used in plans(table)
        if all(low <= used[key] <= high for key, (low, high) in pairs.items())
    ]
    assert found.status is not Status.INFEASIBLE or not fitting
    if found.plan is None:
        assert not fitting or name not in PROVING
        return
    assert all(low <= found.usage[key] <= high for key, (low, high) in pairs.items())
    options = np.array([table.precisions.index(found.plan[layer.name]) for layer in table.layers])
    expected = next(used for plan, used in plans(table) if (plan == options).all())
    assert {**found.usage, "sensitivity": found.sensitivity} == expected
    size = 1e-12 * max(1.0, np.nansum(np.abs(table.sensitivity)))
    assert found.bound <= min(fitting) + size
    if found.status is Status.OPTIMAL or name in PROVING:
        assert found.sensitivity <= min(fitting) + size
    if name in PROVING:
        assert found.status is Status.OPTIMAL


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("amount", ["latency_s", "energy_j", "average_bits", "effective_bits", "activation_bytes"])
def test_what_a_plan_reports_admits_it_as_a_budget(name, amount):
    solver, count = SMALL[name]
    for seed in range(count):
        table = table_of(seed, peaks=amount == "activation_bytes")
        every = list(plans(table))
        _, used = every[seed * 7 % len(every)]
        check(table, {amount: used[amount]}, solver, name)


@pytest.mark.parametrize("name", PROVING)
def test_several_limits_at_once(name):
    solver, count = SMALL[name]
    for seed in range(count):
        table = table_of(seed, peaks=seed % 2 == 0)
        every = list(plans(table))
        _, used = every[seed * 5 % len(every)]
        check(table, {key: used[key] for key in ("latency_s", "energy_j", "memory_bytes")}, solver, name)


@pytest.mark.parametrize("name", ["brute-force", "ilp", "annealing"])
def test_with_interactions(name):
    solver, count = SMALL[name]
    for seed in range(count):
        table = table_of(seed, interactions=True)
        every = list(plans(table))
        _, used = every[seed * 7 % len(every)]
        check(table, {"latency_s": used["latency_s"]}, solver, name)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "bisection"])
@pytest.mark.parametrize("amount", ["latency_s", "average_bits", "effective_bits"])
def test_a_band_around_what_a_plan_uses(name, amount):
    solver, count = SMALL[name]
    for seed in range(count):
        table = table_of(seed)
        every = list(plans(table))
        _, used = every[seed * 7 % len(every)]
        check(table, {amount: (used[amount], used[amount] * (1.02 if seed % 2 else 1.0))}, solver, name)


@pytest.mark.parametrize("seed", range(20))
def test_the_cheapest_within_a_damage(seed):
    table = table_of(seed)
    every = list(plans(table))
    _, used = every[seed * 7 % len(every)]
    for goal in ("latency_s", "memory_bytes", "average_bits", "effective_bits"):
        found = mps.solve(table, mps.Budget(sensitivity=used["sensitivity"]), minimize=goal)
        least = min(u[goal] for _, u in every if u["sensitivity"] <= used["sensitivity"])
        assert found.usage[goal] == pytest.approx(least, rel=1e-13)
        assert found.bound <= found.usage[goal]


@pytest.mark.parametrize("over", ["latency_s", "memory_bytes", "energy_j", "average_bits", "effective_bits"])
def test_the_exact_front_holds_what_no_plan_beats_as_reported(over):
    for seed in range(25):
        table = table_of(seed)
        staircase = []
        for used in sorted((u[over], u["sensitivity"]) for _, u in plans(table)):
            if not staircase or used[1] < staircase[-1][1]:
                staircase.append(used)
        front = mps.pareto(table, over, method="exact")
        assert list(zip(front.usage.tolist(), front.sensitivity.tolist(), strict=True)) == staircase


@pytest.mark.parametrize("method", ["exact", "epsilon", "hull", "sweep"])
def test_a_front_tells_what_its_plans_tell(method):
    for seed in range(2 if method == "sweep" else 25):
        table = table_of(seed)
        for over in ("latency_s", "energy_j", "average_bits", "effective_bits"):
            front = mps.pareto(table, over, method=method, points=9)
            told = [(point.usage[over], point.sensitivity) for point in front]
            assert list(zip(front.usage.tolist(), front.sensitivity.tolist(), strict=True)) == told
            assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(told))
            assert front.at(told[-1][0]).usage[over] == told[-1][0]


def test_a_front_over_several_tells_what_its_plans_tell():
    for seed in range(10):
        table = table_of(seed)
        front = mps.pareto(table, ("latency_s", "energy_j"))
        told = [(p.usage["latency_s"], p.usage["energy_j"], p.sensitivity) for p in front]
        assert front.usage.tolist() == [u for u, _, _ in told]
        assert front.also_usage[:, 0].tolist() == [u for _, u, _ in told]
        every = {(u["latency_s"], u["energy_j"], u["sensitivity"]) for _, u in plans(table)}
        best = {a for a in every if not any(b != a and all(x <= y for x, y in zip(b, a, strict=True)) for b in every)}
        assert set(told) == best


def test_the_range_is_that_of_plans():
    for seed in range(20):
        table = table_of(seed)
        for name, (low, high) in attainable(table).items():
            used = [u[name] for _, u in plans(table)]
            assert (low, high) == (min(used), max(used))


def test_the_best_several_keep_the_limits():
    for seed in range(20):
        table = table_of(seed)
        every = list(plans(table))
        limit = every[seed * 7 % len(every)][1]["latency_s"]
        found = mps.solve(table, mps.Budget(latency_s=limit), top=4)
        assert all(point.usage["latency_s"] <= limit for point in found)
        values = sorted(u["sensitivity"] for _, u in every if u["latency_s"] <= limit)[:4]
        assert [point.sensitivity for point in found] == pytest.approx(values, rel=1e-12)


def test_sums_of_what_solvers_see_are_exact_in_any_order():
    generator = np.random.default_rng(0)
    for seed in range(20):
        table = table_of(seed)
        problem = Problem.of(table, mps.Budget(latency_s=9.0, energy_j=1e9, memory_bytes=99))
        options = next(plans(table))[0][np.unique(problem.row_of_layer, return_index=True)[1]]
        for usage in problem.usage:
            cells = usage[np.arange(len(options)), options].tolist()
            for _ in range(3):
                assert sum(generator.permutation(cells).tolist()) == math.fsum(cells)
        for plan, used in itertools.islice(plans(table), 20):
            assert usage_of(table, plan) == used


def test_layers_of_many_digits_that_cannot_be_told_apart_are_not_claimed_to_be_solved():
    layers = tuple(mps.Layer(f"l{i}", group=f"g{i // 2}") for i in range(20))
    generator = np.random.default_rng(0)
    use = np.array([1e20, 1.0]) + generator.random((20, 2))
    table = mps.CostTable(layers, mps.precisions("w4 w8"), generator.random((20, 2)), usage={"s": use})
    limit = math.fsum([*use[:4, 0], *use[4:, 1]])
    found = mps.solve(table, mps.Budget(s=limit))
    assert found.usage["s"] <= limit
    assert found.bound <= found.sensitivity
