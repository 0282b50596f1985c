"""llm-compressor's recipe; carried out where it is installed."""

import re

import pytest
import yaml
from torch import nn

import mpsearch as mps
from mpsearch import export


def linear(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_llm_compressor_groups_are_those_of_compressed_tensors(llama, plan_of, tmp_path):
    plan = plan_of(llama, o_proj="w3g32", down_proj="w8a8", lm_head="w16")
    export.llm_compressor(plan, llama, path=tmp_path / "recipe.yaml", modifier="GPTQModifier")
    modifiers = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["quant_stage"]["quant_modifiers"]
    assert list(modifiers) == ["GPTQModifier"]
    groups = modifiers["GPTQModifier"]["config_groups"]
    targets = {target: group["weights"]["num_bits"] for group in groups.values() for target in group["targets"]}
    assert targets == {name: p.weight_bits for name, p in plan.items() if p.quantizes_weight}
    assert set(modifiers["GPTQModifier"]["ignore"]) == set(linear(llama)) - set(targets)
    with pytest.raises(mps.ExportError, match="fused at run time"):
        export.llm_compressor(plan_of(llama, q_proj="w4", k_proj="w3", v_proj="w4"), llama)
    assert export.llm_compressor(plan_of(llama, q_proj="w4", k_proj="w3", v_proj="w4"), llama, vllm=False)
    with pytest.raises(mps.ExportError, match="no quantizable layer"):  # a suffix without re: matches nothing there
        export.llm_compressor(mps.Plan({"q_proj": mps.Precision("4")}), llama)
    library = pytest.importorskip("compressed_tensors.quantization")
    assert library.QuantizationConfig.model_validate(modifiers["GPTQModifier"]).config_groups.keys() == groups.keys()


@pytest.mark.filterwarnings("ignore")
def test_carried_out(transformers_llama, plan_of, tmp_path, monkeypatch):
    pytest.importorskip("llmcompressor")
    monkeypatch.chdir(tmp_path)  # it keeps a log in the current folder
    plan = plan_of(transformers_llama, o_proj="w3g32", down_proj="w8a8", gate_proj="w4", up_proj="w2g64", lm_head="w16")
    with pytest.raises(mps.ExportError, match="GPTQModifier needs data"):
        export.verify(plan, transformers_llama, "llm-compressor", modifier="GPTQModifier")
    found = export.verify(plan, transformers_llama, "llm-compressor")
    assert {check.name: check.precision for check in found.layers} == {n: p for n, p in plan.items() if n != "lm_head"}


@pytest.mark.filterwarnings("ignore")
def test_experts_carried_out(transformers_mixtral, experts_plan, tmp_path, monkeypatch):
    """A block that agrees is one pattern, one that does not, names."""
    model = transformers_mixtral
    plan = experts_plan(model, lambda block, number, part: "w4g32" if block == 0 else f"w{4 * number + 4}", "w6")
    groups = export.llm_compressor(plan, model, vllm=False)["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    found = [target for group in groups["config_groups"].values() for target in group["targets"] if "experts" in target]
    pattern, *names = sorted(found, reverse=True)
    block = "model.layers.1.mlp.experts"
    assert set(names) == {f"{block}.{n}.{part}_proj" for n in range(2) for part in ("gate", "up", "down")}
    assert re.match(pattern[3:], "model.layers.0.mlp.experts.1.up_proj")
    assert not re.match(pattern[3:], f"{block}.1.up_proj")
    with pytest.raises(mps.ExportError, match="fused at run time"):
        export.llm_compressor(plan, model)
    pytest.importorskip("llmcompressor")
    monkeypatch.chdir(tmp_path)
    checks = export.verify(plan, model, "llm-compressor").layers
    assert {check.name: check.precision for check in checks} == dict(plan)
