"""The benchmark of re-runs: both programs fill the same table, and all time counts."""

import importlib
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    if not FOLDER.is_dir():
        pytest.skip("needs a checkout, not an installed package")
    for package in ("safetensors", "sklearn", "transformers"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("prefix_reuse")
    for name in ("prefix_reuse", "models"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("repeat", [0, 1])
@pytest.mark.parametrize("scale", ["max", "mse"])
def test_both_programs_fill_the_same_cells(script, monkeypatch, repeat, scale):
    network, batches = script.llama(2, 16, 16), list(torch.randint(16, (4, 5)).split(2))
    monkeypatch.setattr(script, "CASES", {"small": lambda: (network, batches)})
    row = script.compare("small", scale, repeat)
    assert row["cells"] == (2 * 7 + 2) * 3
    assert row["passes_reused"] < row["passes_naive"] == row["cells"] + 1
    assert row["largest_difference"] <= 1e-4


def test_tables_that_differ_are_no_result(script, monkeypatch):
    network, batches = script.llama(1, 16, 16), [torch.randint(16, (4, 5))]
    monkeypatch.setattr(script, "CASES", {"small": lambda: (network, batches)})
    monkeypatch.setattr(script, "naive", lambda model, batches, quantizer: np.ones((9, 3)))
    with pytest.raises(AssertionError, match="small: the tables differ by"):
        script.compare("small", "max", 0)


def test_time_counts_by_the_clock_and_by_the_processor(script):
    def work():
        end = time.process_time() + 0.02
        while time.process_time() < end:
            pass
        time.sleep(0.02)
        return 3

    found, seconds = script.timed(work)
    assert found == 3
    assert seconds.cpu >= 0.02
    assert seconds.wall >= 0.04
