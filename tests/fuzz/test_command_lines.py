"""Hostile command lines: an answer, or one line on stderr and a status that says why; never a traceback."""

import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpsearch import cli

MODULE = """
import ctypes, os, sys, torch
print("loaded")
print("loaded, to stderr", file=sys.stderr)
os.write(1, b"written\\n")
ctypes.CDLL(None).puts(b"put")
torch.manual_seed(0)
net = lambda: (print("made"), torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)))[1]
batches = lambda: [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]
unlabelled = lambda: [torch.randn(8, 4)]
words = lambda: [(torch.randn(8, 4), list("abcdefgh"))]
wrong = lambda: [torch.randn(8, 5)]
tensor = lambda: torch.zeros(3, 4)
nothing = lambda: None
empty = lambda: []
number = 3
def fails(): raise ValueError("two\\nlines \\x1b[2J")
def leaves(): sys.exit(0)
def yields():
    yield torch.zeros(8, 4)
    raise KeyError("x")
def loss(model, batch): return "no number"
class Bare: pass
class Broken:
    def __init__(self): raise TypeError("broken")
"""
OTHERS = {
    "broken.py": "1/0",
    "syntax.py": "def",
    "leaves.py": "import sys; sys.exit(3)",
    "cuts.py": "import nowhere",
    "sub/json.py": MODULE,
}
TABLE = "layer,precision,sensitivity,memory_bytes,numel\na,w2,3,8,32\na,w4,1,16,32\nb,w2,2,8,32\nb,w4,0.5,16,32\n"
KEPT = tempfile.TemporaryDirectory()


@functools.cache
def folder():
    path = Path(KEPT.name)
    path.joinpath("nets.py").write_text(MODULE)
    path.joinpath("sub").mkdir()
    for name, text in OTHERS.items():
        path.joinpath(name).write_text(text)
    path.joinpath("table.csv").write_text(TABLE)
    path.joinpath("plan.json").write_text(json.dumps({"mpsearch_plan": 1, "layers": {"0": "w4", "2": "w2"}}))
    path.joinpath("odd.csv").write_text(TABLE.replace("a,w", "=a\x1b[2J,w"))
    return path


def run(*arguments):
    """Status, stdout and stderr of a command, checked."""
    out, err = io.StringIO(), io.StringIO()
    before, show = Path.cwd(), warnings.showwarning
    os.chdir(folder())
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                status = cli.main(arguments)
            except SystemExit as stop:  # --help
                status = stop.code or 0
    finally:
        os.chdir(before)
        warnings.showwarning = show
    errors = [line for line in err.getvalue().split("\n") if line.startswith("mpsearch: error:")]
    assert status in (0, 1, 2, 3), arguments
    assert len(errors) == (status != 0), (arguments, err.getvalue())
    assert "Traceback" not in err.getvalue(), arguments
    assert "\x1b" not in out.getvalue() + err.getvalue(), arguments
    if status == 0 and "--json" in arguments and "--help" not in arguments and "-h" not in arguments:
        assert isinstance(json.loads(out.getvalue()), dict), arguments
    return status, out.getvalue(), err.getvalue()


NETS = [f"nets.py:{name}" for name in ("net", "nothing", "fails", "leaves", "number", "missing", "Bare", "")]
NETS += [f"{name}:net" for name in (*OTHERS, "nowhere.py", "nowhere", "nowhere.x", "", "hf", "../x.py", "a\tb")] + [
    "hf:nowhere",
    ":",
    "",
]
DATA = [
    f"nets.py:{n}"
    for n in (
        "batches",
        "unlabelled",
        "words",
        "wrong",
        "tensor",
        "nothing",
        "empty",
        "number",
        "fails",
        "leaves",
        "yields",
    )
]
DATA += ["text:nowhere", "text:"]
FILES = [
    "table.csv",
    "plan.json",
    "odd.csv",
    "nets.py",
    "nowhere.csv",
    "nowhere.json",
    ".",
    "",
    "/",
    "/dev/null",
    "x" * 300,
    "table.csv/x",
]
PARTS = [
    "nets.py:Bare",
    "nets.py:Broken",
    "nets.py:number",
    "nets.py:fails",
    "nets.py:",
    ":",
    "nowhere",
    "",
    "broken.py:x",
    "-",
]
ESTIMATORS = ["kl-divergence", "fisher", "kurtosis", "kurtosis", *PARTS]
SOLVERS = ["exact", "greedy", "annealing", "evolutionary", "brute-force", *PARTS]
SETTINGS = [
    f"{n}={v}"
    for n in ("seed", "draws", "sweeps", "population", "generations", "chains", "gap", "time_limit_s")
    for v in (-1, 0, "nan", "x", 2)
]
SETTINGS += ["", "=", "x", "seed", "seed=", "=1", "objective=nets.py:number", "x=1"]
BUDGETS = [
    f"{n}={v}"
    for n in ("memory_bytes", "average_bits", "bitops", "x", "")
    for v in ("3", "50%", "1kB", "-1", "nan", "inf", "", "x", "1e999", "0%")
]
BUDGETS += ["", "=", "average_bits", "average_bits=4=5", "average_bits=3.9..4", "\x1b[2J=1"]
PRECISIONS = ["w2 w4", "w4,w8a8", "", " ", "w0", "w4 w4", "w99", "4", "wnvfp4 w4g8", "w4g0", "\x1b", "w4a", "w16"]
RESOURCES = [
    "memory_bytes",
    "x",
    "",
    ",",
    "kv_cache_bytes:context=-1",
    "latency_s=roofline:device=x",
    "latency_s=latency-table:path=nowhere",
]
RESOURCES += [
    "a=nets.py:number",
    "a=nets.py:Bare",
    "memory_bytes,memory_bytes",
    "latency_s=measured-latency:rounds=0",
    "bitops:x=1",
    "a=b",
]
OUT = ["out.csv", "out.json", "out.npz", "nowhere/out.csv", "", ".", "/dev/null", "table.csv/x", "out.html", "o" * 300]
NUMBERS = ["0", "-1", "1", "nan", "inf", "x", "", "1e999", "9" * 5000, "0.5"]
TARGETS = ["torchao", "gguf", "gptqmodel", "mlx", "nowhere", ""]
PICTURES = ["x.png", "x.svg", "x.xyz", "", "nowhere/x.png"]
OPTIONS = {
    "--budget": BUDGETS,
    "--solver": SOLVERS,
    "--option": SETTINGS,
    "--minimize": ["sensitivity", "memory_bytes", "x", ""],
    "--over": ["memory_bytes", "average_bits", "x", ""],
    "--method": ["exact", "x"],
    "--estimator": ESTIMATORS,
    "--precisions": PRECISIONS,
    "--loss": ["kl", "cross-entropy", "nets.py:loss", "nets.py:number", "nets.py:nothing", "x"],
    "--resources": RESOURCES,
    "-o": OUT,
    "--data": DATA,
    "--exclude": ["*", "0", "[", ""],
    "--cut": ["*", "["],
    "--target": TARGETS,
    "--experts": ["each", "x"],
    "--seed": NUMBERS,
    "--tolerance": NUMBERS,
    "--max-passes": NUMBERS,
    "--effort": ["fast", "x"],
    "--metric": ["kl", "loss", "nets.py:loss", "nets.py:fails", "x"],
    "--previous": FILES,
    "--checkpoint": FILES,
    "--plan": FILES,
    "--to": TARGETS,
    "--from": ["gptqmodel", "exllamav2", "nncf", "gguf", "x", ""],
    "--model": NETS,
    "--plot": PICTURES,
    "--select": DATA,
    "--report": DATA,
}
COMMANDS = {
    "solve": ([FILES], ["--budget", "-o"], ["--solver", "--option", "--minimize", "--plot"]),
    "pareto": ([FILES], ["-o"], ["--over", "--method", "--solver", "--option", "--budget", "--plot"]),
    "show": (
        [FILES + NETS],
        ["--data"],
        ["--precisions", "--resources", "--exclude", "--target", "--plot", "--experts"],
    ),
    "compare": ([FILES, FILES], [], ["--plot"]),
    "profile": (
        [NETS],
        ["--data", "--precisions", "-o", "--estimator"],
        ["--option", "--loss", "--resources", "--cut", "--checkpoint"],
    ),
    "search": (
        [NETS],
        ["--data", "--precisions", "-o", "--budget"],
        ["--seed", "--tolerance", "--max-passes", "--metric", "--previous", "--effort"],
    ),
    "evaluate": ([NETS], ["--data", "--plan"], ["--plot"]),
    "export": ([FILES], ["--to", "-o"], ["--model", "--data", "--option"]),
    "import": ([FILES], ["--from", "-o"], ["--model"]),
    "report": ([FILES], ["-o"], []),
    "completion": ([["bash", "zsh", "x", ""]], [], []),
}
#: What works, by option; one or two of them are spoiled.
GOOD = {
    "--budget": "average_bits=3",
    "--precisions": "w2 w4",
    "-o": "out.csv",
    "--data": "nets.py:batches",
    "--estimator": "kurtosis",
    "--plan": "plan.json",
}
GOOD |= {"--to": "gptqmodel", "--from": "gptqmodel"}


@st.composite
def lines(draw):
    command = draw(st.sampled_from(sorted(COMMANDS)))
    places, needed, further = COMMANDS[command]
    chosen = {place: values[0] for place, values in enumerate(places)} | {name: GOOD[name] for name in needed}
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.sampled_from([*chosen, *further]))
        chosen[place] = draw(st.sampled_from(places[place] if isinstance(place, int) else OPTIONS[place]))
    if command == "search" and not chosen.keys() & {"--effort", "--max-passes"}:
        chosen["--max-passes"] = "6"
    line = [command]
    for place, value in chosen.items():
        line += [value] if isinstance(place, int) else [place, value]
    if draw(st.integers(0, 9)) == 0:
        line.insert(
            draw(st.integers(0, len(line))),
            draw(st.sampled_from(["--help", "--x", "--", "-", "\ud800", "\x1b[2J", "--budget", ""])),
        )
    return (*line, *draw(st.sampled_from([(), ("--json",), ("--json",), ("--quiet",)])))


@settings(derandomize=True, max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(lines())
def test_an_answer_or_one_line(line):
    torch.set_num_threads(1)
    run(*line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("solve table.csv --budget average_bits=3 --solver nets.py:number", "'nets.py:number' is a int, expected a class"),
        ("solve table.csv --budget average_bits=3 --solver nets.py:Bare", "no method 'choose'"),
        ("solve table.csv --budget average_bits=3 --solver nets.py:Broken", "cannot be made: TypeError: broken"),
        ("solve table.csv --budget average_bits=3 --solver evolutionary --option population=0", "population=0, expected a whole"),
        ("solve table.csv --budget average_bits=3 --solver annealing --option seed=-1", "seed=-1, expected a whole number of 0"),
        ("solve table.csv --budget average_bits=3 --solver exact --option gap=nan", "gap=nan, expected a number of 0"),
        ("demo -o o --seed -1", "--seed: '-1', expected a whole number of 0"),
        ("show nets.py:net --data nets.py:yields", "'nets.py:yields' failed: KeyError: 'x'"),
        ("show nets.py:net --data nets.py:tensor", "returned one Tensor, expected a sequence of batches"),
        ("show nets.py:net --data nets.py:nothing", "returned one NoneType"),
        ("show nets.py:leaves --data nets.py:batches", "SystemExit: 0"),
        ("show nets.py:fails --data nets.py:batches", r"ValueError: two lines \x1b[2J"),
        ("show leaves.py:net --data nets.py:batches", "leaves.py fails to load: SystemExit: 3"),
    ],
)  # fmt: skip
def test_what_is_told(line, words):
    status, _, err = run(*line.split())
    assert status == 2
    assert words in err


def test_escape_characters_of_names_reach_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["solve", str(folder() / "odd.csv"), "--budget", "average_bits=3"]) == 0
    assert "=a�[2J" in out.getvalue()
    assert set(re.findall(r"\x1b(?:\[[\d;]*m)?", out.getvalue())) <= {"\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[36m"}


def shell(line):
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = line.replace("mpsearch", f"{sys.executable} -m mpsearch")
    return subprocess.run(["bash", "-c", command], cwd=folder(), env=environ, capture_output=True, text=True)


def test_json_alone_on_stdout_whatever_the_model_prints():
    done = shell("mpsearch show nets.py:net --data nets.py:batches --json")
    assert json.loads(done.stdout)["parameters"] == 51
    assert {"loaded", "written", "put", "made"} <= set(done.stderr.split("\n"))


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("mpsearch show table.csv | true; exit ${PIPESTATUS[0]}", 0),
        ("mpsearch --help | true; exit ${PIPESTATUS[0]}", 0),
        ("mpsearch show table.csv >&-", 0),
        ("mpsearch show table.csv --json >&-", 0),
        ("mpsearch show table.csv >&- 2>&-", 0),
        ("mpsearch show nowhere.csv 2>&-", 2),
        ("mpsearch show table.csv > /dev/full", 2),
    ],
)
def test_closed_streams(line, status):
    done = shell(line)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(done.stderr.splitlines()) == (status == 2 and "2>&-" not in line)
