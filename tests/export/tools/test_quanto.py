"""Quanto's map; carried out where it is installed."""

import json

import pytest
from torch import nn

import mpsearch as mps
from mpsearch import export


def test_quanto_has_one_group_size(llama, plan_of, tmp_path):
    plan = plan_of(llama, down_proj="w4g128", o_proj="w8", lm_head="w16")
    found = export.quanto(plan, llama, path=tmp_path / "map.json")
    assert json.loads((tmp_path / "map.json").read_text()) == found
    assert {name: entry["weights"] for name, entry in found.items()} == {
        name: f"qint{p.weight}" for name, p in plan.items() if p.quantizes_weight
    }
    for text in ("w4", "w4g32", "w8g128", "w3"):
        with pytest.raises(mps.ExportError, match="quanto cannot express"):
            export.quanto(plan_of(llama, down_proj=text), llama)


@pytest.mark.slow  # quanto compiles its kernels at its first use
def test_quanto_carries_the_plan_out(llama, plan_of):
    pytest.importorskip("optimum.quanto")
    found = export.verify(plan_of(llama, down_proj="w4g128", o_proj="w8", lm_head="w16"), llama, "quanto")
    assert {str(check.precision) for check in found.layers} == {"w4g128", "w8"}
    found = export.verify(mps.Plan({"0": mps.Precision("2", "16", 128)}), nn.Sequential(nn.Linear(512, 8)), "quanto")
    assert all(check.code_range == (0, 3) for check in found.layers)
