"""`--quantizer NAME --quantizer-option NAME=VALUE` of `profile`, `search` and `evaluate`."""

import json
from pathlib import Path

import numpy as np
import pytest

import mpsearch as mps
from mpsearch.cli import main
from mpsearch.quantizers import GPTQ, RoundToNearest
from mpsearch.sensitivity import RelativeWeightError

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=generator) for _ in range(2)]

def held_out():
    return data(1)
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(NETS, names)
    return names


def run(*words: str) -> int:
    return main([str(word) for word in words])


def test_a_table_by_name_is_that_of_the_object(nets):
    assert run(
        "profile", "nets.py:net", "--data", "nets.py:data", "--estimator", "relative-weight-error", "--precisions", "w2 w4",
        "--quantizer", "rtn", "--quantizer-option", "symmetric=false", "--metric", "kl", "-o", "table.csv",
    ) == 0  # fmt: skip
    expected = mps.profile(
        nets["net"](), nets["data"](), RelativeWeightError(), mps.precisions("w2 w4"), metric="kl",
        quantizer=RoundToNearest(symmetric=False),
    )  # fmt: skip
    table = mps.CostTable.load("table.csv")
    np.testing.assert_array_equal(table.sensitivity, expected.sensitivity)
    assert table.usage["memory_bytes"].tolist() == expected.usage["memory_bytes"].tolist()


def test_what_looks_at_inputs_takes_them_from_calibration(nets, capsys):
    plan = mps.Plan({"0": mps.Precision("2"), "2": mps.Precision("3")})
    plan.save("plan.json")
    assert run(
        "evaluate", "nets.py:net", "--data", "nets.py:held_out", "--calibration", "nets.py:data", "--plan", "plan.json",
        "--quantizer", "gptq", "--quantizer-option", "damping=0.1", "--metric", "kl", "--json",
    ) == 0  # fmt: skip
    expected = mps.evaluate(
        nets["net"](), nets["held_out"](), plan, quantizer=GPTQ(damping=0.1), calibration=nets["data"](), metric="kl"
    )
    assert json.loads(capsys.readouterr().out)["kl"] == expected.kl


def test_a_search_tells_its_quantizer(nets):
    assert run(
        "search", "nets.py:net", "--data", "nets.py:data", "--precisions", "w2 w4", "--budget", "average_bits=3",
        "--quantizer", "percentile", "--quantizer-option", "percentile=99", "--effort", "fast", "--metric", "kl", "-o", "found",
    ) == 0  # fmt: skip
    assert "PercentileClip(percentile=99.0" in Path("found/summary.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--quantizer", "gtpq"), "unknown quantizer 'gtpq'; did you mean 'gptq'?"),
        (("--quantizer", "gptq", "--quantizer-option", "dampening=1"), "quantizer 'gptq' has no option 'dampening'"),
        (
            ("--quantizer", "percentile", "--quantizer-option", "percentile=200"),
            "percentile=200.0: expected a number above 0",
        ),
    ],
)
def test_what_it_does_not_know_is_refused_before_any_work(nets, capsys, words, message):
    status = run("evaluate", "nets.py:none", "--data", "nets.py:data", "--plan", _plan(), *words)
    assert status == 2
    assert message in capsys.readouterr().err


def _plan() -> str:
    mps.Plan({"0": mps.Precision("2")}).save("plan.json")
    return "plan.json"
