"""The benchmark of re-runs: both programs fill the same table, and time is counted inside the network."""

import importlib
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    if not FOLDER.is_dir():
        pytest.skip("needs a checkout, not an installed package")
    for package in ("safetensors", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("prefix_reuse")
    for name in ("prefix_reuse", "models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("repeat", [0, 1])
def test_both_programs_fill_the_same_cells(script, monkeypatch, repeat):
    torch.manual_seed(0)
    network, batches = script.Transformer(2, 8, 16).eval(), list(torch.randint(16, (4, 5)).split(2))
    monkeypatch.setattr(script, "CASES", {"small": lambda: (network, batches)})
    row = script.compare("small", repeat)
    assert row["cells"] == (2 * 6 + 2) * 3
    assert row["passes_reused"] < row["passes_naive"] == row["cells"] + 1
    assert row["largest_difference"] <= 1e-6


def test_tables_that_differ_are_no_result(script, monkeypatch):
    network, batches = script.Transformer(1, 8, 16).eval(), [torch.randint(16, (4, 5))]
    monkeypatch.setattr(script, "CASES", {"small": lambda: (network, batches)})
    monkeypatch.setattr(script, "naive", lambda model, batches: np.ones((8, 3)))
    with pytest.raises(AssertionError, match="small: the tables differ by"):
        script.compare("small", 0)


def test_time_counts_inside_the_network_also_when_it_stops(script):
    class Slow(nn.Module):
        def forward(self, x):
            end = time.process_time() + 0.02
            while time.process_time() < end:
                pass
            raise KeyboardInterrupt

    timed = script.Timed(Slow())
    for runs in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            timed(torch.ones(1))
        assert timed.seconds >= 0.02 * runs
