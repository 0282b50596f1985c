"""GPTQModel's map, read as it reads it: the first pattern that matches decides."""

import json
import re

import pytest
import torch
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
                keys = {"bits", "group_size", "sym", "desc_act"}  # a misspelt one would be ignored
                assert set(found) == (keys if precision.group_size else keys | {"act_group_aware"})


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


@pytest.mark.filterwarnings("ignore")
def test_carried_out(transformers_llama, plan_of, monkeypatch, tmp_path):
    pytest.importorskip("gptqmodel")
    monkeypatch.chdir(tmp_path)
    texts = {"q_proj": "w2g32", "k_proj": "w3g32", "v_proj": "w8", "gate_proj": "w5g64", "up_proj": "w6g32"}
    plan = plan_of(transformers_llama, **texts, o_proj="w16", down_proj="w4g128")
    example = torch.randint(64, (8, 64), generator=torch.Generator().manual_seed(0))
    found = export.verify(plan, transformers_llama, "gptqmodel", example=example)
    assert {check.name: check.precision for check in found.layers} == {n: p for n, p in plan.items() if str(p) != "w16"}
    with pytest.raises(mps.ExportError, match="verified on a model of transformers"):
        export.verify(
            mps.Plan({"0": mps.Precision("4", "16", 32)}),
            nn.Sequential(nn.Linear(64, 32)),
            "gptqmodel",
            example=example,
        )


@pytest.mark.filterwarnings("ignore")
def test_experts_carried_out(transformers_mixtral, experts_plan, monkeypatch, tmp_path):
    """It takes them apart, gate and up too; vLLM asks for the block."""
    model = transformers_mixtral
    plan = experts_plan(model, lambda block, number, part: "w4g32" if block == 0 else f"w{number + 3}g64", "w8g32")
    dynamic = export.gptqmodel(plan, model)["dynamic"]
    for number in range(2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert decided(dynamic, f"model.layers.0.mlp.experts.{number}.{part}")["bits"] == 4
            assert decided(dynamic, f"model.layers.1.mlp.experts.{number}.{part}")["bits"] == number + 3
    same = experts_plan(model, lambda block, number, part: "w4g32" if block == 0 else "w16", "w8g32")
    dynamic = export.gptqmodel(same, model, vllm=True)["dynamic"]
    assert decided(dynamic, "model.layers.0.mlp.experts")["bits"] == 4
    assert decided(dynamic, "model.layers.0.mlp.experts.1.up_proj")["bits"] == 4
    assert decided(dynamic, "model.layers.1.mlp.experts.1.up_proj") is None
    pytest.importorskip("gptqmodel")
    monkeypatch.chdir(tmp_path)
    example = torch.randint(64, (16, 64), generator=torch.Generator().manual_seed(0))
    checks = export.verify(plan, model, "gptqmodel", example=example).layers
    assert {check.name: check.precision for check in checks} == dict(plan)
