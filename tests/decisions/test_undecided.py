"""What no decision touches is told: by `layers`, in tables and results, where a budget cannot be met, and of plans that name little."""

import warnings

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity import RelativeWeightError


class Positioned(nn.Module):
    """A table of positions, which is added, is no decision."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(40, 10))
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x):
        return self.second(torch.relu(self.first(x + self.positions[: x.shape[1]])))


X = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(0))


def said(function, *args, **keywords):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = function(*args, **keywords)
    return value, [str(one.message) for one in caught]


def test_layers_names_the_largest_with_their_share_once():
    _, told = said(mps.layers, Positioned(), X)
    assert told == [
        "68 % of the weights are not decided on and stay at full width: positions 65 %, norms and biases 3.2 %"
    ]


def test_a_model_whose_matrices_are_all_decided_is_left_in_peace():
    assert said(mps.layers, nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), torch.ones(2, 4))[1] == []


def test_what_the_user_excludes_is_told_as_such():
    _, told = said(mps.layers, Positioned(), X, exclude=["second"])
    assert told == [
        "84 % of the weights are not decided on and stay at full width: positions 65 %, norms and biases 1.6 %, excluded 18 %"
    ]
    _, told = said(mps.layers, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.ones(2, 4), exclude=["0"])
    assert told == []


def test_a_budget_that_cannot_be_met_says_where_the_rest_is(tmp_path):
    table = mps.profile(Positioned(), [X], RelativeWeightError(), mps.precisions("w4 w8"), progress=False)
    assert table.origin["undecided"]["parameters"] == {"positions": pytest.approx(400 / 620)}
    for name in ("table.csv", "table.npz"):
        table.save(tmp_path / name)
        again = mps.CostTable.load(tmp_path / name)
        with pytest.raises(mps.InfeasibleError, match=r"cannot be met: .*not decided on.*: positions 65 %"):
            mps.solve(again, mps.Budget(memory_bytes="25%"))


@pytest.mark.parametrize("door", ["evaluate", "measure_plans"])
def test_a_plan_that_names_little_of_a_model_is_told(door):
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 5))
    few, whole = (mps.Plan(dict.fromkeys(names, mps.Precision("4"))) for names in (["0"], ["0", "2", "4"]))

    def run(plan):
        given = plan if door == "evaluate" else [plan]
        return said(getattr(mps, door), model, [torch.randn(8, 10)], given, metric="kl", progress=False)[1]

    assert run(few) == [
        "the plan names 1 layer: 83 % of the weights are not decided on and stay at full width: 2.weight 50 %, "
        "4.weight 25 %, norms and biases 7.6 %"
    ]
    assert run(whole) == []


def test_result_of_a_search_says_it(tmp_path):
    data = [
        (x[None], torch.tensor([0] * 1)) for x in torch.randn(24, 5, 10, generator=torch.Generator().manual_seed(1))
    ]
    data = [x for x, _ in data]
    found, _ = said(
        mps.search,
        Positioned(),
        data,
        mps.Budget(average_bits=4),
        mps.precisions("w2 w4 w8"),
        effort="fast",
        progress=False,
    )
    assert "positions 65 %" in str(found)
    found.report(tmp_path / "report.html")
    assert "positions 65 %" in (tmp_path / "report.html").read_text()
