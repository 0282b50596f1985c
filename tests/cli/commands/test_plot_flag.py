"""`--plot FILE` on the commands: which picture each of them draws."""

import pytest

from mpsearch import CostTable
from mpsearch.cli import main
from mpsearch.display import figures

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

def data():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 6, generator=g), torch.randint(0, 3, (16,), generator=g)) for _ in range(4)]
"""

TABLE = """layer,precision,sensitivity,numel,macs,memory_bytes
0,w2,9,48,48,12
0,w4,3,48,48,24
2,w2,4,24,24,6
2,w4,2,24,24,12
"""

PLANS = """damage,0,2
14,w2,w2
9,w4,w2
6,w4,w4
"""


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The labels of the vertical axes of each picture that is written, by the name of its file."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "table.csv").write_text(TABLE)
    (tmp_path / "other.csv").write_text(TABLE.replace(",9,", ",8,"))
    (tmp_path / "plans.csv").write_text(PLANS)
    monkeypatch.chdir(tmp_path)
    assert main(["solve", "table.csv", "--budget", "memory_bytes=30", "-o", "plan.json"]) == 0
    found = {}
    written = figures.figure.save

    def save(figure, path):
        written(figure, path)
        found[str(path)] = [axes.get_ylabel() for axes in figure.axes]

    monkeypatch.setattr(figures.figure, "save", save)
    monkeypatch.setattr(figures, "save", save)
    return found


@pytest.mark.parametrize(
    ("line", "labels"),
    [
        ("profile nets.py:net --data nets.py:data --estimator qe --precisions w2,w4 -o t.csv", ["damage [relative]"]),
        ("show table.csv", ["damage [relative]"]),
        ("solve table.csv --budget memory_bytes=30", ["weight bits", "parameters", "MACs\n(one sample)"]),
        ("show plan.json", ["weight bits"]),
        (
            "evaluate nets.py:net --data nets.py:data --plan plan.json",
            ["weight bits", "parameters", "MACs\n(one sample)"],
        ),
        ("pareto table.csv", ["predicted damage [relative]"]),
        ("compare table.csv other.csv", ["other.csv: damage [relative]"]),
        ("compare table.csv plans.csv", ["measured damage [relative]"]),
        (
            "search nets.py:net --data nets.py:data --budget average_bits=3 --precisions w2,w4 --max-passes 20 -o out",
            ["measured damage, KL to the unquantized model [nats]"],
        ),
    ],
)
def test_each_command_draws_what_it_found(drawn, capsys, line, labels):
    assert main([*line.split(), "--plot", "picture.svg"]) == 0
    assert drawn["picture.svg"] == labels
    assert "picture.svg" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["profile nowhere.py:net --data x:y --precisions w2 -o t.csv", "show table.csv", "pareto table.csv"]
)
def test_another_kind_of_file_is_refused_before_any_work(drawn, capsys, line):
    assert main([*line.split(), "--plot", "picture.gif"]) == 2
    assert "picture.gif: a picture ends in .png, .svg or .pdf" in capsys.readouterr().err


def test_a_model_has_no_picture(drawn, capsys):
    assert main(["show", "nets.py:net", "--data", "nets.py:data", "--plot", "net.png"]) == 2
    assert "profile it first" in capsys.readouterr().err


def test_the_table_that_is_drawn_is_the_one_that_is_written(drawn, capsys):
    line = "profile nets.py:net --data nets.py:data --estimator qe --precisions w2,w4 -o t.csv --plot t.png"
    assert main(line.split()) == 0
    assert CostTable.load("t.csv").unit == "relative"
    assert set(drawn) == {"t.png"}
