"""The benchmark's judge, its random plans and its file."""

import itertools

import numpy as np
import pytest
import torch
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
    assert judge.average_bits(np.array([4, 1, 2, 0, 3])) == pytest.approx(NUMEL @ [8, 3, 4, 2, 6] / 128)
    assert judge.best(8) == min(kl for kl, _ in judge.known.values())
    assert judge.best(2) == judge.kl(np.zeros(5, int))[0]


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


def test_one_row_a_budget_merged_into_the_file(sensitivity, models, network, tmp_path):
    judge = sensitivity.Judge("net", network, batches())
    calibration = models.Examples(*(torch.cat(parts) for parts in zip(*batches(seed=3), strict=True)))
    path = tmp_path / "results" / "out.csv"
    for seed in (0, 1, 0):
        rows = sensitivity.measure(judge, network, calibration, KLDivergence(), 40)
        head = {"model": "net", "estimator": "kl", "seed": seed, "model_fingerprint": judge.fingerprint}
        sensitivity.merge(path, judge, [{**head, **row} for row in rows])
    found = sensitivity.read(path)
    assert [(row["seed"], row["average_bits_limit"]) for row in found] == [
        (seed, limit) for seed in (0, 1) for limit in sensitivity.BUDGETS
    ]
    table = mps.profile(network, calibration.batches(12), KLDivergence(), sensitivity.PRECISIONS)
    for row in found[:4]:
        limit = row["average_bits_limit"]
        plan = mps.solve(table, mps.Budget(average_bits=limit)).plan
        uniforms = {
            str(p): mps.evaluate(network, batches(), mps.Plan(dict.fromkeys(NAMES, p))).kl
            for p in sensitivity.PRECISIONS
            if p.weight_bits <= limit
        }
        name = min(uniforms, key=uniforms.get)
        assert row["kl"] == pytest.approx(mps.evaluate(network, batches(), plan).kl, rel=1e-5)
        assert (row["uniform"], row["uniform_kl"]) == (name, pytest.approx(uniforms[name], rel=1e-5))
        assert row["kl_over_uniform"] == pytest.approx(row["kl"] / uniforms[name], rel=1e-4)
        assert row["best_kl"] == pytest.approx(judge.best(limit), rel=1e-5)
        assert row["best_kl"] <= row["kl"]
        assert (row["plans"], row["plans_at_limit"]) == (40, 5)
        assert row["passes"] == row["forward_passes"]
    with torch.no_grad():
        network[0].weight[0, 0] += 1  # another network by the same name: its rows replace the old ones
    other = sensitivity.Judge("net", network, batches())
    rows = sensitivity.measure(other, network, calibration, KLDivergence(), 8)
    head = {"model": "net", "estimator": "other", "seed": 0, "model_fingerprint": other.fingerprint}
    sensitivity.merge(path, other, [{**head, **row} for row in rows])
    assert {row["estimator"] for row in sensitivity.read(path)} == {"other"}
    sensitivity.picture(path.with_suffix(".png"), sensitivity.read(path))
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_an_estimator_gets_the_seed_if_it_draws_and_needs_defaults(sensitivity):
    from dataclasses import make_dataclass

    assert sensitivity.settings(make_dataclass("A", [("seed", int, 0)]), 5).seed == 5
    assert sensitivity.settings(make_dataclass("B", [("x", int, 2)]), 5).x == 2
    with pytest.raises(mps.EstimatorError, match="no default for metric"):
        sensitivity.settings(make_dataclass("C", ["metric"]), 5)


def test_labels_are_moved_no_further_than_they_must(sensitivity):
    assert sensitivity._apart([0.1, 0.5, 0.9], 0.1) == [0.1, 0.5, 0.9]
    assert sensitivity._apart([0.5, 0.5, 0.9], 0.2) == pytest.approx([0.4, 0.6, 0.9])
    assert sensitivity._apart([0.9, 0.95, 0.95], 0.25) == pytest.approx([0.5, 0.75, 1.0])
    assert sensitivity._apart([0.0, 0.0, 0.9], 0.25) == pytest.approx([0, 0.25, 0.9])
