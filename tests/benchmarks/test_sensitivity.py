"""The benchmark's judge, its random plans, its file, its table and its picture."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kendalltau, spearmanr
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity import KLDivergence


@pytest.fixture
def network():
    torch.manual_seed(0)
    sizes = [6, 5, 7, 3, 6, 4]
    parts = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts[:-1]).eval()


NAMES = ("0", "2", "4", "6", "8")
NUMEL = np.array([30, 35, 21, 18, 24])


def batches(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)) for _ in range(count)]


def test_the_judge_has_the_numbers_of_evaluate(sensitivity, network):
    judge = sensitivity.Judge("net", network, batches())
    for options in ([0, 0, 0, 0, 0], [4, 1, 2, 0, 3], [3, 3, 0, 1, 1]):
        names = dict(zip(NAMES, (sensitivity.PRECISIONS[p] for p in options), strict=True))
        expected = mps.evaluate(network, batches(), mps.Plan(names))
        assert judge.kl(np.array(options)) == (expected.kl, expected.kl_se)
        assert judge.plan(np.array(options)) == mps.Plan(names)
        assert judge.options(mps.Plan(names)).tolist() == options
    assert judge.average_bits(np.array([4, 1, 2, 0, 3])) == pytest.approx(NUMEL @ [8, 3, 4, 2, 6] / 128)


def test_every_layer_is_a_decision_of_its_own_also_in_attention(sensitivity, models):
    torch.manual_seed(0)
    images = models.Examples(torch.randn(16, 1, 8, 8), torch.zeros(16, dtype=torch.long))
    trained = models.Trained(models.ViT(depth=1).eval(), images, images)
    judge = sensitivity.Judge("vit", trained.model, images.batches(16))
    truth = sensitivity.Truth(judge, 16)
    assert len(judge.layers) == 8
    assert not any(layer.group for layer in judge.layers)
    rows = filled(sensitivity, trained, truth, "kl", 0, sensitivity.Signal("kl-divergence"))[1]
    table = mps.profile(
        trained.model, images.sample(24, 0).batches(12), KLDivergence(), sensitivity.PRECISIONS, groups="none"
    )
    for row in rows:
        plan = mps.solve(table, mps.Budget(average_bits=row["average_bits_limit"])).plan
        assert row["kl"] == judge.kl(judge.options(plan))[0]


def test_what_was_measured_is_kept_for_the_same_network_alone(sensitivity, network):
    judge = sensitivity.Judge("net", network, batches())
    value = judge.kl(np.array([1, 2, 3, 3, 0]))
    judge.save()
    again = sensitivity.Judge("net", network, batches())
    assert again.known == {"w3 w4 w6 w6 w2": value}
    assert sensitivity.Judge("net", network, batches(seed=2)).known == {}
    with torch.no_grad():
        network[0].weight[0, 0] += 1
    assert sensitivity.Judge("net", network, batches()).known == {}


def test_random_plans_are_of_all_sizes_or_at_their_budget(sensitivity):
    numel = np.random.default_rng(0).lognormal(size=20)
    bits = np.outer(numel / numel.sum(), [2, 3, 4, 6, 8])
    plans = [sensitivity.random_plan(bits, number) for number in range(200)]
    sizes = np.array([bits[np.arange(20), options].sum() for options, _ in plans])
    targets = [target for _, target in plans]
    assert [targets.count(limit) for limit in (None, 2.5, 3, 4, 5)] == [100, 25, 25, 25, 25]
    for size, target in zip(sizes, targets, strict=True):
        assert target is None or abs(size - target) <= sensitivity.BAND
    free = sizes[::2]
    assert free.min() < 3 < 6 < free.max()
    assert len({tuple(options) for options, _ in plans}) == 200
    again, _ = sensitivity.random_plan(bits, 7)
    assert np.array_equal(again, plans[7][0])


def test_a_budget_that_no_plan_comes_close_to_is_refused(sensitivity):
    with pytest.raises(ValueError, match=r"no plan of 1 layers within 0.05 of 2.5 average bits"):
        sensitivity.random_plan(np.array([[2.0, 3.0, 4.0, 6.0, 8.0]]), 1)


@pytest.fixture
def trained(models, network):
    pool, held_out = (
        models.Examples(*(torch.cat(parts) for parts in zip(*batches(6, seed), strict=True))) for seed in (3, 1)
    )
    return models.Trained(network, pool, held_out)


@pytest.fixture
def truth(sensitivity, network):
    return sensitivity.Truth(sensitivity.Judge("net", network, batches()), 40)


def filled(sensitivity, trained, truth, name, seed, signal):
    data = sensitivity.calibration(trained, truth.judge, 24, seed, signal.distilled)
    head = {"model": "net", "estimator": name, "seed": seed, "model_fingerprint": truth.judge.fingerprint}
    rows = sensitivity.measure(truth, trained.model, data, signal, seed)
    return data, [{**head, **row} for row in rows]


def test_rows_against_the_slow_way(sensitivity, trained, truth):
    data, rows = filled(sensitivity, trained, truth, "kl", 0, sensitivity.Signal("kl-divergence"))
    drawn = trained.pool.sample(24, 0).batches(12)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(data.batches, drawn, strict=True))
    table = mps.profile(trained.model, drawn, KLDivergence(), sensitivity.PRECISIONS)
    plans = [mps.Plan({n: sensitivity.PRECISIONS[p] for n, p in zip(NAMES, row, strict=True)}) for row in truth.options]
    predicted = [sum(table.sensitivity[range(5), row]) for row in truth.options]
    damage = [mps.evaluate(trained.model, batches(), plan).kl for plan in plans]
    mended = mps.calibrate(table, data.measured, per_precision=True)
    assert [row["average_bits_limit"] for row in rows] == list(sensitivity.BUDGETS)
    for number, row in enumerate(rows):
        limit = row["average_bits_limit"]
        here = list(range(1 + 2 * number, 40, 8))  # odd plans are at the budgets in turn
        assert (row["plans"], row["plans_at_limit"]) == (40, 5)
        assert row["spearman"] == pytest.approx(spearmanr(predicted, damage)[0])
        assert row["kendall"] == pytest.approx(kendalltau(predicted, damage)[0])
        at_limit = [[values[i] for i in here] for values in (predicted, damage)]
        assert row["spearman_at_limit"] == pytest.approx(spearmanr(*at_limit)[0])
        assert row["random_kl"] == pytest.approx(np.prod(at_limit[1]) ** 0.2)
        assert (
            row["kl"]
            == mps.evaluate(trained.model, batches(), mps.solve(table, mps.Budget(average_bits=limit)).plan).kl
        )
        plan = mps.solve(mended, mps.Budget(average_bits=limit)).plan
        assert row["calibrated_kl"] == mps.evaluate(trained.model, batches(), plan).kl
        uniforms = {
            str(p): mps.evaluate(trained.model, batches(), mps.Plan(dict.fromkeys(NAMES, p))).kl
            for p in sensitivity.PRECISIONS
            if p.weight_bits <= limit
        }
        name = min(uniforms, key=uniforms.get)
        assert (row["uniform"], row["uniform_kl"]) == (name, uniforms[name])
        assert row["passes"] == row["forward_passes"]
    sizes = [float(NUMEL @ [sensitivity.PRECISIONS[p].weight_bits for p in row]) for row in truth.options]
    assert rows[0]["size_spearman"] == pytest.approx(-spearmanr(sizes, damage)[0])


def test_a_uniform_precision_fits_its_own_budget_whatever_the_rounding(sensitivity):
    generator = np.random.default_rng(0)
    over = 0
    for _ in range(20):
        shares = generator.dirichlet(np.ones(9))
        bits = np.outer(shares, [precision.weight_bits for precision in sensitivity.PRECISIONS])
        judge = SimpleNamespace(
            layers=range(9),
            average_bits=lambda options, bits=bits: bits[range(9), options].sum(),
            kl=lambda options: (4.0 ** -options[0], 0.0),
        )
        over += judge.average_bits(np.ones(9, int)) > 3
        found = [sensitivity.uniform_within(judge, limit) for limit in sensitivity.BUDGETS]
        assert found == [("w2", 1.0), ("w3", 0.25), ("w4", 0.0625), ("w4", 0.0625)]
    assert over  # without allowance, w3 would not fit 3 bits


def test_plans_for_calibration_are_measured_on_the_data_and_new_for_each_seed(sensitivity, trained, truth):
    first, second = (sensitivity.calibration(trained, truth.judge, 24, seed, False) for seed in (0, 1))
    for data in (first, second):
        assert len(data.measured) == sensitivity.MEASURED
        for plan, damage in zip(data.measured.plans, data.measured.damage, strict=True):
            assert damage == pytest.approx(mps.evaluate(trained.model, data.batches, plan).kl, rel=1e-6)
    texts = [{" ".join(map(str, plan.values())) for plan in data.measured.plans} for data in (first, second)]
    assert not texts[0] & texts[1]


def test_distilled_data_costs_passes_where_there_is_batch_norm(sensitivity, models, trained, truth, monkeypatch):
    monkeypatch.setattr(sensitivity, "DISTILLATION", 3)
    data = sensitivity.calibration(trained, truth.judge, 24, 0, True)
    assert [tuple(batch.shape) for batch in data.batches] == [(12, 6), (12, 6)]
    assert data.passes == 0
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(12, 2)
    ).eval()
    images = models.Examples(torch.randn(30, 1, 4, 4), torch.zeros(30, dtype=torch.long))
    judge = sensitivity.Judge("conv", network, images.batches(30))
    assert sensitivity.calibration(models.Trained(network, images, images), judge, 8, 0, True).passes == 3


def test_files_are_merged_and_compared(sensitivity, trained, truth, tmp_path, network):
    path = tmp_path / "results" / "out.csv"
    signals = {"kl": sensitivity.Signal("kl-divergence"), "pairs": sensitivity.Signal("hessian-augmented")}
    for seed, name in ((0, "kl"), (1, "kl"), (0, "kl"), (0, "pairs"), (1, "pairs")):
        sensitivity.merge(path, filled(sensitivity, trained, truth, name, seed, signals[name])[1])
    found = sensitivity.read(path)
    keys = found[["estimator", "seed", "average_bits_limit"]].itertuples(index=False, name=None)
    assert list(keys) == list(itertools.product(("kl", "pairs"), (0, 1), sensitivity.BUDGETS))
    for _, row in found.iterrows():
        others = found[found["average_bits_limit"] == row["average_bits_limit"]]
        best = min(others[name].min() for name in ("kl", "calibrated_kl", "uniform_kl"))
        assert row["best_kl"] == pytest.approx(best, rel=1e-4)
        for name in ("kl", "uniform_kl", "random_kl"):
            assert row[f"{name}_over_best"] == pytest.approx(row[name] / best, rel=1e-4)
        assert row["kl_over_uniform"] == pytest.approx(row["kl"] / row["uniform_kl"], rel=1e-4)
        assert pd.isna(row["calibrated_kl"]) == (row["estimator"] == "pairs")  # one scale for all precisions

    lines = [line for line in sensitivity.markdown(found).splitlines() if line.startswith("|")]
    cells_of_lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {cells[0] for cells in cells_of_lines[2:]} == {
        "`kl`",
        "`pairs`",
        "*best uniform precision that fits*",
        "*random plan of that size*",
    }
    qualities = [float(cells[4]) for cells in cells_of_lines[2:]]
    assert qualities == sorted(qualities)
    row = next(cells for cells in cells_of_lines if cells[0] == "`kl`")
    mine = found[found["estimator"] == "kl"]
    assert float(row[4]) == pytest.approx(np.prod(mine["kl_over_best"]) ** (1 / 8), abs=0.006)
    assert float(row[2]) == pytest.approx(mine["spearman"].mean(), abs=0.006)

    sensitivity.picture(path.with_suffix(".png"), pd.concat([found, found.assign(model="twin")]))
    assert path.with_suffix(".png").stat().st_size > 10_000
    with torch.no_grad():
        network[0].weight[0, 0] += 1  # another network by the same name: its rows replace the old ones
    other = sensitivity.Truth(sensitivity.Judge("net", network, batches()), 40)
    sensitivity.merge(path, filled(sensitivity, trained, other, "other", 0, signals["kl"])[1])
    assert set(sensitivity.read(path)["estimator"]) == {"other"}


def test_an_estimator_gets_the_seed_if_it_draws_and_needs_defaults(sensitivity, monkeypatch):
    from dataclasses import make_dataclass

    parts = {
        "a": make_dataclass("A", [("draws", int, 1), ("seed", int, 0)]),
        "b": make_dataclass("B", [("x", int, 2)]),
        "c": make_dataclass("C", ["metric"]),
    }
    monkeypatch.setattr(sensitivity, "ESTIMATORS", parts)
    made = sensitivity.Signal("a", {"draws": 4}).estimator(5)
    assert (made.draws, made.seed) == (4, 5)
    assert sensitivity.Signal("b").estimator(5).x == 2
    assert sensitivity.Signal("c", {"metric": 1}).estimator(5).metric == 1
    with pytest.raises(mps.EstimatorError, match="no default for metric"):
        sensitivity.Signal("c").estimator(5)


def test_every_estimator_has_a_row_and_a_family(sensitivity):
    assert {signal.kind for signal in sensitivity.SIGNALS.values()} == set(sensitivity.ESTIMATORS)
    assert set(sensitivity.WELL_KNOWN) <= set(sensitivity.SIGNALS)
    members = [name for _, _, names in sensitivity.FAMILIES.values() for name in names]
    assert len(members) == len(set(members))
    assert set(members) <= set(sensitivity.ESTIMATORS)
    assert sensitivity.family("fisher, 4 draws") == sensitivity.family("fisher") == "curvature"
    assert sensitivity.family("snip") == "gradients"


def test_labels_are_moved_no_further_than_they_must(sensitivity):
    assert sensitivity._apart([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert sensitivity._apart([0.5, 0.5, 0.9], 0.2) == pytest.approx([0.4, 0.6, 0.9])
    assert sensitivity._apart([0.9, 0.95, 0.95], 0.25) == pytest.approx([0.5, 0.75, 1.0])
    assert sensitivity._apart([0.0, 0.0, 0.9], 0.25) == pytest.approx([0, 0.25, 0.9])


def test_advice_is_given_where_its_signals_have_run(sensitivity, monkeypatch):
    monkeypatch.setattr(sensitivity, "ADVICE", ("take {a, 2 draws:.1f}", "not {b} but {b after:.2f}", "nor {c:.2f}"))
    assert sensitivity.advice({"a, 2 draws": 1.25, "b": 3.0, "b after": 2.0}) == "- take 1.2\n- not 3.0 but 2.00\n"


def test_every_piece_of_advice_names_signals_that_there_are(sensitivity):
    names = {"uniform", "random", *sensitivity.SIGNALS, *(f"{name} after" for name in sensitivity.SIGNALS)}
    assert len(sensitivity.advice(dict.fromkeys(names, 1.0)).splitlines()) == len(sensitivity.ADVICE) <= 10
