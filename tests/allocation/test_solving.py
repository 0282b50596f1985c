"""The doors `solve` and `pareto`: names, groups, budgets, proofs, refusals."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

import mpsearch as mps
from mpsearch.core.solution import Choice, relative_gap
from mpsearch.solvers import SOLVERS

DATA = Path(__file__).resolve().parents[1] / "data"


def random_table(seed, rows=5, options=3, **more):
    generator = np.random.default_rng(seed)
    layers = tuple(mps.Layer(f"layer{i}", weight_shape=(int(generator.integers(1, 50)),)) for i in range(rows))
    sensitivity = generator.random((rows, options)) * [[4.0**-p for p in range(options)]]
    usage = {
        "memory_bytes": generator.integers(1, 30, (rows, options)).cumsum(axis=1),
        "latency_s": generator.random((rows, options)),
    }
    return mps.CostTable(
        layers,
        mps.precisions("w2 w4 w8 w16")[:options],
        sensitivity,
        None,
        usage,
        {"memory_bytes": 7.0},
        **more,
    )


def plans(table):
    """Every plan: totals as the documentation defines them, without any code of the door."""
    rows = range(len(table.layers))
    for options in itertools.product(range(len(table.precisions)), repeat=len(table.layers)):
        total = math.fsum(table.sensitivity[i, options[i]] for i in rows)
        if math.isnan(total):
            continue
        pairs = table.interactions
        if pairs is not None:
            for (a, p), (b, q), value in zip(pairs.first, pairs.second, pairs.value, strict=True):
                total += value if options[a] == p and options[b] == q else 0.0
        used = {
            name: math.fsum(values[i, options[i]] for i in rows) + table.fixed_usage.get(name, 0.0)
            for name, values in table.usage.items()
        }
        for name, peak in table.peaks.items():
            used[name] = max(
                math.fsum(step[i, options[i]] for i in rows) + fixed
                for step, fixed in zip(peak.usage, peak.fixed, strict=True)
            )
        numel = [layer.numel for layer in table.layers]
        bits = [table.precisions[p].weight_bits for p in options]
        used["average_bits"] = sum(n * b for n, b in zip(numel, bits, strict=True)) / sum(numel)
        groups = {}
        agree = all(
            groups.setdefault(layer.group, p) == p
            for layer, p in zip(table.layers, options, strict=True)
            if layer.group
        )
        if agree:
            yield total, used, options


def best(table, goal="sensitivity", **limits):
    found = [
        (total if goal == "sensitivity" else used[goal], options)
        for total, used, options in plans(table)
        if all((total if name == "sensitivity" else used[name]) <= limit for name, limit in limits.items())
    ]
    return min(found, default=None)


def chosen(table, solution):
    return tuple(table.precisions.index(solution.plan[layer.name]) for layer in table.layers)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "limits",
    [
        {"memory_bytes": 150},
        {"average_bits": 4},
        {"memory_bytes": 170, "latency_s": 2.5},
        {"memory_bytes": 170, "latency_s": 2.5, "average_bits": 4.5},
    ],
)
def test_the_plan_is_the_best_of_all_plans(seed, limits):
    table = random_table(seed)
    truth = best(table, **limits)
    solution = mps.solve(table, mps.Budget(**limits), throw=False)
    if truth is None:
        assert solution.status is mps.Status.INFEASIBLE
        assert solution.plan is None
        return
    assert solution.status is mps.Status.OPTIMAL
    assert solution.sensitivity == pytest.approx(truth[0], rel=1e-12)
    assert solution.gap == 0
    for name, limit in limits.items():
        assert solution.usage[name] <= limit


@pytest.mark.parametrize("seed", range(8))
def test_the_other_direction_least_resource_within_a_damage(seed):
    table = random_table(seed)
    truth = best(table, "memory_bytes", sensitivity=0.9)
    solution = mps.solve(table, mps.Budget(sensitivity=0.9), minimize="memory_bytes", throw=False)
    if truth is None:
        assert solution.status is mps.Status.INFEASIBLE
    else:
        assert solution.usage["memory_bytes"] == truth[0]
        assert solution.bound == truth[0]
        assert solution.sensitivity <= 0.9
        assert solution.minimized == "memory_bytes"


@pytest.mark.parametrize("seed", range(8))
def test_layers_of_a_group_share_a_precision(seed):
    table = random_table(seed)
    groups = ["g", "", "g", "h", "h"]
    layers = [
        mps.Layer(x.name, weight_shape=x.weight_shape, group=g) for x, g in zip(table.layers, groups, strict=True)
    ]
    table = mps.CostTable(**{**table.__dict__, "layers": layers})
    solution = mps.solve(table, mps.Budget(memory_bytes=170), throw=False)
    truth = best(table, memory_bytes=170)
    assert (solution.plan is None) == (truth is None)
    if truth is not None:
        assert solution.sensitivity == pytest.approx(truth[0], rel=1e-12)
        assert solution.plan["layer0"] == solution.plan["layer2"]


@pytest.mark.parametrize("seed", range(6))
def test_a_peak_resource_is_a_maximum_over_steps(seed):
    generator = np.random.default_rng(seed)
    peak = mps.Peak(generator.integers(0, 9, (3, 5, 3)), [1.0, 2.0, 0.0])
    table = random_table(seed, peaks={"activation_bytes": peak})
    limits = {"activation_bytes": 16, "memory_bytes": 200}
    truth = best(table, **limits)
    solution = mps.solve(table, mps.Budget(**limits), throw=False)
    assert (solution.plan is None) == (truth is None)
    if truth is not None:
        assert solution.sensitivity == pytest.approx(truth[0], rel=1e-12)
        assert solution.usage["activation_bytes"] <= 16


@pytest.mark.parametrize("seed", range(4))
def test_interactions_count_once_for_a_chosen_pair(seed):
    generator = np.random.default_rng(seed)
    pairs = [(a, p, b, q) for a in range(4) for b in range(a + 1, 4) for p in range(3) for q in range(3)]
    cells = np.array(pairs)
    table = random_table(seed, rows=4)
    layers = [
        mps.Layer(x.name, weight_shape=x.weight_shape, group="g" if i < 2 else "") for i, x in enumerate(table.layers)
    ]
    fields = {
        **table.__dict__,
        "layers": layers,
        "interactions": mps.Interactions(cells[:, :2], cells[:, 2:], generator.normal(size=len(cells)) / 4),
    }
    table = mps.CostTable(**fields)
    solution = mps.solve(table, mps.Budget(memory_bytes=150))
    assert solution.sensitivity == pytest.approx(best(table, memory_bytes=150)[0], rel=1e-9)
    with pytest.raises(mps.SolverError, match="cannot take the table's"):
        mps.solve(table, mps.Budget(memory_bytes=150), SOLVERS["greedy"]())


@pytest.mark.parametrize("seed", range(5))
def test_the_best_several_plans(seed):
    table = random_table(seed)
    truth = sorted(total for total, used, _ in plans(table) if used["memory_bytes"] <= 180)[:7]
    found = mps.solve(table, mps.Budget(memory_bytes=180), top=7)
    assert [solution.sensitivity for solution in found] == pytest.approx(truth, rel=1e-12)
    assert len({chosen(table, solution) for solution in found}) == len(truth)


def test_infeasible_says_the_least_and_where_it_goes():
    table = random_table(0)
    least = [used["memory_bytes"] for _, used, _ in plans(table)]
    with pytest.raises(mps.InfeasibleError) as caught:
        mps.solve(table, mps.Budget(memory_bytes=10))
    assert f"the least any plan uses is {min(least):.6g}" in str(caught.value)
    assert "in layer 'layer" in str(caught.value)
    solution = mps.solve(table, mps.Budget(memory_bytes=10), throw=False)
    assert solution.stats["reason"] == str(caught.value)


def test_a_budget_below_what_is_fixed_is_refused_with_the_breakdown():
    usage = {"memory_bytes": [[10, 20], [30, 40]]}
    layers = (mps.Layer("a"), mps.Layer("b"))
    table = mps.CostTable(
        layers, mps.precisions("w2 w4"), np.ones((2, 2)), usage=usage, fixed_usage={"memory_bytes": 700}
    )
    with pytest.raises(mps.InfeasibleError) as caught:
        mps.solve(table, mps.Budget(memory_bytes=500))
    assert str(caught.value) == (
        "memory_bytes <= 500 cannot be met: the least any plan uses is 740, 700 of it fixed (what no decision touches, such as "
        "norms, biases and layers left alone) and 30 of it in layer 'b'"
    )


def test_infeasible_together():
    usage = {"x": [[1, 5]], "y": [[5, 1]]}
    table = mps.CostTable((mps.Layer("a"),), mps.precisions("w2 w4"), [[1, 0]], usage=usage)
    with pytest.raises(mps.InfeasibleError, match="together, though each alone"):
        mps.solve(table, mps.Budget(x=3, y=3))


def test_a_limit_met_exactly_is_met():
    table = random_table(3)
    for _, used, _ in itertools.islice(plans(table), 0, None, 17):
        solution = mps.solve(table, mps.Budget(memory_bytes=used["memory_bytes"], latency_s=used["latency_s"]))
        assert solution.usage["latency_s"] <= used["latency_s"]


class Liar:
    """A solver that returns what it is told."""

    def __init__(self, choice):
        self.choice = choice

    def choose(self, sensitivity, usage, limits):
        return self.choice


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (Choice(np.array([1, 1]), mps.Status.OPTIMAL), "more than"),
        (Choice(np.array([0, 0]), mps.Status.FEASIBLE, bound=99.0), "claims that no plan is below"),
        (Choice(np.array([0, 7]), mps.Status.OPTIMAL), "columns of the table"),
        (Choice(np.array([0]), mps.Status.OPTIMAL), "expected"),
        (Choice(np.array([0, 2]), mps.Status.OPTIMAL), "not allowed"),
        (Choice(None, mps.Status.INFEASIBLE), "the least that any plan uses fits"),
        (Choice(None, mps.Status.UNSOLVED), "no proof that there is none"),
    ],
)
def test_a_solver_is_never_trusted(choice, words):
    table = mps.CostTable(
        (mps.Layer("a"), mps.Layer("b")),
        mps.precisions("w2 w4 w8"),
        [[2, 1, 0], [2, 1, np.nan]],
        usage={"x": [[1, 2, 3], [1, 2, 0]]},
    )
    with pytest.raises(mps.SolverError, match=words):
        mps.solve(table, mps.Budget(x=3), Liar(choice))


@pytest.mark.parametrize(
    ("budget", "more", "words"),
    [
        ({"memory_byte": 3}, {}, "did you mean 'memory_bytes'"),
        ({"memory_bytes": 300}, {"minimize": "memory_byte"}, "did you mean 'memory_bytes'"),
        ({"memory_bytes": 300}, {"minimize": "memory_bytes"}, "both minimized and limited"),
    ],
)
def test_budgets_that_do_not_fit_the_table(budget, more, words):
    with pytest.raises(mps.BudgetError, match=words):
        mps.solve(random_table(0), mps.Budget(**budget), **more)


def test_average_bits_needs_the_number_of_weights():
    table = mps.CostTable((mps.Layer("a"),), mps.precisions("w4"), [[1]])
    with pytest.raises(mps.TableError, match="numel"):
        mps.solve(table, mps.Budget(average_bits=4))


def test_a_group_without_a_common_option():
    layers = (mps.Layer("a", group="g"), mps.Layer("b", group="g"))
    table = mps.CostTable(layers, mps.precisions("w2 w4"), [[1, np.nan], [np.nan, 1]])
    with pytest.raises(mps.TableError, match="a, b share one precision"):
        mps.solve(table, mps.Budget())


def test_the_plan_carries_its_proof():
    solution = mps.solve(random_table(1), mps.Budget(memory_bytes=150))
    assert solution.plan.predicted["status"] == "optimal"
    assert solution.plan.predicted["gap"] == 0
    assert solution.plan.usage == solution.usage
    assert dict(solution.plan.budget) == {"memory_bytes": 150}
    json.dumps([dict(solution.plan.predicted), dict(solution.plan.origin), dict(solution.stats)])


def hawq():
    return json.loads((DATA / "hawq_resnet18.json").read_text())


def hawq_table(data):
    inputs = data["inputs"]
    group = {}
    for number, pair in enumerate(inputs["tied_pairs"]):
        group |= dict.fromkeys(pair, f"residual{number}")
    trace = np.array(inputs["hessian_trace_normalized"])[:, None]
    squared = np.array([inputs["delta_w_sq_4bit"], inputs["delta_w_sq_8bit"]]).T
    layers = tuple(
        mps.Layer(name, "conv2d", (numel,), macs, group.get(i, ""))
        for i, (name, numel, macs) in enumerate(zip(inputs["layers"], inputs["params"], inputs["macs"], strict=True))
    )
    latency = np.array([inputs["latency_ms_int4"], inputs["latency_ms_int8"]]).T
    usage = {
        "modelsize": np.outer(inputs["params"], [4, 8]),
        "bops": np.outer(inputs["macs"], [16, 64]),
        "latency": np.round(latency * 1e8),
    }
    return mps.CostTable(layers, mps.precisions("w4a4 w8a8"), trace * squared, usage=usage)


@pytest.mark.parametrize("solver", ["exact", "ilp", "dynamic-programming"])
def test_the_published_optima_of_hawq(solver):
    data = hawq()
    table = hawq_table(data)
    for case, truth in data["optimum"].items():
        resource = case.rsplit("_", 1)[0]
        solution = mps.solve(table, mps.Budget(**{resource: truth["limit"]}), SOLVERS[solver]())
        assert solution.status is mps.Status.OPTIMAL, case
        assert [precision.weight_bits for precision in solution.plan.values()] == truth["optimal_bits"], case
        assert solution.sensitivity == pytest.approx(truth["optimal_sensitivity"], abs=1e-11)


def staircase(table, over):
    found = sorted((used[over], total) for total, used, _ in plans(table))
    kept = []
    for use, total in found:
        if not kept or total < kept[-1][1]:
            if kept and kept[-1][0] == use:
                continue
            kept.append((use, total))
    return kept


@pytest.mark.parametrize("over", ["memory_bytes", "average_bits", "latency_s"])
@pytest.mark.parametrize("seed", range(5))
def test_the_exact_front_is_the_staircase_of_all_plans(seed, over):
    table = random_table(seed)
    front = mps.pareto(table, over)
    truth = staircase(table, over)
    assert front.method.startswith("exact")
    assert [point.usage[over] for point in front] == pytest.approx([use for use, _ in truth], rel=1e-12)
    assert [point.sensitivity for point in front] == pytest.approx([total for _, total in truth], rel=1e-12)
    assert all(point.status is mps.Status.OPTIMAL for point in front)
    for use, total in truth[:: max(1, len(truth) // 5)]:
        if over != "average_bits":
            assert mps.solve(table, mps.Budget(**{over: use})).sensitivity == pytest.approx(total, rel=1e-12)


@pytest.mark.parametrize("method", ["hull", "epsilon", "sweep"])
def test_every_front_is_undominated_and_has_both_ends(method):
    table = random_table(1, rows=6)
    front = mps.pareto(table, method=method)
    truth = staircase(table, "memory_bytes")
    assert (front.usage[0], front.usage[-1]) == (truth[0][0], truth[-1][0])
    assert (np.diff(front.usage) > 0).all()
    assert (np.diff(front.sensitivity) < 0).all()
    for point, gap in zip(front, front.gap, strict=True):
        lower = min(total for use, total in truth if use <= point.usage["memory_bytes"])
        assert point.sensitivity * (1 - gap) <= lower + 1e-12


def test_a_front_under_a_second_budget():
    table = random_table(2)
    front = mps.pareto(table, budget=mps.Budget(latency_s=3.0), points=200)
    assert len(front)
    for point in front:
        truth = best(table, memory_bytes=point.usage["memory_bytes"], latency_s=3.0)
        assert point.usage["latency_s"] <= 3.0
        assert point.sensitivity == pytest.approx(truth[0], rel=1e-12)


def test_at_gives_the_best_point_that_fits(tmp_path):
    table = random_table(0)
    front = mps.pareto(table)
    for limit in (120, 150, 200):
        assert front.at(limit).sensitivity == pytest.approx(best(table, memory_bytes=limit)[0], rel=1e-12)
    assert front.at(mps.Budget(latency_s=3.0)).usage["latency_s"] <= 3.0
    with pytest.raises(mps.InfeasibleError, match="the least memory_bytes"):
        front.at(1)
    front.save(tmp_path / "front.csv")
    lines = (tmp_path / "front.csv").read_text().splitlines()
    assert lines[0] == "memory_bytes,sensitivity,gap,layer0,layer1,layer2,layer3,layer4"
    assert len(lines) == 1 + len(front) == 1 + len(front.to_frame())
    assert front[-1].usage == list(front)[-1].usage


def test_a_front_over_what_is_not_there():
    with pytest.raises(mps.BudgetError, match="did you mean 'memory_bytes'"):
        mps.pareto(random_table(0), "memory")
    with pytest.raises(mps.BudgetError, match="axis"):
        mps.pareto(random_table(0), budget=mps.Budget(memory_bytes=100))


def test_gaps():
    assert relative_gap(1.0, -math.inf) != relative_gap(1.0, -math.inf)
    assert relative_gap(-1.0, -2.0) == 0.5


@pytest.mark.parametrize("seed", range(5))
def test_a_front_over_two_resources_holds_every_plan_that_none_beats(tmp_path, seed):
    table = random_table(seed, rows=4)
    over = ("memory_bytes", "average_bits")
    front = mps.pareto(table, over)
    points = sorted({tuple([used[name] for name in over] + [total]) for total, used, _ in plans(table)})
    best_points = [
        p for p in points if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)
    ]
    found = [(p.usage[over[0]], p.usage[over[1]], p.sensitivity) for p in front]
    np.testing.assert_allclose(found, best_points, rtol=1e-12)
    for limits in ({"memory_bytes": 110}, {"average_bits": 4.0}, {"memory_bytes": 130, "average_bits": 5.0}):
        truth = best(table, **limits)
        if truth is not None:
            assert front.at(mps.Budget(**limits)).sensitivity == pytest.approx(truth[0])
    front.save(tmp_path / "front.csv")
    assert (tmp_path / "front.csv").read_text().startswith("memory_bytes,average_bits,sensitivity,gap,layer0")
    front.plot(tmp_path / "front.png")
    with pytest.raises(mps.BudgetError, match="different"):
        mps.pareto(table, ["memory_bytes", "memory_bytes"])
    with pytest.raises(mps.SolverError, match="several resources is exact"):
        mps.pareto(table, over, method="hull")


def test_the_published_optima_of_hawq_on_the_command_line(tmp_path, capsys):
    from mpsearch.cli import main

    data = hawq()
    hawq_table(data).save(tmp_path / "hawq.csv")
    for case, truth in data["optimum"].items():
        limit = f"{case.rsplit('_', 1)[0]}={truth['limit']!r}"
        for solver in ("exact", "ilp"):
            arguments = ["solve", str(tmp_path / "hawq.csv"), "--budget", limit, "--solver", solver, "--json"]
            assert main(arguments) == 0
            found = json.loads(capsys.readouterr().out)
            assert [mps.Precision.parse(text).weight_bits for text in found["layers"].values()] == truth["optimal_bits"]
