"""The benchmark of evolved proxies: its truth sets, its rows and its summary."""

import importlib
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.estimation.proxies.evolution import ProxyEvolution
from mpsearch.sensitivity import KLDivergence


@pytest.fixture
def proxies(sensitivity):
    module = importlib.import_module("proxies")
    yield module
    del sys.modules["proxies"]


@pytest.fixture
def net(proxies, models, sensitivity, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(12) for part in (nn.Linear(6, 6), nn.Tanh()))).eval()
    examples = models.Examples(torch.randn(24, 6), torch.randint(6, (24,)))
    trained = models.Trained(model, examples, examples)
    judge = sensitivity.Judge("net", model, examples.batches(12))
    monkeypatch.setitem(proxies.SIZES, "net", (8, 12))
    return proxies.Network("net", trained, judge, sensitivity.Truth(judge, 40))


def test_the_sets_of_plans(net, sensitivity):
    sets = net.sets()
    assert [len(one) for one in sets] == [20, 5, 5, 5, 5]
    seen = set()
    for limit, one in zip((None, *sensitivity.BUDGETS), sets, strict=True):
        for plan, damage in zip(one.plans, one.damage, strict=True):
            bits = np.mean([precision.weight_bits for precision in plan.values()])
            assert limit is None or abs(bits - limit) <= sensitivity.BAND + 1e-9
            assert damage == mps.evaluate(net.model, net.trained.held_out.batches(12), plan).kl
            seen.add(str(plan))
    assert len(seen) == 40


def test_rows_of_a_signal(net, proxies, sensitivity):
    rows = proxies.judged(net, 3, "kl-divergence", KLDivergence(), ("vit", "net"))
    assert [row["average_bits_limit"] for row in rows] == list(sensitivity.BUDGETS)
    table = mps.profile(net.model, net.calibration(3), KLDivergence(), sensitivity.PRECISIONS, resources=())
    for row in rows:
        limit = row["average_bits_limit"]
        plan = mps.solve(table, mps.Budget(average_bits=limit)).plan
        assert row["kl"] == mps.evaluate(net.model, net.trained.held_out.batches(12), plan).kl
        assert row["kl_over_uniform"] == row["kl"] / sensitivity.uniform_within(net.judge, limit)[1]
        assert (row["model_is_new"], row["evolved_on"]) == (False, "vit net")


def test_the_script_end_to_end(net, proxies, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(proxies, "network", lambda name: net)
    monkeypatch.setattr(proxies, "MODELS", ["net"])
    monkeypatch.setattr(proxies, "EVOLVED", {"evolved-on-two": [("net", "net"), ("other", "other")]})
    out = tmp_path / "proxies.csv"

    def run(*signals):
        few = ["--seeds", "1", "--generations", "1", "--population", "4", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["proxies.py", "--signals", *signals, *few])
        assert proxies.main() == 0
        return out.read_text().splitlines()

    assert len(run("evolved-on-two")) == 1 + 2 * 4  # sets, budgets
    lines = run("qe")
    assert len(lines) == 1 + 3 * 4
    assert run("qe")[0] == lines[0]
    assert len(run("qe")) == len(lines)
    printed = capsys.readouterr().out
    assert "evolved-on-two, new to it" in printed
    assert "evolved-on-two, seen" in printed
    again = proxies.evolved(("net", "net"), ProxyEvolution(1, 4, seed=1))
    rows = [line for line in lines if "net net" in line]
    assert len(rows) == 4
    assert all(str(again) in row and f"{again.origin['fitness']:.6g}" in row for row in rows)


def test_the_summary(proxies, monkeypatch):
    monkeypatch.setattr(proxies, "MODELS", ["a", "b"])
    rows = [
        {"signal": "x", "model_is_new": True, "model": m, "kl_over_uniform": k, "spearman": 0.5, "spearman_at_limit": s}
        for m, k, s in (("a", 0.1, 0.2), ("a", 0.4, 0.4), ("b", 0.8, 0.0))
    ]
    line = proxies.summary(pd.DataFrame(rows)).splitlines()[2].split()
    assert line == ["x", "0.4", "0.5", "0.15", "0.2", "0.8", "0.3", "0"]
