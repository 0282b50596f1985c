"""compressed-tensors, really compressed, saved, read back and loaded."""

import json

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.quantizers.rounding import RoundToNearest

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")


def mixed(model, texts):
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
    return mps.Plan({name: mps.Precision.parse(texts[i % len(texts)]) for i, name in enumerate(names)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_layer_another_precision(llama, dtype):
    texts = ["w2", "w3g32", "w4g16", "w5", "w6g64", "w7", "w8", "w8a8", "w16"]
    plan = mixed(llama, texts)
    found = export.verify(plan, llama.to(dtype), "compressed-tensors")
    assert {check.name for check in found.layers} == {name for name in plan if plan[name].quantizes_weight}
    assert max(check.difference for check in found.layers) == 0  # the codes that evaluate measured


def test_the_quantizer_can_be_chosen(llama):
    plain = RoundToNearest(scale="max")
    found = export.verify(mixed(llama, ["w3"]), llama, "compressed-tensors", quantizer=plain)
    assert max(check.difference for check in found.layers) == 0
    with pytest.raises(mps.ExportError, match="symmetric codes"):
        export.compressed_tensors(mixed(llama, ["w3"]), llama, vllm=False, quantizer=RoundToNearest(symmetric=False))


def unpack(packed, bits, columns):
    """Codes from int32 words, bit by bit: code i of a row lies in bits i*b .. (i+1)*b, lowest word first, offset 2^(b-1)."""
    rows = []
    for row in packed.tolist():
        stream = "".join(format(word & 0xFFFFFFFF, "032b")[::-1] for word in row)
        rows.append([int(stream[i * bits : (i + 1) * bits][::-1], 2) - (1 << (bits - 1)) for i in range(columns)])
    return torch.tensor(rows)


def test_the_saved_folder_read_bit_by_bit(llama, plan_of, tmp_path):
    from safetensors.torch import load_file

    plan = plan_of(llama, q_proj="w3g32", k_proj="w3g32", v_proj="w3g32", o_proj="w5", down_proj="w8", lm_head="w16")
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    export.compressed_tensors(plan, llama, path=tmp_path / "out")
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    state = load_file(tmp_path / "out" / "model.safetensors")
    for name, precision in plan.items():
        weight = llama.get_submodule(name).weight.detach()
        if not precision.quantizes_weight:
            assert torch.equal(state[f"{name}.weight"], weight)
            continue
        packed, scale = state[f"{name}.weight_packed"], state[f"{name}.weight_scale"]
        assert packed.shape[1] * 32 == -(-weight.shape[1] * precision.weight_bits // 32) * 32
        codes = unpack(packed, precision.weight_bits, weight.shape[1])
        values = (codes.reshape(scale.numel(), -1) * scale.reshape(-1, 1)).reshape(weight.shape)
        assert torch.equal(values, RoundToNearest()(weight, precision))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    assert sorted(targets) == sorted(name for name in plan if plan[name].quantizes_weight)
    assert {group["weights"]["num_bits"] for group in config["config_groups"].values()} == {3, 5, 8}
    assert set(config["ignore"]) >= {"lm_head", "model.layers.0.mlp.gate_proj"}
    assert config["quant_method"] == "compressed-tensors"


def test_without_a_model_it_is_the_configuration(llama, plan_of, tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    plan = plan_of(llama, o_proj="w4g32", down_proj="w8a8", lm_head="w16")
    made = export.compressed_tensors(plan, path=tmp_path / "config.json")
    read = QuantizationConfig.model_validate(json.loads((tmp_path / "config.json").read_text()))
    assert read == made
    assert read.ignore == ["lm_head"]
    assert {target for group in read.config_groups.values() for target in group.targets} == set(plan) - {"lm_head"}


@pytest.mark.parametrize(
    ("text", "words"), [("w1", "takes weights of 2"), ("w9", "2, 3, 4, 5, 6, 7, 8"), ("w16a8", "takes weights of")]
)
def test_what_it_would_do_in_silence_is_refused(llama, plan_of, text, words):
    """One bit gives zeros, nine and sixteen are accepted by the library."""
    from compressed_tensors.quantization import QuantizationArgs

    QuantizationArgs(num_bits=9)
    with pytest.raises(mps.ExportError, match=words):
        export.compressed_tensors(plan_of(llama, lm_head=text), llama)


def test_a_name_that_matches_nothing(llama):
    with pytest.raises(mps.ExportError, match="names 'q_proj', which is no quantizable layer"):
        export.compressed_tensors(mps.Plan({"q_proj": mps.Precision("4")}), llama)


def test_fused_layers_must_agree_for_vllm(llama, plan_of):
    plan = plan_of(llama, q_proj="w4", k_proj="w8", v_proj="w4")
    with pytest.raises(mps.ExportError, match="fused at run time"):
        export.compressed_tensors(plan, llama)
    assert export.compressed_tensors(plan, llama, vllm=False)
    with pytest.warns(UserWarning, match="k_proj: w8 -> w4"):
        config = export.compressed_tensors(plan, llama, snap=True)
    assert len(config.config_groups) == 1


def test_transformers_loads_the_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    texts = {"q_proj": "w4g32", "k_proj": "w4g32", "v_proj": "w4g32", "gate_proj": "w2g32", "up_proj": "w2g32"}
    plan = mps.Plan({name: mps.Precision.parse(texts.get(name.rpartition(".")[2], "w6")) for name in names})
    export.compressed_tensors(plan, model, path=tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        for name, precision in plan.items():
            weight = model.get_submodule(name).weight
            weight.copy_(RoundToNearest()(weight, precision))
        tokens = torch.arange(20).reshape(2, 10)
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)
