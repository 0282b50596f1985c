"""`mpsearch export`, behind its arguments."""

import json
import re

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.export_command import run
from mpsearch.loading import UsageError

OFF = {"options": [], "snap": False, "verify": False}
PLAN = mps.Plan({"0": mps.Precision("4", "16", 32), "2": mps.Precision("16")}, usage={"memory_bytes": 5000.0})


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32)).eval()


def test_a_file_and_a_report(tmp_path, model):
    out = str(tmp_path / "plan.csv")
    content, text = run(PLAN, "neutral", out, model, None, **{**OFF, "options": ["keys=regex"]})
    assert (tmp_path / "plan.csv").read_text().splitlines()[1] == "^0$,4,4,16,16,32"
    assert content == {"target": "neutral", "file": out, "layers": {"0": "w4g32", "2": "w16"}}
    assert text == "neutral: 1 of 2 layers quantized"


def test_snapping_is_reported(tmp_path, model):
    plan = mps.Plan({**PLAN, "2": mps.Precision("9", "16", 32)}, usage=PLAN.usage)
    content, text = run(plan, "gptqmodel", str(tmp_path / "g.json"), model, None, **{**OFF, "snap": True})
    assert content["snapped"] == {"2": ["w9g32", "w8g32"]}
    assert content["usage"] == {"memory_bytes": 5000 - 32 * 32 / 8}
    assert "2: w9g32 -> w8g32" in text
    assert "memory_bytes is now 4872" in text
    assert json.loads((tmp_path / "g.json").read_text())["dynamic"]["+:^2$"]["bits"] == 8


@pytest.mark.filterwarnings("ignore")
def test_verified_through_the_command(tmp_path, model):
    pytest.importorskip("torchao")
    settings = {**OFF, "options": ["symmetric=true"], "verify": True}
    content, text = run(PLAN, "torchao", str(tmp_path / "t.json"), model, None, **settings)
    assert [(check["name"], check["precision"], check["difference"]) for check in content["verified"]] == [
        ("0", "w4g32", 0)
    ]
    assert "1 layers carried out as planned" in text
    json.dumps(content)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_target_takes_the_first_batch(tmp_path, model):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    batches = [(torch.ones(3, 64), torch.zeros(3))]
    content, _ = run(PLAN, "onnxruntime", str(tmp_path / "m.onnx"), model, batches, **{**OFF, "verify": True})
    assert len(content["verified"]) == 1
    assert (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize(
    ("target", "settings", "words"),
    [
        ("torchoa", {}, "unknown target 'torchoa'; did you mean 'torchao'?"),
        ("neutral", {"verify": True}, "neutral cannot be verified here; known: torchao"),
        ("neutral", {"options": ["key=name"]}, "target 'neutral' has no option 'key'; did you mean 'keys'?"),
        ("neutral", {"options": ["keys=nam"]}, "option keys of neutral is 'nam'; did you mean 'name'?"),
        ("torchao", {"verify": True}, "--verify needs --model"),
        ("torchao", {"snap": True}, "--snap needs --model"),
        ("onnxruntime", {}, "onnxruntime traces the model: it needs --data"),
    ],
)
def test_mistakes_are_one_line(tmp_path, target, settings, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        run(PLAN, target, str(tmp_path / "x.csv"), None, None, **{**OFF, **settings})
