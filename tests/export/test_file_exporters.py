"""Files for tools that are too heavy for the tests: held against the rules by which these tools read them."""

import json

import pytest
import torch
import yaml
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.quantize import RoundToNearest


def linear(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_exllamav3_covers_every_layer(llama, plan_of, tmp_path):
    plan = plan_of(llama, q_proj="w1", k_proj="w3", v_proj="w8", o_proj="w16", down_proj="w5", lm_head="w6")
    export.exllamav3(plan, llama, path=tmp_path / "recipe.yaml")
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert set(recipe) == {"target_bpw", "head_bits", "tensors"}
    assert recipe["head_bits"] == 6
    assert set(recipe["tensors"]) == set(linear(llama)) - {"lm_head"}
    assert all(bits in {*range(1, 9), 16} for bits in recipe["tensors"].values())
    sizes = {name: module.weight.numel() for name, module in linear(llama).items() if name != "lm_head"}
    used = sum(recipe["tensors"][name] * size for name, size in sizes.items())
    assert recipe["target_bpw"] == pytest.approx(used / sum(sizes.values()), abs=1e-4)
    with pytest.raises(mps.ExportError, match="a scale an output channel there"):
        export.exllamav3(plan_of(llama, o_proj="w4g32"), llama)
    with pytest.raises(mps.ExportError, match="needs the model"):
        export.exllamav3(plan)


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


def test_aimet_encodings_give_the_weights_of_a_quantizer_that_does_not_clip(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    plan = mps.Plan({"0": mps.Precision("3"), "2": mps.Precision("8")})
    quantizer = RoundToNearest(scale="max")
    export.aimet(plan, model, path=tmp_path / "encodings.json", quantizer=quantizer)
    content = json.loads((tmp_path / "encodings.json").read_text())
    assert set(content["param_encodings"]) == {"0.weight", "2.weight"}
    for name, precision in plan.items():
        weight = model.get_submodule(name).weight.detach()
        rows = []
        for row, encoding in zip(weight.flatten(1), content["param_encodings"][f"{name}.weight"], strict=True):
            assert encoding["bitwidth"] == precision.weight_bits
            steps = (encoding["max"] - encoding["min"]) / encoding["scale"]
            assert steps == pytest.approx(2**precision.weight_bits - 1)
            assert encoding["min"] == pytest.approx(encoding["offset"] * encoding["scale"])
            kept = (row / encoding["scale"]).round().clamp(encoding["offset"], -encoding["offset"] - 1)
            rows.append(kept * encoding["scale"])
        torch.testing.assert_close(torch.stack(rows).reshape(weight.shape), quantizer(weight, precision))
    with pytest.raises(mps.ExportError, match="takes weights of 2"):  # one bit would be nan
        export.aimet(mps.Plan({"0": mps.Precision("1")}), model)
    with pytest.raises(mps.ExportError, match="symmetric"):
        export.aimet(plan, model, quantizer=RoundToNearest(symmetric=False))


def test_mct_names_the_nodes_after_folding(tmp_path):
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(8, 4))
    names = {"0.0": "2", "0.2": "8", "2": "4"}
    plan = mps.Plan({name: mps.Precision(bits, "8") for name, bits in names.items()})
    found = export.mct(plan, model, path=tmp_path / "mct.json")
    assert found == json.loads((tmp_path / "mct.json").read_text()) == {"_0_0_bn": 2, "_0_2": 8, "_2": 4}
    with pytest.raises(mps.ExportError, match="takes weights of 2, 4, 8"):
        export.mct(mps.Plan({"2": mps.Precision("3", "8")}), model)


def test_nncf_passes_are_disjoint_and_three_bits_come_last(llama, plan_of, tmp_path):
    plan = plan_of(llama, q_proj="w3g32", k_proj="w2g64", v_proj="w4g32", o_proj="w8", up_proj="w3g64", down_proj="w16")
    passes = export.nncf(plan, llama, path=tmp_path / "passes.json")
    assert json.loads((tmp_path / "passes.json").read_text()) == passes
    assert [step["mode"] for step in passes] == ["int8_sym", "int4_sym", "int2_sym", "int3_sym", "int3_sym"]
    done = [(name, step["mode"], step["group_size"]) for step in passes for name in step["layers"]]
    wanted = {n: (n, f"int{p.weight}_sym", p.group_size or -1) for n, p in plan.items() if p.quantizes_weight}
    assert sorted(done) == sorted(wanted.values())
    with pytest.raises(mps.ExportError, match="a scale an output channel there"):
        export.nncf(plan_of(llama, o_proj="w8g32"), llama)


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


@pytest.fixture
def transformers_llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


@pytest.mark.parametrize("text", ["wnf4", "wnf4g64", "w8a8"])
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_carries_the_plan_out(transformers_llama, plan_of, text):
    pytest.importorskip("bitsandbytes")
    plan = plan_of(transformers_llama, o_proj=text, down_proj=text)
    found = export.verify(plan, transformers_llama, "bitsandbytes")
    assert {check.name: str(check.precision) for check in found.layers} == dict.fromkeys(plan, text)
    with pytest.raises(mps.ExportError, match="verified on a model of transformers"):
        export.verify(mps.Plan({"0": mps.Precision("nf4")}), nn.Sequential(nn.Linear(64, 8)), "bitsandbytes")


@pytest.mark.filterwarnings("ignore")
def test_auto_round_carries_the_plan_out(transformers_llama, plan_of, tmp_path, monkeypatch):
    pytest.importorskip("auto_round")
    monkeypatch.chdir(tmp_path)  # it keeps a work space in the current folder
    plan = plan_of(
        transformers_llama, o_proj="w2g32", down_proj="w8", gate_proj="w3g64", up_proj="w3g64", lm_head="w16"
    )
    found = export.verify(plan, transformers_llama, "auto-round", example=torch.zeros(1, 16, dtype=torch.long))
    assert {check.name: check.precision for check in found.layers} == {n: p for n, p in plan.items() if n != "lm_head"}
