"""Rank agreement of tables with measured plans, against loops and scipy."""

import itertools

import numpy as np
import pytest
from scipy import stats

import mpsearch as mps
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.evaluation import comparing
from mpsearch.evaluation.comparing import misranked, plan_agreement

OPTIONS = mps.precisions("w2 w4 w8")


def table(layers=6, seed=0, **changes):
    rng = np.random.default_rng(seed)
    names = tuple(mps.Layer(f"l{i}", weight_shape=(int(rng.integers(5, 60)),)) for i in range(layers))
    bytes_ = np.outer([layer.numel for layer in names], [2, 4, 8]) / 8
    sensitivity = np.sort(rng.lognormal(0, 1.5, (layers, 3)), axis=1)[:, ::-1]
    return mps.CostTable(names, OPTIONS, sensitivity, **{"usage": {"memory_bytes": bytes_}, **changes})


def measured(of, count=80, noise=0.5, seed=1):
    """Random plans whose damage is the table's prediction times lognormal noise."""
    rng = np.random.default_rng(seed)
    options = rng.integers(0, len(OPTIONS), (count, len(of.layers)))
    plans = [mps.Plan({x.name: OPTIONS[p] for x, p in zip(of.layers, row, strict=True)}) for row in options]
    damage = [predicted(of, plan) * rng.lognormal(0, noise) for plan in plans]
    return MeasuredPlans(plans, damage, unit="nats")


def predicted(of, plan):
    return sum(of.sensitivity[i, of.precisions.index(plan[x.name])] for i, x in enumerate(of.layers))


def size(of, plan, name="memory_bytes"):
    return sum(of.usage[name][i, of.precisions.index(plan[x.name])] for i, x in enumerate(of.layers))


def test_all_plans_against_scipy():
    of = table()
    plans = measured(of)
    guess = [predicted(of, plan) for plan in plans.plans]
    row = plan_agreement(of, plans)[0]
    assert (row["plans"], row["count"]) == ("all", 80)
    assert row["spearman"] == pytest.approx(stats.spearmanr(guess, plans.damage).statistic)
    assert row["kendall"] == pytest.approx(stats.kendalltau(guess, plans.damage).statistic)


def test_bands_of_equal_size():
    of = table()
    plans = measured(of, count=200)
    _, pooled, *bands = plan_agreement(of, plans)
    assert len(bands) > 2
    sizes = np.array([size(of, plan) for plan in plans.plans])
    for band in bands:
        assert band["largest"] <= band["smallest"] * 1.02
        inside = (sizes >= band["smallest"]) & (sizes <= band["largest"])
        assert inside.sum() >= band["count"] >= 5
        if inside.sum() > band["count"]:  # a neighbour took some
            continue
        guess = np.array([predicted(of, plan) for plan in plans.plans])[inside]
        truth = plans.damage[inside]
        assert band["spearman"] == pytest.approx(stats.spearmanr(guess, truth).statistic)
        assert band["kendall"] == pytest.approx(stats.kendalltau(guess, truth).statistic)
        assert band["first_pick"] == pytest.approx(truth[guess.argmin()] / truth.min())
    most = max(sum(low <= x <= low * 1.02 for x in sizes) for low in sizes)
    assert max(band["count"] for band in bands) == most
    counts = np.array([band["count"] for band in bands])
    assert pooled["count"] == counts.sum()
    for name in ("spearman", "kendall"):
        values, errors = (np.array([band[key] for band in bands]) for key in (name, f"{name}_se"))
        assert pooled[name] == pytest.approx(sum(counts * values) / sum(counts))
        assert pooled[f"{name}_se"] == pytest.approx(np.sqrt(sum((counts * errors) ** 2)) / sum(counts))


def test_the_bands_that_were_meant_are_found():
    """Three clumps of narrow sizes among scattered plans."""
    rng = np.random.default_rng(0)
    clumps = [at * (1 + 0.015 * rng.random(20)) for at in (1000, 2000, 3000)]
    sizes = np.concatenate([*clumps, rng.uniform(500, 4000, 30)])
    found = [members for members in comparing._bands(sizes) if len(members) >= 20]
    assert len(found) == 3
    for number, members in enumerate(found):
        assert set(range(20 * number, 20 * number + 20)) <= set(members.tolist())


def test_sizes_are_average_bits_without_bytes_and_nothing_without_either():
    of = table(usage={})
    rows = plan_agreement(of, measured(of, count=200))
    assert {row["plans"] for row in rows} == {"all", "equal size", "average_bits"}
    bare = mps.CostTable([mps.Layer(x.name) for x in of.layers], OPTIONS, of.sensitivity)
    assert [row["plans"] for row in plan_agreement(bare, measured(of))] == ["all"]


def test_interactions_are_part_of_the_prediction():
    pairs = mps.Interactions([[0, 0]], [[1, 0]], [100.0])
    of = table(layers=2, interactions=pairs)
    every = [mps.Plan({"l0": a, "l1": b}) for a, b in itertools.product(OPTIONS, OPTIONS)]
    damage = [predicted(of, plan) + 100 * (plan["l0"] == plan["l1"] == OPTIONS[0]) for plan in every]
    assert plan_agreement(of, MeasuredPlans(every, damage))[0]["spearman"] == pytest.approx(1)


def test_the_worst_ranked_plans():
    of = table()
    plans = measured(of)
    guess = stats.rankdata([predicted(of, plan) for plan in plans.plans])
    truth = stats.rankdata(plans.damage)
    rows = misranked(of, plans, count=3)
    assert [abs(r["predicted_rank"] - r["measured_rank"]) for r in rows] == sorted(abs(guess - truth))[::-1][:3]
    for row in rows:
        n = row["plan"]
        assert (row["predicted_rank"], row["measured_rank"]) == (guess[n], truth[n])
        assert row["measured"] == plans.damage[n]
        assert row["predicted"] == pytest.approx(predicted(of, plans.plans[n]))


def test_too_few_plans():
    of = table()
    with pytest.raises(mps.TableError, match="2 measured plans, expected 3 or more"):
        plan_agreement(of, measured(of, count=2))


def test_a_measured_zero_is_no_division():
    assert comparing._ratio(0.0, 0.0) == 1
    assert comparing._ratio(1.0, 0.0) == np.inf
