"""The read-back check turns red for everything that a quantizer can get wrong."""

import dataclasses

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.export.verification import Stored, verified
from mpsearch.quantize import RoundToNearest

PLAN = mps.Plan({"0": mps.Precision("4"), "1": mps.Precision("3"), "2": mps.Precision("16")})
QUANTIZER = RoundToNearest(scale="max")


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 8))


def honest(plan, model):
    found = {}
    for name, precision in plan.items():
        if precision.quantizes_weight:
            weight = model.get_submodule(name).weight.detach()
            kept = QUANTIZER.codes(weight, precision)
            codes = (kept.rounded / kept.scales).round()
            size = kept.pack().nbytes
            found[name] = Stored(precision, kept.values(), codes, size, size, QUANTIZER(weight, precision))
    return found


def test_an_honest_tool_passes_and_the_model_is_untouched(model):
    before = [p.detach().clone() for p in model.parameters()]
    found = verified("tool", "1.0", honest, PLAN, model)
    assert [check.name for check in found.layers] == ["0", "1"]
    assert [check.code_range for check in found.layers] == [(-7, 7), (-3, 3)]
    assert all(check.difference == 0 for check in found.layers)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert "tool 1.0: 2 layers carried out as planned" in str(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": mps.Precision("8")}, "'0' is stored as w8, the plan says w4"),
        ({"precision": mps.Precision("4", "8")}, "'0' is stored as w4a8, the plan says w4"),
        ({"precision": mps.Precision("4", "16", 8)}, "'0' is stored as w4g8, the plan says w4"),
        ({"codes": torch.tensor([-8, 8])}, r"'0' has codes -8..8, more than the 16 of w4"),
        ({"nbytes": 7}, "'0' takes 7 bytes, expected 96"),
        ({"values": torch.zeros(8, 16)}, "every weight of '0' became 0"),
        ({"values": torch.full((8, 16), torch.nan)}, "'0' has 128 weights that are not finite"),
        ({"values": torch.ones(8, 15)}, r"'0' has the shape \(8, 15\), expected \(8, 16\)"),
        ({"values": torch.ones(8, 16)}, "128 weights of '0' differ, by up to"),
        ({"values": torch.ones(8, 16), "expected": None}, r"'0' is off by .* \(squared\), rounding to nearest by"),
    ],
)
def test_every_difference_is_told(model, change, words):
    def wrong(plan, model):
        found = honest(plan, model)
        return {**found, "0": dataclasses.replace(found["0"], **change)}

    with pytest.raises(mps.ExportError, match=f"tool 1.0 does not carry the plan out: .*{words}"):
        verified("tool", "1.0", wrong, PLAN, model)


def test_coverage_both_ways(model):
    with pytest.raises(mps.ExportError, match="'0' was left alone, the plan says w4"):
        verified("tool", "1.0", lambda plan, model: {"1": honest(plan, model)["1"]}, PLAN, model)
    with pytest.raises(mps.ExportError, match="'2' was quantized, the plan leaves it alone"):
        verified("tool", "1.0", lambda plan, model: {**honest(plan, model), "2": honest(plan, model)["1"]}, PLAN, model)
