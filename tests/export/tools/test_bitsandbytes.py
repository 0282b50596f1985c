"""bitsandbytes' one width; carried out where it is installed."""

import json

import pytest
from torch import nn

import mpsearch as mps
from mpsearch import export


def linear(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_bitsandbytes_takes_one_width_and_skips_no_more_than_it_should(llama, plan_of, tmp_path):
    plan = plan_of(llama, o_proj="wnf4", down_proj="wnf4g64")
    found = export.bitsandbytes(plan, llama, path=tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == found
    assert found["load_in_4bit"] is True
    assert set(found["llm_int8_skip_modules"]) == set(linear(llama)) - set(plan)
    assert export.bitsandbytes(plan_of(llama, o_proj="w8a8"), llama)["load_in_8bit"] is True
    with pytest.raises(mps.ExportError, match="one width a model, the plan has 8 and nf4"):
        export.bitsandbytes(plan_of(llama, o_proj="wnf4", down_proj="w8a8"), llama)
    with pytest.raises(mps.ExportError, match="cannot skip 'fc1' without 'fc10'"):
        export.bitsandbytes(mps.Plan({"fc1": mps.Precision("16"), "fc10": mps.Precision("nf4")}))


@pytest.mark.parametrize("text", ["wnf4", "wnf4g64", "w8a8"])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_carries_the_plan_out(transformers_llama, plan_of, text):
    pytest.importorskip("bitsandbytes")
    plan = plan_of(transformers_llama, o_proj=text, down_proj=text)
    found = export.verify(plan, transformers_llama, "bitsandbytes")
    assert {check.name: str(check.precision) for check in found.layers} == dict.fromkeys(plan, text)
    with pytest.raises(mps.ExportError, match="verified on a model of transformers"):
        export.verify(mps.Plan({"0": mps.Precision("nf4")}), nn.Sequential(nn.Linear(64, 8)), "bitsandbytes")
