"""AutoRound's settings of each layer; carried out where it is installed."""

import json

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export


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


@pytest.mark.filterwarnings("ignore")
def test_auto_round_carries_the_plan_out(transformers_llama, plan_of, tmp_path, monkeypatch):
    pytest.importorskip("auto_round")
    monkeypatch.chdir(tmp_path)  # it keeps a work space in the current folder
    plan = plan_of(
        transformers_llama, o_proj="w2g32", down_proj="w8", gate_proj="w3g64", up_proj="w3g64", lm_head="w16"
    )
    found = export.verify(plan, transformers_llama, "auto-round", example=torch.zeros(1, 16, dtype=torch.long))
    assert {check.name: check.precision for check in found.layers} == {n: p for n, p in plan.items() if n != "lm_head"}


@pytest.mark.filterwarnings("ignore")
def test_experts_carried_out(transformers_mixtral, experts_plan, monkeypatch, tmp_path):
    """It takes them apart, gate and up too."""
    model = transformers_mixtral
    plan = experts_plan(model, lambda block, number, part: "w4g32" if block == 0 else None, "w8")
    content = export.auto_round(plan, model)
    for number in range(2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert content[f"model.layers.0.mlp.experts.{number}.{part}"] == {"bits": 4, "group_size": 32, "sym": True}
            assert content[f"model.layers.1.mlp.experts.{number}.{part}"] == {"bits": 16}
    assert not [name for name in content if "gate_up" in name]
    with pytest.raises(mps.ExportError, match=r"cannot express w3g32 .*: it takes weights of 4, 8 there"):
        export.auto_round(experts_plan(model, lambda block, number, part: "w3g32", "w8"), model)
    pytest.importorskip("auto_round")
    monkeypatch.chdir(tmp_path)
    example = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    checks = export.verify(plan, model, "auto-round", example=example).layers
    assert {check.name: check.precision for check in checks} == dict(plan)
