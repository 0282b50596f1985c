"""Prices of ties, against an enumeration of all plans; scores of the layers of a tie."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.cli import main
from mpsearch.sensitivity import Fisher, FisherProjection, KLDivergence, OutputGradient

OPTIONS = mps.precisions("w2 w4 w8")


def random_table(seed, groups=("g (one matrix in vllm)", "", "h", "")):
    """Groups of two, two, one and one layers."""
    generator = np.random.default_rng(seed)
    titles = [groups[0]] * 2 + [groups[1]] + [groups[2]] * 2 + [groups[3]]
    layers = [
        mps.Layer(f"{name}", weight_shape=(int(generator.integers(1, 9)),), group=title)
        for name, title in zip("gabhcd", titles, strict=True)
    ]
    scores = np.sort(generator.exponential(size=(len(layers), len(OPTIONS))))[:, ::-1]
    sizes = np.array([[layer.numel * p.weight_bits for p in OPTIONS] for layer in layers], float)
    return mps.CostTable(layers, OPTIONS, scores, usage={"memory_bytes": sizes, "coins": generator.random(sizes.shape)})


def least(table, limit, ties, goal="sensitivity"):
    """By enumeration: of all plans that keep the ties within a limit on bytes (or on the damage, where coins are least)."""
    best = math.inf
    rows = np.arange(len(table.layers))
    costs, limited = (
        (table.sensitivity, table.usage["memory_bytes"])
        if goal == "sensitivity"
        else (table.usage[goal], table.sensitivity)
    )
    for options in itertools.product(range(len(OPTIONS)), repeat=len(rows)):
        if math.fsum(limited[rows, options]) <= limit and all(len({options[i] for i in tie}) == 1 for tie in ties):
            best = min(best, math.fsum(costs[rows, options]))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_a_price_is_the_difference_of_two_optima(seed):
    table = random_table(seed)
    ties = {("g", "a"): (0, 1), ("h", "c"): (3, 4)}
    low, high = table.usage["memory_bytes"].min(1).sum(), table.usage["memory_bytes"].max(1).sum()
    limit = low + 0.5 * (high - low)
    every = least(table, limit, ties.values())
    prices = mps.tie_prices(table, mps.Budget(memory_bytes=limit))
    assert {tie.layers for tie in prices} == set(ties)
    assert [tie.price for tie in prices] == sorted((tie.price for tie in prices), reverse=True)
    for tie in prices:
        others = [rows for names, rows in ties.items() if names != tie.layers]
        assert tie.price == pytest.approx(every - least(table, limit, others), abs=1e-12)
        assert tie.price >= 0
        assert tie.groups == 1
    assert {tie.reason for tie in prices} == {"one matrix in vllm", "h"}
    damage = 1.2 * table.sensitivity.min(1).sum()
    for tie in mps.tie_prices(table, mps.Budget(sensitivity=damage), minimize="coins"):
        others = [rows for names, rows in ties.items() if names != tie.layers]
        expected = least(table, damage, ties.values(), "coins") - least(table, damage, others, "coins")
        assert tie.price == pytest.approx(expected, abs=1e-12)


def test_some_prices_are_above_0():
    budgets = [mps.Budget(average_bits=bits) for bits in (3, 4, 5)]
    assert any(tie.price > 0.01 for seed in range(5) for b in budgets for tie in mps.tie_prices(random_table(seed), b))


def test_what_shares_a_weight_or_was_scored_as_one_has_no_price():
    table = random_table(0, ("g (shared weight, one matrix in vllm)", "", "h", ""))
    assert [tie.layers for tie in mps.tie_prices(table, mps.Budget(average_bits=4))] == [("h", "c")]
    (tie,) = mps.tie_prices(replace(table, origin={"scored_together": ["h"]}), mps.Budget(average_bits=4))
    assert (tie.price, tie.unknown) == (None, "its layers were scored as one")
    with pytest.raises(mps.InfeasibleError):
        mps.tie_prices(table, mps.Budget(average_bits=1))
    assert mps.tie_prices(random_table(0, ("", "", "", "")), mps.Budget(average_bits=4)) == []


def test_many_ties_are_priced_by_kind():
    generator = np.random.default_rng(3)
    layers = []
    for block in range(10):
        for parts in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
            title = f"{block}.{parts[0]} (one matrix in vllm)"
            layers += [mps.Layer(f"{block}.{part}", weight_shape=(4,), group=title) for part in parts]
    scores = np.sort(generator.exponential(size=(len(layers), len(OPTIONS))))[:, ::-1]
    table, budget = mps.CostTable(layers, OPTIONS, scores), mps.Budget(average_bits=4)
    prices = {tie.layers[0]: tie for tie in mps.tie_prices(table, budget)}
    assert {name: (tie.groups, len(tie.layers)) for name, tie in prices.items()} == {
        "0.q_proj": (10, 30),
        "0.gate_proj": (10, 20),
    }
    loose = replace(table, layers=[replace(x, group="") if "q_proj (" in x.group else x for x in layers])
    expected = mps.solve(table, budget).sensitivity - mps.solve(loose, budget).sensitivity
    assert prices["0.q_proj"].price == pytest.approx(expected)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(8, 8, bias=False))

    def forward(self, x):
        return x + self.o_proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Block(), nn.Linear(8, 3)).eval()


DATA = [torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(n)) for n in range(4)]
TIED = ["1.q_proj", "1.k_proj", "1.v_proj"]


@pytest.mark.parametrize("estimator", [FisherProjection(), OutputGradient(), KLDivergence()])
@pytest.mark.parametrize("options", ["w2 w4", "w2a8 w4"])
def test_layers_of_a_tie_share_its_score_as_they_score_alone(estimator, options):
    """The sum is the score of the group, the parts are those of a table without the tie."""
    model, precisions = net(), mps.precisions(options)
    layers = mps.layers(model, DATA[0], target="vllm" if options == "w2 w4" else "modelopt-vllm")
    table = mps.profile(model, DATA, estimator, precisions, layers=layers, progress=False)
    assert "scored_together" not in table.origin
    whole = mps.profile(
        model, DATA, estimator, precisions, layers=[replace(x, target="") for x in layers], progress=False
    )
    assert whole.origin["scored_together"] == ["1.q_proj (one matrix in " + layers[0].target + ")"]
    free = mps.profile(model, DATA, estimator, precisions, progress=False)
    rows = [i for i, layer in enumerate(layers) if layer.name in TIED]
    np.testing.assert_allclose(table.sensitivity[rows].sum(0), whole.sensitivity[rows].sum(0), rtol=1e-6)
    parts = free.sensitivity[rows] / free.sensitivity[rows].sum(0)
    np.testing.assert_allclose(table.sensitivity[rows] / table.sensitivity[rows].sum(0), parts, rtol=1e-5)
    others = [i for i in range(len(layers)) if i not in rows]
    np.testing.assert_allclose(table.sensitivity[others], free.sensitivity[others], rtol=1e-5)


def test_scoring_the_layers_of_a_tie_takes_no_pass_of_gradients_and_the_forecast_runs_of_others():
    model = net()
    layers = mps.layers(model, DATA[0], target="vllm")
    passes = {}
    for estimator in (FisherProjection(), KLDivergence()):
        table = mps.profile(model, DATA, estimator, OPTIONS, layers=layers, progress=False)
        told = mps.forecast(model, DATA, estimator, OPTIONS, layers=layers)
        passes[type(estimator)] = table.origin["passes"]
        assert table.origin["passes"]["forward"] <= told.forward + 1e-9
        assert table.origin["passes"]["backward"] <= told.backward + 1e-9
    assert passes[FisherProjection] == pytest.approx({"forward": 1.0, "backward": 2.0})
    table = mps.profile(model, DATA, [FisherProjection(), Fisher()], OPTIONS, layers=layers, progress=False)[0]
    assert "scored_together" in table.origin  # the sweep that they share has units that do not overlap


def test_a_search_tells_what_ties_cost(tmp_path):
    model = net()
    result = mps.search(
        model,
        DATA,
        mps.Budget(average_bits=4),
        OPTIONS,
        layers=mps.layers(model, DATA[0], target="vllm"),
        max_passes=30,
        progress=False,
    )
    posterior = result.tables["posterior"]
    (tie,) = result.ties
    loose = replace(posterior, layers=tuple(replace(x, group="") for x in posterior.layers))
    values = [mps.solve(table, mps.Budget(average_bits=4)).sensitivity for table in (posterior, loose)]
    assert tie["price"] == pytest.approx(values[0] - values[1], abs=1e-15)
    assert tie["layers"] == TIED
    words = "1.q_proj, 1.k_proj, 1.v_proj tied (one matrix in vllm): costs"
    assert words in str(result)
    result.save(tmp_path / "out")
    assert mps.SearchResult.load(tmp_path / "out").ties == [tie]
    result.report(tmp_path / "report.html")
    assert words in (tmp_path / "report.html").read_text()
    free = mps.search(model, DATA, mps.Budget(average_bits=4), OPTIONS, max_passes=30, progress=False)
    assert not free.ties
    assert "tied (" not in str(free)


def test_commands_tell_what_ties_cost(tmp_path, capsys):
    table = random_table(1)
    table.save(tmp_path / "table.csv")
    solve = ["solve", str(tmp_path / "table.csv"), "--budget", "average_bits=4", "-o", str(tmp_path / "plan.json")]
    assert main([*solve, "--json", "--quiet"]) == 0
    ties = json.loads(capsys.readouterr().out)["ties"]
    expected = mps.tie_prices(table, mps.Budget(average_bits=4))
    assert [(tuple(tie["layers"]), tie["price"]) for tie in ties] == [(tie.layers, tie.price) for tie in expected]
    assert main(solve) == 0
    assert "h, c tied (h): costs" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "plan.json")]) == 0
    assert "h, c tied (h): costs" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "plan.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted"]["ties"] == ties
