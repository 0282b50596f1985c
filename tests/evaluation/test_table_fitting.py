"""`calibrate` against scipy, explicit loops, and truths that are known."""

import json

import numpy as np
import pytest
from scipy import optimize, stats

import mpsearch as mps
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.evaluation.table_fitting import _fit, calibrate

OPTIONS = mps.precisions("w2 w4 w8 w16")


def table(layers=8, seed=0, **changes):
    rng = np.random.default_rng(seed)
    sensitivity = rng.lognormal(0, 1, (layers, 1)) * np.array([1.0, 0.2, 0.04, 0.0])
    return mps.CostTable([mps.Layer(f"l{i}") for i in range(layers)], OPTIONS, sensitivity, **changes)


def plans(count, layers=8, seed=1):
    """(N, L) random columns, and the plans."""
    options = np.random.default_rng(seed).integers(0, len(OPTIONS), (count, layers))
    return options, [mps.Plan({f"l{i}": OPTIONS[p] for i, p in enumerate(row)}) for row in options]


def damage(sensitivity, options):
    return np.array([sum(sensitivity[i, p] for i, p in enumerate(row)) for row in options])


def test_columns_of_any_scale() -> None:
    """Conditions of a minimum over scales >= 0: no slope at a scale above 0, and none below 0 at a scale of 0."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows, columns = int(rng.integers(5, 15)), int(rng.integers(1, 5))
        features = np.abs(rng.normal(size=(rows, columns))) * 10.0 ** rng.integers(-3, 4, columns)
        damage = features @ np.maximum(rng.normal(size=columns), 0) * rng.lognormal(0, 0.3, rows)
        if not damage.any():
            continue
        scales, scales_se = _fit(features, damage, np.zeros(rows))
        total = features.sum(axis=1)
        spread = np.median(np.abs(damage) / total) * total
        a, b = features / spread[:, None], damage / spread
        together = a.sum(axis=1)
        common = together @ b / (together @ together)
        sigma = np.linalg.norm(b - common * together) / np.sqrt(rows - 1)
        weight = (sigma / common) ** 2 if columns > 1 else 0.0
        slope = a.T @ (a @ scales - b) + weight * (scales - common)
        size = np.linalg.norm(a, axis=0) * np.linalg.norm(b)
        assert (scales >= 0).all()
        assert (scales_se > 0).all()
        assert (slope >= -1e-9 * size).all()
        assert (np.abs(slope)[scales > 0] <= 1e-9 * size[scales > 0]).all()


@pytest.mark.parametrize("per_precision", [False, True])
def test_a_table_that_is_only_off_by_a_factor(per_precision):
    of = table(sensitivity_se=np.full((8, 4), 0.1))
    options, given = plans(10)
    found = calibrate(
        of, MeasuredPlans(given, 0.3 * damage(of.sensitivity, options), unit="nats"), per_precision=per_precision
    )
    np.testing.assert_allclose(found.sensitivity, 0.3 * of.sensitivity, rtol=1e-9)
    np.testing.assert_allclose(found.sensitivity_se, 0.03, rtol=1e-5)
    assert found.unit == "nats"
    facts = found.origin["calibration"]
    assert set(facts["scales"]) == ({"w2", "w4", "w8"} if per_precision else {"all"})
    assert facts["spearman"] == pytest.approx(1)
    assert facts["kendall"] == pytest.approx(1)
    assert facts["relative_error"] == pytest.approx(0, abs=1e-9)


def test_one_scale_is_the_mean_ratio():
    of = table()
    options, given = plans(12)
    predicted = damage(of.sensitivity, options)
    truth = predicted * np.random.default_rng(2).lognormal(0, 0.5, 12)
    facts = calibrate(of, MeasuredPlans(given, truth, unit="nats")).origin["calibration"]
    ratios = truth / predicted
    assert facts["scales"]["all"] == pytest.approx(ratios.mean())
    assert facts["scales_se"]["all"] == pytest.approx(ratios.std(ddof=1) / np.sqrt(12))


def test_a_noisy_measurement_counts_less():
    of = table()
    options, given = plans(12)
    truth = damage(of.sensitivity, options)
    truth[0] *= 100
    loose = np.where(np.arange(12) == 0, 1000 * truth, 0)
    for se, scale in ((loose, 1.0), (None, (11 + 100) / 12), (np.full(12, np.nan), (11 + 100) / 12)):
        found = calibrate(of, MeasuredPlans(given, truth, se, unit="nats")).origin["calibration"]["scales"]["all"]
        assert found == pytest.approx(scale, rel=1e-3)


def test_a_scale_for_each_precision_mends_a_wrong_fall_with_the_bits():
    of = table()
    true = of.sensitivity * np.array([0.5, 4.0, 1.0, 1.0])
    options, given = plans(200)
    noise = np.random.default_rng(2).lognormal(0, 0.05, 200)
    found = calibrate(of, MeasuredPlans(given, damage(true, options) * noise, unit="nats"), per_precision=True)
    facts = found.origin["calibration"]
    assert [facts["scales"][name] for name in ("w2", "w4")] == pytest.approx([0.5, 4.0], rel=0.1)
    one = calibrate(of, MeasuredPlans(given, damage(true, options) * noise, unit="nats")).origin["calibration"]
    assert facts["spearman"] > one["spearman"] + 0.02
    assert facts["relative_error"] < one["relative_error"] / 3


def test_scales_for_each_precision_by_hand():
    """The fit and its standard errors written out with scipy."""
    of = table()
    options, given = plans(9)
    rng = np.random.default_rng(3)
    truth, se = damage(of.sensitivity, options) * rng.lognormal(0, 1, 9), rng.uniform(0, 1, 9)
    facts = calibrate(of, MeasuredPlans(given, truth, se, unit="nats"), per_precision=True).origin["calibration"]
    x = np.array(
        [[sum(of.sensitivity[i, p] for i, p in enumerate(row) if p == k) for k in range(3)] for row in options]
    )
    total = x.sum(axis=1)
    spread = np.sqrt((np.median(truth / total) * total) ** 2 + se**2)
    common = np.sum(truth * total / spread**2) / np.sum((total / spread) ** 2)
    sigma = np.sqrt(np.sum(((truth - common * total) / spread) ** 2) / 8)
    a = np.vstack([x / spread[:, None], sigma / common * np.eye(3)])
    scales, _ = optimize.nnls(a, np.append(truth / spread, np.full(3, sigma)))
    assert list(facts["scales"].values()) == pytest.approx(scales.tolist())
    covariance = sigma**2 * np.linalg.inv(a.T @ a)
    assert list(facts["scales_se"].values()) == pytest.approx(np.sqrt(np.diag(covariance)).tolist())


@pytest.mark.parametrize("per_precision", [False, True])
def test_cross_validation_by_a_loop_that_leaves_each_plan_out(per_precision):
    of = table()
    options, given = plans(10)
    truth = damage(of.sensitivity, options) * np.random.default_rng(3).lognormal(0, 1, 10)
    facts = calibrate(of, MeasuredPlans(given, truth, unit="nats"), per_precision=per_precision).origin["calibration"]
    held_out = []
    for i in range(10):
        rest = MeasuredPlans([*given[:i], *given[i + 1 :]], np.delete(truth, i), unit="nats")
        held_out += damage(calibrate(of, rest, per_precision=per_precision).sensitivity, options[i : i + 1]).tolist()
    assert facts["spearman"] == pytest.approx(stats.spearmanr(held_out, truth).statistic)
    assert facts["kendall"] == pytest.approx(stats.kendalltau(held_out, truth).statistic)
    assert facts["relative_error"] == pytest.approx(np.median(np.abs(np.array(held_out) / truth - 1)))


def test_the_standard_error_against_the_spread_of_repetitions():
    of = table()
    rng = np.random.default_rng(0)
    scales, errors = [], []
    for seed in range(150):
        options, given = plans(12, seed=seed)
        truth = damage(of.sensitivity, options) * rng.normal(1, 0.3, 12)
        facts = calibrate(of, MeasuredPlans(given, truth, unit="nats")).origin["calibration"]
        scales.append(facts["scales"]["all"])
        errors.append(facts["scales_se"]["all"])
    assert np.mean(scales) == pytest.approx(1, abs=4 * np.std(scales) / np.sqrt(150))
    assert np.mean(errors) == pytest.approx(np.std(scales), rel=0.15)


def test_the_error_of_scale_and_table_are_joined():
    of = table(sensitivity_se=np.full((8, 4), 0.5))
    options, given = plans(12)
    truth = damage(of.sensitivity, options) * np.random.default_rng(2).lognormal(0, 0.5, 12)
    found = calibrate(of, MeasuredPlans(given, truth, unit="nats"))
    c, se = (found.origin["calibration"][name]["all"] for name in ("scales", "scales_se"))
    expected = [[np.sqrt((c * 0.5) ** 2 + (s * se) ** 2) for s in row] for row in of.sensitivity]
    np.testing.assert_allclose(found.sensitivity_se, expected)


def test_a_precision_that_no_plan_uses_keeps_the_common_scale():
    of = table()
    options, given = plans(12)
    kept = [i for i, row in enumerate(np.where(options == 2, 1, options).tolist()) if row]
    options = np.where(options == 2, 1, options)[kept]
    given = [mps.Plan({f"l{i}": OPTIONS[p] for i, p in enumerate(row)}) for row in options]
    truth = damage(of.sensitivity, options) * np.random.default_rng(2).lognormal(0, 0.5, len(given))
    several, one = (
        calibrate(of, MeasuredPlans(given, truth, unit="nats"), per_precision=flag).origin["calibration"]
        for flag in (True, False)
    )
    assert several["scales"]["w8"] == pytest.approx(one["scales"]["all"])
    assert several["scales_se"]["w8"] == pytest.approx(one["scales"]["all"])


def test_interactions_are_scaled_too():
    pairs = mps.Interactions([[0, 0]], [[1, 0]], [2.0])
    of = table(interactions=pairs)
    options, given = plans(10)
    truth = 3 * (damage(of.sensitivity, options) + 2 * ((options[:, 0] == 0) & (options[:, 1] == 0)))
    measured = MeasuredPlans(given, truth, unit="nats")
    assert calibrate(of, measured).interactions.value.tolist() == pytest.approx([6.0])
    with pytest.raises(mps.TableError, match="interactions has one scale"):
        calibrate(of, measured, per_precision=True)


def test_options_that_are_not_allowed_stay_so_and_the_rest_of_the_table_too(tmp_path):
    sensitivity = table().sensitivity.copy()
    sensitivity[0, 1] = np.nan
    of = table(origin={"estimator": "X"}, usage={"memory_bytes": np.ones((8, 4))})
    of = mps.CostTable(of.layers, of.precisions, sensitivity, usage=of.usage, origin=of.origin)
    options, _ = plans(10)
    options[:, 0] = 0
    given = [mps.Plan({f"l{i}": OPTIONS[p] for i, p in enumerate(row)}) for row in options]
    measured = MeasuredPlans(given, damage(np.nan_to_num(sensitivity), options), unit="nats", origin={"samples": 7})
    found = calibrate(of, measured)
    assert np.argwhere(np.isnan(found.sensitivity)).tolist() == [[0, 1]]
    assert found.origin["estimator"] == "X"
    assert found.origin["calibration"]["measured"] == {"samples": 7}
    assert found.usage["memory_bytes"].tolist() == of.usage["memory_bytes"].tolist()
    json.dumps(found.origin, allow_nan=False)
    found.save(tmp_path / "table.csv")
    assert mps.CostTable.load(tmp_path / "table.csv") == found


def test_what_cannot_be_calibrated_is_refused():
    of = table()
    options, given = plans(10)
    truth = damage(of.sensitivity, options)
    with pytest.raises(mps.TableError, match="damage is relative, a ranking; expected nats"):
        calibrate(of, MeasuredPlans(given, truth))
    with pytest.raises(mps.TableError, match="2 measured plans that the table gives a damage, expected 3 or more"):
        calibrate(of, MeasuredPlans(given[:2], truth[:2], unit="nats"))
    with pytest.raises(mps.TableError, match="does not rise with the table"):
        calibrate(of, MeasuredPlans(given, -truth, unit="nats"))
    with pytest.raises(mps.TableError, match="does not rise with the table"):
        calibrate(of, MeasuredPlans(given, np.zeros(10), unit="nats"))
    with pytest.raises(mps.PlanError, match="say nothing of layer 'l8'"):
        calibrate(table(layers=9), MeasuredPlans(given, truth, unit="nats"))


def test_damage_that_does_not_vary_has_no_rank_correlation():
    of = mps.CostTable([mps.Layer("a")], OPTIONS, [[2.0, 2.0, 2.0, 0.0]])
    given = [mps.Plan({"a": OPTIONS[p]}) for p in (0, 1, 2)]
    facts = calibrate(of, MeasuredPlans(given, [1, 1, 1], unit="nats")).origin["calibration"]
    assert facts["scales"]["all"] == pytest.approx(0.5)
    assert (facts["spearman"], facts["spearman_se"], facts["kendall"], facts["kendall_se"]) == (None, None, None, None)
