"""Every command's example runs as it is written, and `--json` prints the keys that docs/command_line.md lists, no other."""

import functools
import json
import re
import shlex
from pathlib import Path

import pytest

from mpsearch import Plan, Precision, SearchResult
from mpsearch.cli import main
from mpsearch.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parent.parent.parent.parent
EVERY = {command.name: command for group in COMMANDS.values() for command in group}

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 64, generator=g), torch.randint(0, 4, (16,), generator=g)) for _ in range(4)]

def inputs():
    return [x for x, _ in batches()]

def held_out():
    return batches()[:2]

def gated():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(64, 16), nn.Linear(64, 16), nn.Linear(16, 8)
        def forward(self, x):
            return self.down(self.gate(x).sigmoid() * self.up(x))
    return Gated()

def decoder():
    attention = nn.ModuleDict({"q_proj": nn.Linear(64, 64), "o_proj": nn.Linear(64, 64)})
    layer = nn.ModuleDict({"self_attn": attention})
    return nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([layer])}), "lm_head": nn.Linear(64, 4)})
"""

PART = {"group_size": {"4": 64}, "bits": [4], "bits_prop": [1], "scale_bits": 4}
MEASUREMENT = {
    "measurement": {
        "model.layers.0.self_attn": [{"accuracy": 0.9, "total_bits": 33000, "q_proj": PART, "o_proj": PART}],
        "lm_head.linear": None,
    },
    "last_module_idx": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the examples name, made with the commands that go before."""
    path = tmp_path_factory.mktemp("work")
    (path / "nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name, bits in (("table", "w2 w4 w8"), ("hessian", "w2 w4 w8"), ("kl", "w2 w4 w8")):
            estimator = "kl-divergence" if name == "kl" else "fisher"
            profile = f"profile nets.py:net --data nets.py:batches --estimator {estimator} --precisions '{bits}'"
            assert main(shlex.split(f"{profile} -o {name}.csv --quiet")) == 0
        assert main(shlex.split("solve table.csv --budget average_bits=4 -o plan.json --quiet")) == 0
        assert main(shlex.split("export plan.json --to gptqmodel -o quantize_config.json --quiet")) == 0
        search = f"{EVERY['search'].example} --max-passes 20"
        assert main(shlex.split(f"{search} --quiet")) == 0
    (path / "measurement.json").write_text(json.dumps(MEASUREMENT))
    lines = [f"{x},w{b},{ord(x) * 4.0**-b},{b}" for x in "abcde" for b in (2, 4)]
    (path / "five.csv").write_text("\n".join(["layer,precision,sensitivity,memory_bytes", *lines]))
    plans = [",".join("w2" if place == number else "w4" for place in range(5)) for number in range(5)]  # of equal size
    (path / "plans.csv").write_text("\n".join(["damage,a,b,c,d,e", *(f"{n},{row}" for n, row in enumerate(plans))]))
    Plan(
        {"0": Precision("9", "16", 32), "2": Precision("4"), "4": Precision("4")}, usage={"memory_bytes": 5000.0}
    ).save(path / "odd.json")
    return path


@pytest.fixture
def here(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    capsys.readouterr()
    return folder


@pytest.mark.parametrize("name", [name for name in EVERY if name != "demo"])  # below, smaller
def test_the_example_of_a_command_runs(here, capsys, name):
    if "brevitas" in EVERY[name].example:
        pytest.importorskip("brevitas")
    words = shlex.split(EVERY[name].example)
    assert words[0] == name
    assert main(words) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out
    assert name == "completion" or max(map(len, out.splitlines())) <= 80


def test_help_tells_every_command_and_its_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    listed = re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert listed == list(EVERY)
    for name, command in EVERY.items():
        with pytest.raises(SystemExit) as caught:
            main([name, "--help"])
        assert caught.value.code == 0
        out = capsys.readouterr().out
        example = out.split("example:\n")[1]
        assert shlex.split(example.replace("\\\n", " ")) == ["mpsearch", *shlex.split(command.example)]
        assert max(map(len, out.splitlines())) <= 80


RUNS = {
    "show: a plan": ["show plan.json"],
    "show: a table": ["show table.csv"],
    "show: a model": [
        "show nets.py:gated --data nets.py:inputs --precisions 'w4g32 w16' --target onnxruntime --groups fused"
    ],
    "show: a model under a plan": ["show nets.py:net --data nets.py:inputs --plan plan.json"],
    "search": [f"{EVERY['search'].example} --max-passes 20"],
    "report": ["report out/ -o report.html"],
    "profile": [EVERY["profile"].example],
    "compare: two tables": [EVERY["compare"].example],
    "compare: a table and measured plans": ["compare five.csv plans.csv"],
    "solve": [EVERY["solve"].example],
    "pareto": ["pareto table.csv"],
    "evaluate": [EVERY["evaluate"].example],
    "export": [
        "export plan.json --to llm-compressor --model nets.py:net -o recipe.yaml",
        "export odd.json --to llm-compressor --model nets.py:net --snap -o recipe.yaml",
    ],
    "import: a plan": [EVERY["import"].example],
    "import: a table": ["import measurement.json --from exllamav2 --model nets.py:decoder -o theirs.csv"],
    "completion": ["completion fish"],
}


def documented():
    """Section -> key -> what it says."""
    path = ROOT / "docs" / "command_line.md"
    if not path.exists():
        pytest.skip("needs a checkout, not an installed package")
    sections = re.split(r"^### ", path.read_text().split("## JSON")[1], flags=re.MULTILINE)[1:]
    return {
        section.split("\n")[0]: dict(re.findall(r"^\| `(\S+)` \| (.+) \|$", section, re.MULTILINE))
        for section in sections
    }


def steps(key):
    """`points[].gap` -> ("points", "[]", "gap"); a name in capitals stands for any."""
    return tuple(key.replace("[]", ".[]").split("."))


def fits(pattern, path):
    return len(pattern) == len(path) and all(a == b or a.isupper() for a, b in zip(pattern, path, strict=True))


def printed(value, keys, path=()):
    """Keys under which the values stand; a documented key without documented parts holds whatever it holds."""
    fitting = [key for key in keys if fits(steps(key), path)]
    if fitting:
        return set(fitting[:1])  # the most exact one comes first
    if isinstance(value, dict):
        items = [(name, part) for name, part in value.items()]
    elif isinstance(value, list):
        items = [("[]", part) for part in value]
    else:
        return {".".join(path)}
    return set().union(*(printed(part, keys, (*path, name)) for name, part in items))


@pytest.mark.parametrize("section", RUNS)
def test_json_prints_what_is_documented(here, capsys, section):
    told = documented()[section]
    keys = sorted(told, key=lambda key: sum(step.isupper() for step in steps(key)))
    found = set()
    for command in RUNS[section]:
        assert main([*shlex.split(command), "--json", "--quiet"]) == 0, capsys.readouterr().err
        found |= printed(json.loads(capsys.readouterr().out), keys)
    assert found == {key for key in told if not told[key].startswith("with `--verify`")}


def test_json_of_a_verified_export(here, capsys):
    pytest.importorskip("brevitas")
    told = documented()["export"]
    assert main([*EVERY["export"].example.split(), "--json", "--quiet"]) == 0
    found = printed(json.loads(capsys.readouterr().out), list(told))
    assert {key for key in told if told[key].startswith("with `--verify`")} <= found <= set(told)


def test_the_demo_on_a_small_network(here, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    import mpsearch.cli.digits as demo

    full = demo.run
    monkeypatch.setattr(demo, "run", functools.cache(lambda out, seed: full(out, seed=seed, epochs=2, width=4)))
    monkeypatch.setattr(demo, "BUDGETS", (demo.MIDDLE,))
    assert main(["demo", "-o", "demo", "--quiet"]) == 0
    out = capsys.readouterr().out
    assert f"verdict: {SearchResult.load('demo').verdict}" in " ".join(out.split())
    assert "forward-pass equivalents" in out
    assert max(map(len, out.splitlines())) <= 80
    assert (here / "demo" / "front.png").stat().st_size > 10_000
    assert dict(SearchResult.load("demo").plan) == dict(Plan.load("demo/plan.json"))
    assert main(["demo", "-o", "demo", "--quiet", "--json"]) == 0
    told = documented()["demo"]
    assert printed(json.loads(capsys.readouterr().out), list(told)) == set(told)


def test_every_command_is_documented():
    assert {section.split(":")[0] for section in documented()} == set(EVERY)
    assert set(documented()) == {*RUNS, "demo"}


def test_under_json_a_mistake_is_one_line_on_stderr(here, capsys):
    assert main(["solve", "table.csv", "--budget", "memory_bytes=1B", "--json"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
