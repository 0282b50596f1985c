"""The seam between resources and the table: examples, refusals, peaks, several budgets at once."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.resources import ActivationBytes, BitOps, Energy, MemoryBytes, Resource, Roofline
from mpsearch.sensitivity import KLDivergence

OPTIONS = mps.precisions("w2 w4a4 w8a8 w16")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def profile(resources, options=OPTIONS):
    return mps.profile(model(), [torch.randn(4, 6)], KLDivergence(), options, resources=resources, progress=False)


def test_a_function_that_asks_for_the_example_gets_the_first_batch():
    seen = []

    def coins(model, layers, precisions, *, example):
        seen.append(tuple(example.shape))
        return np.ones((len(layers), len(precisions)))

    assert profile({"coins": coins}).usage["coins"].tolist() == [[1.0] * 4] * 3
    assert seen == [(4, 6)]


def test_nan_means_not_allowed():
    def only_eight(model, layers, precisions):
        return [[1.0 if str(p) == "w8a8" or layer.name != "2" else math.nan for p in precisions] for layer in layers]

    table = profile({"coins": only_eight})
    assert table.allowed.tolist() == [[True] * 4, [False, False, True, False], [True] * 4]
    for bits in (2, 8, 16):
        try:
            assert str(mps.solve(table, mps.Budget(average_bits=bits)).plan["2"]) == "w8a8"
        except mps.InfeasibleError:
            assert bits == 2


def test_a_layer_without_any_option_is_refused_by_name():
    def none(model, layers, precisions):
        return [[math.nan if layer.name == "4" else 1.0 for _ in precisions] for layer in layers]

    with pytest.raises(
        mps.TableError, match="no precision of layer '4' is allowed by coins: each of w2, w4a4, w8a8, w16"
    ):
        profile({"coins": none})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda n, p: np.ones((n, p + 1)), r"resource coins has shape \(3, 5\), expected \(3, 4\)"),
        (lambda n, p: np.full((n, p), math.inf), "coins of layer '0' at w2 is infinite"),
        (lambda n, p: "many", r"resource coins returned no numbers of shape \(3, 4\): could not convert"),
    ],
)
def test_wrong_numbers_are_refused(values, message):
    with pytest.raises(mps.TableError, match=message):
        profile({"coins": lambda model, layers, precisions: values(len(layers), len(precisions))})


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (5, r"expected a function of \(model, layers, precisions\) for resource coins, got the int 5"),
        (lambda model, layers: 0, r"resource coins: .*; expected a function of \(model, layers, precisions\)"),
    ],
)
def test_what_is_no_such_function_is_refused(function, words):
    with pytest.raises(mps.TableError, match=words):
        profile({"coins": function})


def test_an_unknown_name_is_refused():
    with pytest.raises(mps.TableError, match="unknown resource 'latency'; did you mean 'latency_s'"):
        profile(["latency"])


def test_five_budgets_at_once_against_enumeration(tmp_path):
    """Peaks and sums together: no plan of all 64 that keeps the limits is better."""
    functions = {"memory_bytes": MemoryBytes(None), "bitops": BitOps()}
    functions |= {"latency_s": Roofline("cortex-m"), "energy_j": Energy(), "activation_bytes": ActivationBytes()}
    table = profile(functions)
    assert set(table.resources) == set(functions)
    table.save(tmp_path / "table.npz")
    assert mps.CostTable.load(tmp_path / "table.npz") == table
    budget = mps.Budget(memory_bytes="60%", bitops="50%", latency_s="99%", energy_j="70%", activation_bytes="70%")
    limits = budget.limits(table)
    found = mps.solve(table, budget)
    best = math.inf
    for columns in itertools.product(range(4), repeat=3):
        totals = {
            name: values[range(3), columns].sum() + table.fixed_usage[name] for name, values in table.usage.items()
        }
        peak = table.peaks["activation_bytes"]
        totals["activation_bytes"] = (peak.usage[:, range(3), columns].sum(1) + peak.fixed).max()
        if all(totals[name] <= limit for name, limit in limits.items()):
            best = min(best, table.sensitivity[range(3), columns].sum())
    assert found.sensitivity == pytest.approx(best)
    assert math.isfinite(best)


def test_a_maximum_is_given_by_steps():
    def steps(model, layers, precisions):
        return Resource(np.arange(24.0).reshape(2, 3, 4), np.array([1.0, 2.0]), 99.0)

    table = profile({"peak": steps})
    assert table.peaks["peak"].fixed.tolist() == [1.0, 2.0]
    assert mps.Budget(peak="50%").limits(table) == {"peak": 49.5}


@pytest.mark.parametrize("function", [Roofline("t4"), Energy()])
def test_a_format_that_cannot_hold_a_layer_is_not_allowed(function):
    net, x = nn.Sequential(nn.Linear(256, 4), nn.Linear(4, 256)), torch.ones(1, 256)
    found = function(net, mps.layers(net, x), mps.precisions("wq4_k w8a8"), example=x)
    assert np.isnan(found.usage).tolist() == [[False, False], [True, False]]
