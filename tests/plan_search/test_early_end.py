"""A budget that leaves nothing to search is told before any pass, and its plan measured all the same."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.core.problem import Problem
from mpsearch.plan_search.early_end import early_end


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))


def batches(number=6):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, 16, generator=generator) for _ in range(number)]


def search(precisions, budget, **arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = mps.search(net(), batches(), budget, mps.precisions(precisions), progress=False, **arguments)
    return result, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("precisions", ["w2 w4 w8", "w4 w16", "w4a8 w8a8", "w4g8 w4 w3"])
@pytest.mark.parametrize("effort", ["fast", "default"])
def test_the_highest_precision_fits(precisions, effort):
    result, told = search(precisions, mps.Budget(memory_bytes="300%"), effort=effort)
    widest = {"w2 w4 w8": "w8", "w4 w16": "w16", "w4a8 w8a8": "w8a8", "w4g8 w4 w3": "w4g8"}[precisions]
    assert {str(p) for p in result.plan.values()} == {widest}
    assert result.passes < 4
    assert f"the highest precision fits the budget, {widest} in every layer" in result.verdict
    assert any("the highest precision fits" in one for one in told)
    assert result.comparison[0].name == "plan"
    if "a" not in precisions:  # else the ranges of the inputs differ
        expected = mps.evaluate(net(), batches(), result.plan).kl
        assert result.measured.kl == pytest.approx(expected, rel=0.5, abs=1e-9)


def test_what_was_not_searched_is_saved_and_shown_all_the_same(tmp_path):
    result, _ = search("w2 w8", mps.Budget(average_bits=8))
    result.save(tmp_path / "out")
    again = mps.SearchResult.load(tmp_path / "out")
    assert again.verdict == result.verdict
    assert dict(again.plan) == dict(result.plan)
    result.report(tmp_path / "page.html")
    result.plot(tmp_path / "front.png")
    assert result.verdict in str(result)


def test_only_one_plan_fits():
    layers = mps.layers(net(), batches()[0])
    count = sum(layer.numel for layer in layers)
    least = 2.0 + 2 * layers[2].numel / count  # the narrowest option everywhere; the last layer may not have it
    result, told = search("w2 w4", mps.Budget(average_bits=least), allow={"4": "w4 w8"})
    assert [str(p) for p in result.plan.values()] == ["w2", "w2", "w4"]
    assert result.passes < 4
    assert result.verdict.startswith("only one plan fits the budget, so nothing was searched")
    assert any("only one plan fits" in one for one in told)


def test_every_layer_is_fixed():
    fixed = mps.Plan({name: mps.Precision(bits) for name, bits in (("0", "3"), ("2", "4"), ("4", "8"))})
    result, _ = search("w2 w4", mps.Budget(average_bits=8), fixed=fixed)
    assert dict(result.plan) == dict(fixed)
    assert result.passes < 4


def test_a_search_between_is_not_ended():
    result, told = search("w2 w4 w8", mps.Budget(average_bits=4.5), effort="fast")
    assert "nothing was searched" not in result.verdict
    assert not any("searched" in one for one in told)


@pytest.mark.parametrize("seed", range(12))
def test_one_plan_is_claimed_only_where_enumeration_finds_one(seed):
    generator = np.random.default_rng(seed)
    layers = tuple(mps.Layer(f"l{i}", weight_shape=(int(generator.integers(1, 5)),)) for i in range(4))
    usage = {name: generator.integers(1, 6, (4, 3)) / 10 for name in ("a_s", "b_s")}
    table = mps.CostTable(layers, mps.precisions("w2 w4 wfp8_e4m3"), np.zeros((4, 3)), usage=usage)
    sums = [
        tuple(float(np.float64(sum(usage[name][i, p] for i, p in enumerate(options)))) for name in usage)
        for options in itertools.product(range(3), repeat=4)
    ]
    for a, b in sums[:: 7 + seed]:
        fitting = sum(x <= a + 1e-9 and y <= b + 1e-9 for x, y in sums)
        end = early_end(Problem.of(table, mps.Budget(a_s=a + 1e-9, b_s=b + 1e-9)))
        if end is not None and "only" in end.reason:
            assert fitting == 1
        elif end is None:
            assert fitting != 1


def test_formats_of_equal_width_are_not_ranked():
    table = mps.CostTable((mps.Layer("a", weight_shape=(4,)),), mps.precisions("w8 wfp8_e4m3"), [[0, 0]])
    assert early_end(Problem.of(table, mps.Budget(average_bits=8))) is None
    mixed = mps.CostTable((mps.Layer("a", weight_shape=(4,)),), mps.precisions("w8a4 w4a8"), [[0, 0]])
    assert early_end(Problem.of(mixed, mps.Budget(average_bits=8))) is None


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("options", ["w2 w4", "w2 w3 w4 w8"])
def test_fast_works_on_models_of_one_or_two_layers(layers, options):
    torch.manual_seed(0)
    sizes = [16, 12, 8] if layers == 2 else [16, 8]
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    for size in (4, 16):
        data = [torch.randn(size, 16) for _ in range(6)]
        result = mps.search(
            model, data, mps.Budget(average_bits=3), mps.precisions(options), effort="fast", progress=False
        )
        assert result.passes <= 8
        assert result.plan.usage["average_bits"] <= 3
