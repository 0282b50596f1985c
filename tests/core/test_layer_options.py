"""Options of single layers: in the table, in the plan, and nowhere else."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.cli import main
from mpsearch.core.layer_options import columns, with_options
from mpsearch.core.problem import uniform_options
from mpsearch.sensitivity import FisherProjection, KLDivergence


def net(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))


def batches(number=4, width=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(16, width, generator=generator) for _ in range(number)]


def texts(table):
    return [" ".join(str(table.precisions[p]) for p in np.flatnonzero(row)) for row in table.allowed]


@pytest.mark.parametrize("estimator", [FisherProjection(), KLDivergence()])
def test_a_layer_has_its_own_options_and_they_are_no_one_elses(estimator):
    allow = {"*": "w2 w4", "4": "w8"}
    for arguments in ({"allow": allow}, {"layers": mps.layers(net(), batches()[0], allow=allow)}):
        table = mps.profile(net(), batches(), estimator, mps.precisions("w2 w3 w4"), progress=False, **arguments)
        assert [str(p) for p in table.precisions] == ["w2", "w3", "w4", "w8"]
        assert texts(table) == ["w2 w4", "w2 w4", "w8"]
        assert table.allowed.sum() == 5
        plan = mps.solve(table, mps.Budget(average_bits=4)).plan
        assert str(plan["4"]) == "w8"
    plain = mps.profile(net(), batches(), estimator, mps.precisions("w2 w4 w8"), progress=False)
    assert table.sensitivity[0, 0] == pytest.approx(plain.sensitivity[0, 0])
    assert table.sensitivity[2, 3] == pytest.approx(plain.sensitivity[2, 2])


def test_layers_without_options_of_their_own_have_those_of_the_run():
    layers = with_options([mps.Layer("a"), mps.Layer("b")], {"b": "w8"})
    decisions, options = columns(layers, mps.precisions("w2 w4"))
    assert [str(p) for p in options] == ["w2", "w4", "w8"]
    assert [" ".join(map(str, layer.allowed)) for layer in decisions] == ["w2 w4", "w8"]
    assert columns([mps.Layer("a")], mps.precisions("w2")) == ([mps.Layer("a")], mps.precisions("w2"))


def test_of_several_patterns_the_last_counts_and_what_is_fixed_counts_before():
    layers = [mps.Layer(name) for name in ("block.0.fc", "block.1.fc", "head")]
    given = {"block.*": "w2 w3", "*.1.fc": "w4", "*": "w8"}
    assert {str(layer.allowed[0]) for layer in with_options(layers, given)} == {"w8"}
    given = {"*": "w8", "block.*": "w2 w3", "*.1.fc": [mps.Precision("4")]}
    found = with_options(layers, given, {"block.0.fc": mps.Precision("6")})
    assert [" ".join(map(str, layer.allowed)) for layer in found] == ["w6", "w4", "w8"]
    with_brackets = [mps.Layer("a[0]"), mps.Layer("a0")]  # a name before it is a pattern
    assert [len(layer.allowed) for layer in with_options(with_brackets, {"a[0]": "w2"})] == [1, 0]


def test_a_plan_fixes_its_layers(tmp_path):
    plan = mps.Plan({"0": mps.Precision("8"), "2": mps.Precision("3")})
    plan.save(tmp_path / "plan.json")
    for fixed in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json"), {"0": "w8", "2": "w3"}):
        table = mps.profile(net(), batches(), FisherProjection(), mps.precisions("w2 w4"), fixed=fixed, progress=False)
        assert texts(table) == ["w8", "w3", "w2 w4"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"allow": {"5": "w2"}}, "allow: '5' matches no layer"),
        ({"fixed": {"head": "w2"}}, "fixed: 'head' matches no layer"),
        ({"fixed": {"0": "w2 w3"}}, "has 2 precisions, expected one"),
        ({"allow": {"0": []}}, "expected precisions"),
        ({"allow": {"0": [4]}}, "expected precisions"),
        ({"allow": "w2"}, "expected a mapping"),
        ({"allow": {"0": "w2", "2": "w3"}, "groups": {"both": ["0", "2"]}}, "no option in common: 0 w2; 2 w3"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, words):
    with pytest.raises(mps.TableError, match=words) as caught:
        mps.layers(net(), batches()[0], **arguments)
    assert "\n" not in str(caught.value)


def test_a_group_has_what_all_its_members_may_have():
    groups = {"both": ["0", "2"]}
    layers = mps.layers(net(), batches()[0], groups=groups, allow={"0": "w4 w8"})
    table = mps.profile(net(), batches(), FisherProjection(), mps.precisions("w2 w4"), layers=layers, progress=False)
    assert texts(table) == ["w4", "w4", "w2 w4"]
    layers = mps.layers(net(), batches()[0], groups=groups, allow={"0": "w8"})
    with pytest.raises(mps.TableError, match="'0' may be w8 alone"):
        mps.profile(net(), batches(), FisherProjection(), mps.precisions("w2 w4"), layers=layers, progress=False)


def test_a_checkpoint_of_other_options_is_not_taken(tmp_path):
    arguments = {"precisions": mps.precisions("w2 w4"), "checkpoint": tmp_path / "work.db", "progress": False}
    mps.profile(net(), batches(), KLDivergence(), allow={"4": "w4"}, **arguments)
    with pytest.raises(mps.MpsearchError, match="layers"):
        mps.profile(net(), batches(), KLDivergence(), **arguments)


def test_search_keeps_the_options_and_says_where_uniform_is_uniform():
    result = mps.search(
        net(),
        batches(8),
        mps.Budget(average_bits=4.4),
        mps.precisions("w2 w3 w4"),
        allow={"4": "w8"},
        effort="fast",
        progress=False,
    )
    assert all(str(plan["4"]) == "w8" for plan in result.plans.plans)
    assert "w8" not in {str(result.plan[name]) for name in ("0", "2")}
    assert result.uniform is not None
    assert result.uniform[0].endswith("where allowed")
    assert "where allowed" in result.verdict
    assert "nothing was searched" not in result.verdict
    assert result.plan.usage["average_bits"] <= 4.4


def test_uniform_plans_where_allowed():
    options = mps.precisions("w2 w4 w8")
    everywhere = uniform_options(np.ones((3, 3), bool), options)
    assert {name: plan.tolist() for name, plan in everywhere.items()} == {"w2": [0] * 3, "w4": [1] * 3, "w8": [2] * 3}
    allowed = np.array([[True, False, True], [True, True, False], [False, False, True]])
    assert {name: plan.tolist() for name, plan in uniform_options(allowed, options).items()} == {
        "w2 where allowed": [0, 0, 2],
        "w8 where allowed": [2, 1, 2],
    }


NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))

def batches():
    return [torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
"""


def test_on_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    mps.Plan({"0": mps.Precision("3")}).save("fixed.json")
    model = ["nets.py:net", "--data", "nets.py:batches"]
    own = ["--allow", "*=w2 w4", "--allow", "4=w8", "--fixed", "fixed.json"]
    assert main(["show", *model, "--precisions", "w2 w4", *own, "--json"]) == 0
    refused = json.loads(capsys.readouterr().out)["refused"]
    assert refused == {"0": ["w2", "w4", "w8"], "2": ["w3", "w8"], "4": ["w2", "w4", "w3"]}
    run = [
        "profile",
        *model,
        "--precisions",
        "w2 w4",
        *own,
        "--estimator",
        "fisher-projection",
        "-o",
        "table.csv",
        "--quiet",
    ]
    assert main(run) == 0
    capsys.readouterr()
    assert main(["solve", "table.csv", "--budget", "average_bits=3..5.5", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["layers"] == {"0": "w3", "2": "w4", "4": "w8"}
    assert 3 <= answer["usage"]["average_bits"] <= 5.5
    assert main(["show", *model, *own[:-2], "--allow", "w8"]) == 2
    assert "expected PATTERN=PRECISIONS" in capsys.readouterr().err


def test_a_search_within_a_band_of_effective_bits():
    budget = mps.Budget(effective_bits=(4.5, 7))
    result = mps.search(net(), batches(8), budget, mps.precisions("w2 w3 w4 w8"), effort="fast", progress=False)
    assert all(4.5 <= plan.usage["effective_bits"] <= 7 for plan in result.plans.plans)
    stored = (
        8 * (result.plan.usage["memory_bytes"] - 4 * (24 + 24 + 8)) / (16 * 24 + 24 * 24 + 24 * 8)
    )  # without biases
    assert result.plan.usage["effective_bits"] == pytest.approx(stored)
    assert result.plan.budget["effective_bits"] == (4.5, 7.0)
