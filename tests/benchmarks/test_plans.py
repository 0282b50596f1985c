"""The benchmark of searches: its errors, its table, its reference."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import mpsearch as mps


def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)).eval()
    data = [(torch.randn(8, 6), torch.randint(4, (8,))) for _ in range(3)]
    return SimpleNamespace(model=model, held_out=SimpleNamespace(batches=lambda size: data)), data


def test_samples_have_the_mean_that_evaluate_measures(plans, monkeypatch):
    network, data = trained()
    monkeypatch.setitem(plans.SIZES, "net", (8, 8))
    judge = plans.HeldOut("net", network)
    plan = mps.Plan(dict(zip(("0", "2", "4"), mps.precisions("w2 w4 w3"), strict=True)))
    found = mps.evaluate(network.model, data, plan, progress=False)
    damage = judge.samples("2 4 3")
    assert len(damage) == 24
    assert damage.mean() == pytest.approx(found.kl, rel=1e-6)
    assert damage.std(ddof=1) / 24**0.5 == pytest.approx(found.kl_se, rel=1e-6)
    assert judge.row(3.0, plan)["kl"] == found.kl


def rows(*found):
    columns = ["model", "method", "seed", "average_bits_limit", "bits", "kl_over_reference", "passes"]
    return pd.DataFrame(found, columns=columns)


def test_another_tool_is_told_with_the_error_of_the_difference(plans):
    damage = {"a": [1.0, 2.0, 6.0], "b": [2.0, 4.0, 6.0], "c": [1.0, 3.0, 5.0]}
    judge = SimpleNamespace(samples=lambda bits: np.array(damage[bits]))
    table = rows(
        ("net", "mpsearch default", 0, 3.0, "b", 1.0, 5.0),
        ("net", "mpsearch default", 1, 3.0, "c", 1.0, 5.0),
        ("net", "MCT", 0, 3.0, "a", 1.0, 5.0),
        ("net", "MCT", 1, 3.0, "a", 1.0, 5.0),
        ("net", "AIMET", 0, 3.0, "b", 1.0, 5.0),  # the same plan: not better
        ("net", "KL", 0, 3.0, "a", 1.0, 5.0),  # no other tool
        ("other", "MCT", 0, 3.0, "a", 1.0, 5.0),
    )
    (line,) = plans.beaten(table, {"net": judge})
    difference = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])  # seed by sample
    over_samples = difference.mean(0).std(ddof=1) / 3**0.5
    over_seeds = difference.mean(1).std(ddof=1) / 2**0.5
    error = (over_samples**2 + over_seeds**2) ** 0.5
    assert line.startswith("net at 3 bits: MCT 3, mpsearch default 3.5, ")
    assert f"difference 0.5 ± {error:.2g} ({0.5 / error:.1f} standard errors, 2 calibration sets)" in line


def test_the_table_has_geometric_means_over_budgets_and_networks(plans, monkeypatch):
    monkeypatch.setattr(plans, "MODELS", {"one": None, "two": None})
    table = rows(
        ("one", "KL", 0, 3.0, "", 2.0, 10.0),
        ("one", "KL", 0, 4.0, "", 8.0, 10.0),
        ("two", "KL", 0, 3.0, "", 1.0, 20.4),
        ("one", "MCT", 0, 3.0, "", 1.5, 7.0),
        ("one", "reference", 0, 3.0, "", 1.0, 500.0),
    )
    assert plans.markdown(table).splitlines() == [
        "| method | one | two | all | passes | calibration sets |",
        "| --- | --- | --- | --- | --- | --- |",
        "| MCT | 1.50 |  |  | 7 | 1 |",
        "| KL | 4.00 | 1.00 | 2.00 | 10 to 20 | 1 |",
    ]
