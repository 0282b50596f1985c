"""The benchmark of latency: every way to carry a plan out computes what the plan says, and a row adds up."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mpsearch as mps
from mpsearch.quantizers.int8_products import saturation

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def script(monkeypatch):
    if not FOLDER.is_dir():
        pytest.skip("needs a checkout, not an installed package")
    for package in ("safetensors", "sklearn", "scipy"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("latency")
    for name in ("latency", "models"):
        sys.modules.pop(name, None)


PACKAGES = {"torch": "torch", "torchao": "torchao", "onnxruntime": "onnxscript"}


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet/torch",
        "decoder/torch",
        "decoder/torchao",
        pytest.param("decoder/onnxruntime", marks=pytest.mark.slow),
    ],
)
def test_what_runs_is_the_plan(script, name):
    """Outputs of each uniform plan are as near to the unquantized model's as its bits allow, and not equal."""
    case = script.CASES[name]
    pytest.importorskip(PACKAGES[case.engine])
    torch.manual_seed(0)
    model, example = case.network().eval(), case.example()[:2]
    names = [x.name for x in mps.layers(model, example, groups="none") if x.kind != "embedding"]
    with torch.no_grad():
        true = model(example)
        for precision in mps.precisions(case.precisions):
            plan = mps.Plan(dict.fromkeys(names, precision))
            out = case.carried_out(script.copy.deepcopy(model), plan, example)()
            out = torch.as_tensor(out[0] if isinstance(out, list) else out)
            error = float((out - true).norm() / true.norm())
            off = saturation({"onnxruntime": "onnxruntime MatMulNBits"}.get(case.engine, "torch")) > 0
            assert error < {16: 1e-2, 8: 0.3 if off else 0.1, 4: 0.5, 2: 2.0}[precision.weight_bits]
            assert error > (0 if precision.quantizes_weight else -1)


def test_a_row_a_plan_and_the_summary(script, monkeypatch):
    monkeypatch.setitem(script.CASES, "small", script.CASES["mobilenet/torch"])
    rows = script.run("small", script.CASES["small"], script.peaks(), 2, 1, 1)
    found = pd.DataFrame(rows)
    assert found.uniform.tolist() == ["w16", "wbf16abf16", "w8a8", "", ""]
    assert found.quantized_layers.tolist()[:3] == [0, 21, 21]
    assert found.predicted_s[0] == pytest.approx(found.measured_s[0])  # what lies between layers is taken from it
    assert (found[["predicted_s", "measured_s", "roofline_s"]] > 0).all(axis=None)
    assert found.bitops[0] == found.bitops[1] == 4 * found.bitops[2]
    found["predicted_s"] = found.measured_s * np.array([1, 1.5, 1.5, 0.5, 0.5])
    line = script.summary(found).splitlines()[2]
    assert "50.0 % | +0.0 %" in line
