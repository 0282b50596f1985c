"""Options that use as much as a finer one: never in a search, whatever the measured damage says."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.plan_search.outdone import without_outdone

OPTIONS = mps.precisions("w4g64 w5g64 w6g64 w8g64 w8a8g64")


def table(bytes_of, **resources):
    layers = (mps.Layer("a", weight_shape=(8, 64)), mps.Layer("b", weight_shape=(8, 64)))
    usage = {
        "memory_bytes": np.array([bytes_of] * 2, float),
        **{k: np.array([v] * 2, float) for k, v in resources.items()},
    }
    return mps.CostTable(layers, OPTIONS, np.zeros((2, 5)), usage=usage)


def left(found):
    return [str(option) for option, kept in zip(OPTIONS, found.allowed[0], strict=True) if kept]


HQQ = table([4, 8, 8, 8, 8], bitops=[4, 5, 6, 8, 4])
MEMORY = mps.WithinBudget(mps.Budget(memory_bytes=12))


def test_what_counts_is_what_is_asked_for():
    told = r"w5g64 in 2 layers \(no less than w8g64\), w6g64 in 2 layers \(no less than w8g64\)"
    goals = [MEMORY, mps.LeastResource("memory_bytes", tolerance=0.1), mps.WholeFront("memory_bytes")]
    goals.append(mps.WithinBudget(mps.Budget(memory_bytes=(6, 16))))
    for goal in goals:
        with pytest.warns(UserWarning, match=told):
            found = without_outdone(HQQ, goal)
        assert left(found) == ["w4g64", "w8g64", "w8a8g64"]
        assert found.origin["outdone"].startswith("options that use as much as a finer one are left out: ")


@pytest.mark.parametrize(
    "goal",
    [
        mps.WithinBudget(mps.Budget(average_bits=6)),
        mps.WithinBudget(mps.Budget(memory_bytes=12, bitops=12)),
        mps.LeastResource("memory_bytes", tolerance=0.1, budget=mps.Budget(bitops=12)),
    ],
)
def test_what_is_cheaper_in_anything_stays(goal, recwarn):
    assert without_outdone(HQQ, goal) is HQQ
    assert not recwarn.list


def test_groups_decide_together_and_what_is_not_allowed_outdoes_nothing(recwarn):
    cells = np.array([[4.0, 8, 8, 8, 8], [4, 5, 6, 8, 8]])  # the second layer packs densely
    layers = tuple(mps.Layer(name, weight_shape=(8, 64), group="g") for name in "ab")
    joined = mps.CostTable(layers, OPTIONS, np.zeros((2, 5)), usage={"memory_bytes": cells})
    assert without_outdone(joined, MEMORY) is joined
    none = mps.CostTable(layers, OPTIONS, [[0, 0, 0, np.nan, 0]] * 2, usage={"memory_bytes": [[4, 6, 7, 1, 8]] * 2})
    assert without_outdone(none, MEMORY) is none
    assert not recwarn.list


def test_a_search_for_hqq_takes_no_six_bits():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    data = [torch.randn(16, 64) for _ in range(4)]
    layers = mps.layers(model, data[0], target="hqq")
    with pytest.warns(UserWarning, match="w6g64 in 3 layers"):
        result = mps.search(
            model,
            data,
            mps.Budget(memory_bytes=9000),
            mps.precisions("w4g64 w6g64 w8g64"),
            layers=layers,
            effort="fast",
            progress=False,
        )
    plans = [result.plan, *result.plans.plans]
    assert not any(precision.weight == "6" for plan in plans for precision in plan.values())
    assert result.plan.usage["memory_bytes"] <= 9000
    assert "memory_bytes: as hqq stores it: 3-bit codes ten to a 32-bit word" in str(result)
    assert "w6g64 in 3 layers (no less than w8g64)" in str(result)
