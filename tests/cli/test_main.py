"""The command line as a user meets it: what it prints, its files, its exit codes."""

import importlib.metadata
import json
import subprocess
import sys
import warnings

import pytest

from mpsearch import CostTable, Plan, SearchResult
from mpsearch.cli import main

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).train()

def data():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 6, generator=g), torch.randint(0, 3, (16,), generator=g)) for _ in range(2)]

def loader():
    return iter(data())

def unlabelled():
    return [x for x, _ in data()]

def nothing():
    return []

def no_layers():
    return nn.Sequential(nn.ReLU())

def random():
    class Net(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x))
    return nn.Sequential(Net(6, 3))

def fails():
    raise RuntimeError("no weights here")

number = 3
"""

TABLE = """layer,precision,sensitivity,numel,memory_bytes,bitops
a,w2,9,10,10,100
a,w4,3,10,20,200
a,w8,1,10,40,400
b,w2,4,10,10,100
b,w4,2,10,20,200
b,w8,1,10,40,400
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "table.csv").write_text(TABLE)
    return tmp_path


def run(capsys, *arguments):
    status = main(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


PROFILE = ("profile", "nets.py:net", "--data", "nets.py:data", "--precisions", "w2 w4a8 w8", "-o", "t.csv")


@pytest.mark.parametrize("estimator", ["kl-divergence", "hessian-trace"])
def test_from_model_to_measured_plan(here, capsys, estimator):
    status, out, err = run(capsys, *PROFILE, "--estimator", estimator)
    assert status == 0
    assert "damage [nats]" in out
    assert "forward" in out
    assert "wrote t.csv" in err
    status, out, _ = run(capsys, "solve", "t.csv", "--budget", "memory_bytes=50%", "-o", "plan.json")
    assert status == 0
    assert "proven optimal" in out
    assert "best uniform precision that fits" in out
    status, out, _ = run(capsys, "evaluate", "nets.py:net", "--data", "nets.py:loader", "--plan", "plan.json")
    assert status == 0
    assert "KL to the original [nats]" in out
    assert "accuracy" in out
    status, out, _ = run(capsys, "pareto", "t.csv", "-o", "front.csv", "--plot", "front.png")
    assert status == 0
    assert (here / "front.png").read_bytes().startswith(b"\x89PNG")
    for name in ("plan.json", "t.csv"):
        status, out, err = run(capsys, "show", name)
        assert (status, err) == (0, "")
        assert "0" in out
        assert max(map(len, out.splitlines())) <= 80
    assert Plan.load("plan.json")["0"]
    assert CostTable.load("t.csv").unit == "nats"


def test_options_reach_the_estimator(here, capsys):
    run(capsys, *PROFILE, "--estimator", "hessian-trace", "--option", "num_samples=3", "--option", "seed=5")
    assert CostTable.load("t.csv").origin["estimator"] == "HessianTrace(num_samples=3, seed=5, method='hutchinson')"


def test_a_plugin(here, capsys):
    (here / "mine.py").write_text(
        "from dataclasses import dataclass\nimport numpy as np\nfrom mpsearch.estimation.estimator import Estimate\n"
        "@dataclass(frozen=True)\nclass Mine:\n    scale: float = 1.0\n    def estimate(self, context):\n"
        "        return Estimate(self.scale * np.ones((len(context.decisions), len(context.precisions))), unit='relative')\n"
    )
    status, *_ = run(capsys, *PROFILE, "--estimator", "mine.py:Mine", "--option", "scale=2.5")
    assert status == 0
    assert CostTable.load("t.csv").sensitivity.tolist() == [[2.5] * 3] * 2


def test_solve_prints_and_writes(here, capsys):
    status, out, err = run(
        capsys, "solve", "table.csv", "--budget", "memory_bytes=60B", "--budget", "bitops=600", "-o", "p.json", "--json"
    )
    assert status == 0
    assert "wrote p.json" in err
    content = json.loads(out)
    assert content["sensitivity"] == 3.0
    assert content["status"] == "optimal"
    assert content["layers"] == {"a": "w8", "b": "w4"} == {k: str(v) for k, v in Plan.load("p.json").items()}
    status, out, _ = run(
        capsys, "solve", "table.csv", "--budget", "sensitivity=5", "--minimize", "memory_bytes", "--json"
    )
    assert json.loads(out)["usage"]["memory_bytes"] == 40


def test_quiet_says_nothing_on_stderr(here, capsys):
    status, _, err = run(capsys, "solve", "table.csv", "--budget", "memory_bytes=50%", "-o", "p.json", "--quiet")
    assert (status, err) == (0, "")
    _, _, err = run(capsys, "solve", "table.csv", "--budget", "memory_bytes=50%", "-o", "p.json")
    assert "every layer at its largest" in err
    status, _, err = run(capsys, *PROFILE, "--quiet")
    assert (status, err) == (0, "")


def test_compare(here, capsys):
    (here / "other.csv").write_text(TABLE.replace("a,w2,9", "a,w2,5"))
    status, out, _ = run(capsys, "compare", "table.csv", "other.csv")
    assert status == 0
    assert "Spearman" in out
    status, out, _ = run(capsys, "compare", "table.csv", "table.csv", "--json")
    content = json.loads(out)
    assert content["agreement"][0] == {"cells": "all cells", "count": 6, "spearman": 1.0, "kendall": 1.0}
    assert {plan["first_by_second"] for plan in content["plans"]} == {1.0}


def test_compare_with_measured_plans(here, capsys):
    """All nine plans, damage as the table says but for one: a at w8, b at w2 is measured worst of all."""
    damage = {"a": {"w2": 9, "w4": 3, "w8": 1}, "b": {"w2": 4, "w4": 2, "w8": 1}}
    rows = [(damage["a"][a] + damage["b"][b], a, b) for a in damage["a"] for b in damage["b"]]
    rows[6] = (99, "w8", "w2")
    (here / "plans.csv").write_text("damage,a,b\n" + "".join(f"{d},{a},{b}\n" for d, a, b in rows))
    status, out, err = run(capsys, "compare", "table.csv", "plans.csv")
    assert (status, err) == (0, "")
    assert "Spearman" in out
    assert "mis-ranked plan" in out
    assert max(map(len, out.splitlines())) <= 80
    status, out, _ = run(capsys, "compare", "table.csv", "plans.csv", "--json")
    content = json.loads(out)
    assert content["agreement"][0]["plans"] == "all"
    assert content["agreement"][0]["count"] == 9
    worst = content["misranked"][0]
    assert (worst["plan"], worst["predicted"], worst["measured"], worst["measured_rank"]) == (6, 5.0, 99.0, 9.0)


def test_compare_prints_bands_of_equal_size(here, capsys):
    """Five plans of 30 bytes with the ranks of the table, and one of 80."""
    lines = ["layer,precision,sensitivity,memory_bytes"]
    lines += [
        f"{layer},{p},{value},{size}"
        for layer in "abcde"
        for p, value, size in (("w2", 5 * "abcde".index(layer) + 5, 2), ("w4", 1, 7))
    ]
    (here / "five.csv").write_text("\n".join(lines))
    plans = ["w2,w4,w4,w4,w4", "w4,w2,w4,w4,w4", "w4,w4,w2,w4,w4", "w4,w4,w4,w2,w4", "w4,w4,w4,w4,w2", "w4,w4,w4,w4,w4"]
    (here / "plans.csv").write_text("damage,a,b,c,d,e\n" + "".join(f"{i},{row}\n" for i, row in enumerate(plans)))
    _, out, _ = run(capsys, "compare", "five.csv", "plans.csv")
    assert "of equal size" in out
    assert "30.0 B to 30.0 B" in out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("solve missing.csv --budget memory_bytes=1", 2, "missing.csv: No such file"),
        ("solve table.csv --budget memory_bytes=10B", 3, "the least any plan uses is 20, 10 of it in layer 'a'"),
        ("solve table.csv --budget memory_bytes=-5", 2, "0 or more"),
        ("solve table.csv --budget memory_bytes=lots", 2, "expected an amount"),
        ("solve table.csv --budget memory_bytes", 2, "expected resource=value"),
        ("solve table.csv --budget memory=5", 2, "did you mean 'memory_bytes'"),
        ("solve table.csv --budget memory_bytes=50 --solver ipl", 2, "did you mean 'ilp'"),
        ("solve table.csv --budget memory_bytes=50 --solver ilp --option backend=hihgs", 2, "did you mean 'highs'"),
        ("solve table.csv --budget memory_bytes=50 --solver ilp --option back=cbc", 2, "has no option 'back'"),
        ("solve table.csv --budget memory_bytes=50 --solver ilp --option time_limit_s=soon", 2, "expected a number"),
        ("solve table.csv", 2, "--budget"),
        ("solve table.csv --budget memory_bytes=50 -o no/such/folder/p.json", 2, "No such file"),
        ("solve", 2, "required"),
        ("slove table.csv", 2, "invalid choice"),
        ("pareto table.csv --over memory", 2, "did you mean 'memory_bytes'"),
        ("pareto table.csv --plot front.gif", 2, "a picture ends in"),
        ("show plan.json", 2, "plan.json: No such file"),
        ("show bad.json", 2, "bad.json: not JSON"),
        ("show bad.csv", 2, "line 3"),
        ("evaluate nets.py:net --data nets.py:data --plan other.json", 2, "the plan names 'fc'"),
        ("profile nets.py:net --data nets.py:data --precisions w99 -o t.csv", 2, "an integer format of 99 bits"),
        ("profile nets.py:net --data nets.py:data --precisions w4 --estimator hesian-trace -o t", 2, "did you mean 'hessian-trace'"),
        ("profile nets.py:nett --data nets.py:data --precisions w4 -o t.csv", 2, "did you mean 'net'"),
        ("profile nest.py:net --data nets.py:data --precisions w4 -o t.csv", 2, "no file nest.py"),
        ("profile nets.py --data nets.py:data --precisions w4 -o t.csv", 2, "expected file.py:function"),
        ("profile nets.py:number --data nets.py:data --precisions w4 -o t.csv", 2, "is a int"),
        ("profile nets.py:data --data nets.py:data --precisions w4 -o t.csv", 2, "expected a torch.nn.Module"),
        ("profile nets.py:fails --data nets.py:data --precisions w4 -o t.csv", 2, "RuntimeError: no weights here"),
        ("profile nets.py:net --data nets.py:nothing --precisions w4 -o t.csv", 2, "the data set is empty"),
        ("profile nets.py:no_layers --data nets.py:data --precisions w4 -o t.csv", 2, "no quantizable layer"),
        ("profile nets.py:random --data nets.py:data --precisions w4 -o t.csv", 2, "random in evaluation mode"),
        ("profile nets.py:net --data nets.py:unlabelled --precisions w4 --estimator hessian-trace --loss cross-entropy -o t", 2, "labels"),
        ("profile nets.py:net --data nets.py:data --precisions w4 --resources memory -o t.csv", 2, "did you mean 'memory_bytes'"),
        ("profile nets.py:net --data nets.py:data --precisions w4 --exclude fc -o t.csv", 2, "matches no layer"),
        ("compare table.csv other.csv", 2, "No such file"),
        ("compare table.csv damage.csv", 2, "line 2: damage is 'much'"),
        ("compare damage.csv table.csv", 2, "no column 'layer'"),
        ("compare table.csv fewer.csv", 2, "the plans say nothing of layer 'b'"),
        ("compare table.csv two.csv", 2, "2 measured plans, expected 3 or more"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_the_right_status(here, capsys, arguments, status, words):
    import shlex

    (here / "bad.json").write_text("{")
    (here / "other.json").write_text('{"mpsearch_plan": 1, "layers": {"fc": "w4"}}')
    (here / "damage.csv").write_text("damage,a,b\nmuch,w2,w4\n")
    (here / "fewer.csv").write_text("damage,a\n1,w2\n2,w4\n3,w8\n")
    (here / "two.csv").write_text("damage,a,b\n1,w2,w4\n2,w4,w4\n")
    (here / "bad.csv").write_text("layer,precision,sensitivity\na,w4,1\na,w8,nan\n")
    found, out, err = run(capsys, *shlex.split(arguments))
    assert found == status, err
    assert words in err
    assert err.startswith("mpsearch: error: ")
    assert err.count("\n") == 1
    assert out == ""


SEARCH = (
    "search", "wide.py:net", "--data", "wide.py:data", "--precisions", "w2 w3 w4", "-o", "out", "--max-passes", "14",
)  # fmt: skip
WIDE = (
    NETS.replace("range(2)", "range(4)")
    + """
def other():
    return data()[:2]

def score(model, batch):
    return float((model(batch[0]).argmax(1) == batch[1]).float().mean())

def badness(model, batch):
    return -score(model, batch)
"""
)


@pytest.fixture
def wide(here):
    (here / "wide.py").write_text(WIDE)
    return here


def test_search_prints_and_writes(wide, capsys):
    status, out, err = run(capsys, *SEARCH, "--budget", "average_bits=3")
    assert status == 0, err
    assert "wrote out" in err
    assert "forward-pass equivalents" in out
    assert "unquantized" in out
    assert max(map(len, out.splitlines())) <= 100
    found = SearchResult.load("out")
    assert found.verdict in out
    assert dict(Plan.load("out/plan.json")) == dict(found.plan)
    assert (wide / "out" / "front.png").read_bytes().startswith(b"\x89PNG")
    assert (wide / "out" / "front.png").stat().st_size > 10_000
    status, out, err = run(
        capsys,
        *SEARCH[:-2],
        "--budget",
        "average_bits=2.5",
        "--max-passes",
        "14",
        "--previous",
        "out",
        "--json",
        "--quiet",
    )
    assert (status, err) == (0, "")
    content = json.loads(out)
    assert sorted(content) == [
        "comparison", "identity", "layers", "mpsearch_search", "over", "passes", "seconds", "settings", "tables",
        "uniform", "verdict", "wins",
    ]  # fmt: skip
    assert content["settings"]["stages"]["tables"] == 0
    assert content["layers"] == {name: str(precision) for name, precision in Plan.load("out/plan.json").items()}


def test_every_option_of_search(wide, capsys):
    status, out, err = run(
        capsys, *SEARCH[:-2], "--effort", "thorough", "--tolerance", "0.3", "--minimize", "bitops", "--metric", "wide.py:score",
        "--higher-is-better", "--select", "wide.py:other", "--report", "wide.py:data", "--exclude", "0", "--seed", "3",
        "--resources", "memory_bytes,bitops", "--checkpoint", "run.db", "--json", "--quiet",
    )  # fmt: skip
    assert (status, err) == (0, "")
    content = json.loads(out)
    assert list(content["layers"]) == ["3"]
    settings = content["settings"]
    assert settings["samples"] == {"score": 64, "select": 32, "report": 64}
    assert (settings["effort"], settings["tolerance"], settings["minimize"]) == ("thorough", 0.3, "bitops")
    assert (settings["metric"], settings["seed"]) == ("own", 3)
    assert (wide / "run.db").stat().st_size > 1000
    status, out, _ = run(
        capsys, *SEARCH, "--front", "--proposer", "moves", "--proposer", "crossing", "--quiet", "--json"
    )
    assert status == 0
    assert [part.partition("(")[0] for part in json.loads(out)["settings"]["proposers"]] == ["Moves", "Crossing"]
    rows = (wide / "out" / "front.csv").read_text().splitlines()
    assert {row.split(",")[-1] for row in rows[1:]} == {"", "w2", "w3", "w4"}


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("--budget average_bits=1", 3, "the least any plan uses is 2"),
        ("--tolerance 1e-12", 3, "no measured plan stays within the tolerance"),
        ("", 2, "nothing is asked for"),
        ("--budget memory_bytes=50% --tolerance 1", 2, "both minimized and limited"),
        ("--budget average_bits=3 --effort fast", 2, "--effort and --max-passes at once"),
        ("--budget average_bits=3 --max-passes 2", 2, "passes are too few"),
        ("--budget average_bits=3 --metric wide.py:skore", 2, "did you mean 'score'"),
        ("--budget average_bits=3 --report wide.py:unlabelled --metric loss", 2, "the loss needs labels"),
        ("--budget average_bits=3 --previous nowhere", 2, "No such file"),
        ("--tolerance much", 2, "invalid float value"),
        ("--budget average_bits=3 --proposer move", 2, "unknown proposer 'move'; did you mean 'moves'?"),
        (
            "--budget average_bits=3 --proposer wide.py:score",
            2,
            "proposer 'wide.py:score' is a function, expected a class",
        ),
    ],
)
def test_mistakes_in_a_search(wide, capsys, arguments, status, words):
    import shlex

    found, out, err = run(capsys, *SEARCH, *shlex.split(arguments))
    assert found == status, err
    assert words in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("-o table.csv", "table.csv: Not a directory"),
        ("-o table.csv/out", "table.csv: Not a directory"),
        ("-o out --plot nowhere/x.png", "nowhere: No such file or directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_before_any_work(wide, capsys, monkeypatch, arguments, words):
    import mpsearch as mps

    monkeypatch.setattr(mps, "search", lambda *_, **__: pytest.fail("it searched"))
    status, out, err = run(capsys, *SEARCH[:-4], "--budget", "average_bits=3", *arguments.split())
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.endswith(f"{words}\n")
    assert not (wide / "out").exists()


def test_a_table_that_cannot_be_written_is_told_before_any_work(here, capsys, monkeypatch):
    import mpsearch as mps

    monkeypatch.setattr(mps, "profile", lambda *_, **__: pytest.fail("it profiled"))
    line = "profile nets.py:net --data nets.py:batches --precisions w4 -o nowhere/table.csv"
    status, out, err = run(capsys, *line.split())
    assert (status, out, err) == (2, "", "mpsearch: error: nowhere: No such file or directory\n")


def test_a_missing_folder_is_named(here, capsys):
    status, _, err = run(capsys, "solve", "table.csv", "--budget", "memory_bytes=50", "-o", "nowhere/plan.json")
    assert (status, err) == (2, "mpsearch: error: nowhere: No such file or directory\n")


def test_an_interrupt_is_one_line(here, capsys, monkeypatch):
    import mpsearch as mps

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(mps, "solve", interrupted)
    status, _, err = run(capsys, "solve", "table.csv", "--budget", "memory_bytes=50")
    assert (status, err) == (1, "mpsearch: error: interrupted\n")


def test_solving_a_large_model_needs_no_torch(here):
    """224 layers x 8 precisions, proven without torch."""
    lines = ["layer,precision,sensitivity,memory_bytes"]
    lines += [
        f"l{i},w{b},{(i * 37 % 101 + 1) * 4.0**-b},{(i % 7 + 1) * 1000 * b}" for i in range(224) for b in range(1, 9)
    ]
    (here / "big.csv").write_text("\n".join(lines))
    code = (
        "import sys; from mpsearch.cli import main; "
        "s = main(['solve', 'big.csv', '--budget', 'memory_bytes=50%', '--quiet', '-o', 'p.json', '--json']); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(s)"
    )
    solved = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert solved.stderr == "False\n"
    content = json.loads(solved.stdout)
    assert content["status"] == "optimal"


def test_a_tool_that_is_not_installed_is_one_line(here, capsys, monkeypatch):
    def nothing(distribution):
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(importlib.metadata, "version", nothing)
    (here / "p.json").write_text('{"mpsearch_plan": 1, "layers": {"0": "w4", "3": "w4"}}')
    status, out, err = run(
        capsys, *["export", "p.json", "--to", "torchao", "--model", "nets.py:net", "--verify", "-o", "x"]
    )
    assert (status, out) == (2, "")
    assert err == "mpsearch: error: torchao is not installed; 'pip install torchao' brings it\n"


@pytest.mark.slow
def test_the_demo_as_a_user_runs_it(here):
    """Offline, same numbers each time."""
    pytest.importorskip("sklearn")
    first, second = (
        subprocess.run(
            [sys.executable, "-m", "mpsearch", "demo", "--json"], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    )
    assert first == second
    content = json.loads(first)
    assert len(content["verdicts"]) == 3
    assert any(text.startswith("mixed precision wins") for text in content["verdicts"].values())


def test_warnings_are_shown_as_before_afterwards(here, capsys, monkeypatch):
    """One line on stderr while a command runs; then, however it ended, as the program that called it shows them."""
    shown = []

    def show(message, *_, **__):
        shown.append(str(message))

    monkeypatch.setattr(warnings, "showwarning", show)
    (here / "loud.py").write_text(
        "import warnings\ndef net():\n    warnings.warn('two\\nlines', stacklevel=1)\n    raise RuntimeError('no')\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        status, _, err = run(capsys, "show", "loud.py:net", "--data", "loud.py:net")
        assert status == 2
        assert err.startswith("mpsearch: two lines\nmpsearch: error: ")
        assert warnings.showwarning is show
        warnings.warn("mine", stacklevel=1)
    assert shown == ["mine"]
