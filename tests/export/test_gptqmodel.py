"""GPTQModel's map, read as it reads it: the first pattern that matches decides."""

import json
import re

import pytest
from torch import nn

import mpsearch as mps
from mpsearch import export


def decided(dynamic, name):
    """GPTQModel's `dynamic_get`: `-:` excludes, `+:` overrides, patterns match from the start, the first one wins."""
    for pattern, settings in dynamic.items():
        if re.match(pattern[2:], name):
            return None if pattern.startswith("-:") else settings
    return "base"


def test_every_linear_layer_is_decided_by_one_pattern(llama, plan_of, tmp_path):
    plan = plan_of(
        llama, q_proj="w2g32", k_proj="w3", v_proj="w8g64", o_proj="w16", down_proj="w5g128", lm_head="w4g16"
    )
    content = export.gptqmodel(plan, llama, path=tmp_path / "quantize.json")
    assert json.loads((tmp_path / "quantize.json").read_text()) == content
    assert content["lm_head"] is True
    for name, module in llama.named_modules():
        if isinstance(module, nn.Linear):
            found = decided(content["dynamic"], name)
            matching = [pattern for pattern in content["dynamic"] if re.match(pattern[2:], name)]
            assert len(matching) == 1
            if name not in plan or not plan[name].quantizes_weight:
                assert found is None
            else:
                precision = plan[name]
                assert (found["bits"], found["group_size"]) == (precision.weight_bits, precision.group_size or -1)
    assert set(found) == {"bits", "group_size", "sym", "desc_act"}  # a misspelt key would be ignored


def test_for_vllm_the_fused_name_matches_too(llama, plan_of):
    plan = plan_of(
        llama, q_proj="w8g32", k_proj="w8g32", v_proj="w8g32", gate_proj="w4g32", up_proj="w4g32", o_proj="w4g64"
    )
    dynamic = export.gptqmodel(plan, llama, vllm=True)["dynamic"]
    for block in (0, 1):
        assert decided(dynamic, f"model.layers.{block}.self_attn.qkv_proj")["bits"] == 8
        assert decided(dynamic, f"model.layers.{block}.mlp.gate_up_proj")["bits"] == 4
        assert decided(dynamic, f"model.layers.{block}.mlp.up_proj")["bits"] == 4
    assert export.gptqmodel(plan, llama)["dynamic"].keys() != dynamic.keys()
    with pytest.raises(mps.ExportError, match="fused at run time"):
        export.gptqmodel(plan_of(llama, q_proj="w8g32", k_proj="w4g32", v_proj="w8g32"), llama, vllm=True)
    with pytest.raises(mps.ExportError, match="takes weights of 4, 8"):
        export.gptqmodel(plan_of(llama, o_proj="w3g32"), llama, vllm=True)


@pytest.mark.parametrize("text", ["w1", "w9", "w4a8", "w4g48", "wnf4"])
def test_what_it_lacks_is_refused(llama, plan_of, text):
    with pytest.raises(mps.ExportError, match="gptqmodel cannot express"):
        export.gptqmodel(plan_of(llama, o_proj=text), llama)


def test_auto_round_names_every_layer(llama, plan_of, tmp_path):
    plan = plan_of(llama, o_proj="w2g32", down_proj="w8", lm_head="w16")
    content = export.auto_round(plan, llama, path=tmp_path / "layers.json")
    assert json.loads((tmp_path / "layers.json").read_text()) == content
    for name, module in llama.named_modules():
        if isinstance(module, nn.Linear):
            precision = plan.get(name, mps.Precision("16"))
            assert content[name]["bits"] == precision.weight_bits
            assert content[name].get("group_size", -1) == (precision.group_size or -1)


def test_auto_round_would_write_lm_head_in_float(llama, plan_of):
    with pytest.raises(
        mps.ExportError, match="auto-round cannot express w8 for 'lm_head': it writes that layer in float"
    ):
        export.auto_round(plan_of(llama, lm_head="w8"), llama)


def test_auto_round_and_fusion(llama, plan_of):
    plan = plan_of(llama, q_proj="w4", k_proj="w8", v_proj="w4")
    with pytest.raises(mps.ExportError, match="fused at run time"):
        export.auto_round(plan, llama)
    assert export.auto_round(plan, llama, vllm=False)["model.layers.0.self_attn.k_proj"]["bits"] == 8
    with pytest.raises(mps.ExportError, match="auto-round cannot express w9"):  # it would write it in float
        export.auto_round(plan_of(llama, o_proj="w9"), llama)
