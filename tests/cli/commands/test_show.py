"""`mpsearch show MODEL`, and the arguments that say what is decided on."""

import json

import pytest

from mpsearch import CostTable
from mpsearch.cli import main

NETS = """
import torch
from torch import nn

class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = nn.Linear(32, 8), nn.Linear(32, 8), nn.Linear(8, 3)
    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x))

def net():
    return Gated()

def data():
    return [torch.randn(4, 32, generator=torch.Generator().manual_seed(0))]

def nothing():
    return []
"""


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


def test_a_model_is_shown_before_any_calibration(nets, capsys):
    assert main(["show", f"{nets}:net", "--data", f"{nets}:data", "--precisions", "w4 w16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == {}
    fused = ["show", f"{nets}:net", "--data", f"{nets}:data", "--precisions", "w4 w16", "--groups", "fused", "--json"]
    assert main(fused) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [(x["name"], x["macs"]) for x in shown["layers"]] == [("gate", 256), ("up", 256), ("down", 24)]
    assert shown["groups"] == {"gate (same input)": ["gate", "up"]}
    assert shown["parameters"] == 2 * (32 * 8 + 8) + 8 * 3 + 3
    codes, scales, biases = (2 * 256 + 24) // 2, 4 * (8 + 8 + 3), 4 * (8 + 8 + 3)
    assert shown["range"]["memory_bytes"] == [codes + scales + biases, 4 * shown["parameters"]]
    assert shown["refused"] == {}


def test_what_a_target_refuses_is_shown(nets, capsys):
    arguments = [
        "show",
        f"{nets}:net",
        "--data",
        f"{nets}:data",
        "--precisions",
        "w4g32 w16",
        "--target",
        "onnxruntime",
        "--groups",
        "fused",
    ]
    assert main([*arguments, "--cut", "gate", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["groups"] == {}
    assert shown["refused"] == {"down": ["w4g32"]}
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "group gate (same input): gate, up" in out
    assert "w4g32 is not allowed in 1 of 3 layers" in out
    assert "3 layers, 2 decisions" in out


def test_profile_takes_the_same_arguments(nets, tmp_path, capsys):
    out = tmp_path / "table.csv"
    arguments = ["profile", f"{nets}:net", "--data", f"{nets}:data", "--precisions", "w4g32 w16", "-o", str(out)]
    assert main([*arguments, "--target", "onnxruntime", "--groups", "fused", "--cut", "gate", "--quiet"]) == 0
    table = CostTable.load(out)
    assert [layer.group for layer in table.layers] == ["", "", ""]
    assert table.allowed.tolist() == [[True, True], [True, True], [False, True]]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            [],
            "memory_bytes: codes packed without padding, a scale in the weight's dtype for each group or channel; with target=",
        ),
        (["--target", "hqq"], "memory_bytes: as hqq stores it: 3-bit codes ten to a 32-bit word"),
    ],
)
def test_everyone_tells_how_bytes_are_counted(nets, tmp_path, capsys, target, words):
    table, plan = str(tmp_path / "t.csv"), str(tmp_path / "p.json")
    model = [f"{nets}:net", "--data", f"{nets}:data", "--precisions", "w4g8 w8g8", *target]
    assert main(["profile", *model, "--estimator", "relative-weight-error", "-o", table, "--quiet"]) == 0
    for command in (
        ["show", *model],
        ["show", table],
        ["solve", table, "--budget", "average_bits=6", "-o", plan],
        ["show", plan],
    ):
        capsys.readouterr()
        assert main(command) == 0
        assert words in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "{}:net"], "a model is shown by running it: give --data"),
        (["show", "{}:net", "--data", "{}:nothing"], "no batches"),
        (["show", "{}:net", "--data", "{}:data", "--target", "vlm"], "unknown target 'vlm'"),
        (["show", "{}:net", "--data", "{}:data", "--groups", "fused", "--exclude", "gate"], "in one group with 'up'"),
    ],
)
def test_mistakes_are_one_line(nets, capsys, arguments, message):
    assert main([argument.format(nets) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
