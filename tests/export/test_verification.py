"""The read-back check turns red for everything that a quantizer can get wrong."""

import dataclasses

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.export.verification import Stored, StoredModel, layer_bytes, rest_bytes, verified
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.targets.rules import Scheme, Target

PLAN = mps.Plan({"0": mps.Precision("4"), "1": mps.Precision("3"), "2": mps.Precision("16")})
QUANTIZER = RoundToNearest(scale="max")
TOOL = Target("tool", (Scheme(("3", "4")),))


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
            found[name] = Stored(precision, kept.values(), codes, size, QUANTIZER(weight, precision))
    return StoredModel(found, 8 * 8 * 4 + 3 * 8 * 4)


def test_an_honest_tool_passes_and_the_model_is_untouched(model):
    before = [p.detach().clone() for p in model.parameters()]
    found = verified(TOOL, "1.0", honest, PLAN, model)
    assert [check.name for check in found.layers] == ["0", "1"]
    assert [check.code_range for check in found.layers] == [(-7, 7), (-3, 3)]
    assert all(check.difference == 0 for check in found.layers)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    total = 64 + 8 * 4 + 24 + 8 * 4 + 8 * 8 * 4 + 3 * 8 * 4
    assert (found.told_bytes, found.stored_bytes) == (total, total)
    assert [check.told for check in found.layers] == [check.nbytes for check in found.layers] == [96, 56]
    assert f"tool 1.0: 2 layers carried out as planned; bytes: {total} told, {total} stored" in str(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": mps.Precision("8")}, "'0' is stored as w8, the plan says w4"),
        ({"precision": mps.Precision("4", "8")}, "'0' is stored as w4a8, the plan says w4"),
        ({"precision": mps.Precision("4", "16", 8)}, "'0' is stored as w4g8, the plan says w4"),
        ({"codes": torch.tensor([-8, 8])}, r"'0' has codes -8..8, more than the 16 of w4"),
        ({"nbytes": 7}, "'0' takes 7 bytes, memory_bytes counts 96"),
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
        layers = {**found.layers, "0": dataclasses.replace(found.layers["0"], **change)}
        return StoredModel(layers, found.left_alone)

    with pytest.raises(mps.VerificationError, match=f"tool 1.0 does not carry the plan out: .*{words}"):
        verified(TOOL, "1.0", wrong, PLAN, model)


def too_many(plan, model):
    layers = honest(plan, model).layers
    return StoredModel({**layers, "2": layers["1"]})


def test_coverage_both_ways(model):
    with pytest.raises(mps.ExportError, match="'0' was left alone, the plan says w4"):
        verified(TOOL, "1.0", lambda plan, model: StoredModel({"1": honest(plan, model).layers["1"]}), PLAN, model)
    with pytest.raises(mps.ExportError, match="'2' was quantized, the plan leaves it alone"):
        verified(TOOL, "1.0", too_many, PLAN, model)


@pytest.mark.parametrize(
    ("told", "holds"), [(504, True), (504 * 1.009, True), (504 * 1.02, False), (100, False), (0, False)]
)
def test_bytes_of_the_plan_against_bytes_stored(model, told, holds):
    plan = dataclasses.replace(PLAN, usage={"memory_bytes": told})
    if holds:
        assert verified(TOOL, "1.0", honest, plan, model).told_bytes == round(told)
        return
    words = rf"memory_bytes of the plan is {told:.0f}, but 504.* as tool stores it; .*layers\(..., target='tool'\)"
    with pytest.raises(mps.VerificationError, match=words):
        verified(TOOL, "1.0", honest, plan, model)


def test_what_is_left_alone_counts_too(model):
    def heavy(plan, model):
        return StoredModel(honest(plan, model).layers, 2000)

    with pytest.raises(mps.VerificationError, match=r"is 504, but 2152 \(\+327 %\) as tool stores it"):
        verified(TOOL, "1.0", heavy, PLAN, model)
    assert verified(TOOL, "1.0", lambda p, m: StoredModel(honest(p, m).layers), PLAN, model).stored_bytes == 504


def test_a_tool_that_simulates_stores_nothing_to_compare(model):
    simulator = dataclasses.replace(TOOL, storage=export.TARGETS["brevitas"].storage)

    def floats(plan, model):
        return StoredModel({k: dataclasses.replace(v, nbytes=None) for k, v in honest(plan, model).layers.items()})

    found = verified(simulator, "1.0", floats, PLAN, model)
    assert (found.told_bytes, found.stored_bytes) == (504, None)
    assert "bytes: 504 told, it keeps weights in float" in str(found)
    with pytest.raises(mps.VerificationError, match="is 100, but 504"):
        verified(simulator, "1.0", floats, dataclasses.replace(PLAN, usage={"memory_bytes": 100}), model)


def test_bytes_of_a_state():
    shared = torch.zeros(10)
    state = {"a.fc.weight._data": torch.zeros(3), "a.fc.bias": torch.zeros(1), "a.fc2.weight": shared, "tied": shared}
    state |= {"a.fc.settings": "w4"}
    assert (layer_bytes(state, "a.fc"), rest_bytes(state, {"a.fc"})) == (12, 44)
