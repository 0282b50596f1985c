"""torchao, really run and read back."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")


def precision(text):
    return mps.Precision.parse(text)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_another_precision(llama, symmetric, dtype):
    llama = llama.to(dtype)
    names = [name for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    texts = ["w2", "w3g32", "w4g16", "w5", "w6g64", "w7", "w8", "w4a8", "w8a8", "w3g32a8".replace("g32a8", "a8g32")]
    plan = mps.Plan({name: precision(texts[i % len(texts)]) for i, name in enumerate(names[:-1])})
    if not symmetric:
        plan = mps.Plan({**plan, names[0]: precision("w1g32"), "model.embed_tokens": precision("w4g32")})
    found = export.verify(plan, llama, "torchao", symmetric=symmetric)
    assert {check.name: check.precision for check in found.layers} == dict(plan)
    assert max(check.difference for check in found.layers) == 0
    torchao_tensor = type(llama.lm_head.weight)
    assert torchao_tensor is nn.Parameter  # the model itself is left alone


def test_the_map_names_each_quantized_layer_and_nothing_else(llama, plan_of, tmp_path):
    from torchao.core.config import config_from_dict

    plan = plan_of(llama, q_proj="w4g32", o_proj="w8", lm_head="w16")
    config = export.torchao(plan, llama, path=tmp_path / "torchao.json")
    assert set(config.fqn_to_config) == {name for name in plan if name != "lm_head"}
    assert config_from_dict(json.loads((tmp_path / "torchao.json").read_text())).fqn_to_config == config.fqn_to_config


def test_the_reference_quantizer_predicts_what_torchao_runs(llama, plan_of):
    """Outputs of the really quantized model equal the fake-quantized ones."""
    from torchao.quantization import quantize_

    plan = plan_of(llama, q_proj="w4g32", down_proj="w2g32", lm_head="w3", embed_tokens="w5")
    tokens = torch.arange(24).reshape(2, 12)
    expected = llama(tokens)
    with torch.no_grad():
        for name, p in plan.items():
            weight = llama.get_submodule(name).weight
            weight.copy_(export.MinMax()(weight, p))
        fake = llama(tokens)
        torch.manual_seed(0)
    other = type(llama)().eval()
    other.load_state_dict(llama.state_dict())
    quantize_(other, export.torchao(plan, other), filter_fn=None)  # values on the grid stay on it
    assert (fake - expected).abs().max() > 1e-3
    torch.testing.assert_close(other(tokens), fake, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_reference_quantizer_predicts_dynamic_inputs(llama, plan_of, symmetric):
    """Loss of torchao's own layers, against the fake-quantized model of `evaluate`."""
    from torchao.quantization import quantize_

    plan = plan_of(llama, q_proj="w4a8g32", k_proj="w8a8", down_proj="w3a8", o_proj="w2", lm_head="w4a8")
    tokens, targets = torch.arange(24).reshape(2, 12), torch.arange(1, 25).reshape(2, 12)
    real = copy.deepcopy(llama)
    quantize_(real, export.torchao(plan, real, symmetric=symmetric), filter_fn=None)
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(real(tokens).double().flatten(0, 1), targets.flatten()))
    weights = mps.Plan({name: mps.Precision(p.weight, "16", p.group_size) for name, p in plan.items()})
    quantizer, batch = export.MinMax(symmetric), (tokens, targets)
    found, plain = (mps.evaluate(llama, [batch], p, quantizer=quantizer, progress=False) for p in (plan, weights))
    assert found.loss == pytest.approx(loss, abs=1e-6)
    assert abs(plain.loss - loss) > 1e-5


def test_unknown_names_raise_though_torchao_ignores_them(llama):
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, quantize_

    quantize_(llama, FqnToConfig({"model.layers.0.q_proj": IntxWeightOnlyConfig()}), filter_fn=None)
    assert type(llama.model.layers[0].self_attn.q_proj.weight) is nn.Parameter  # nothing done, nothing said
    with pytest.raises(mps.ExportError, match="no quantizable layer of the model; did you mean"):
        export.torchao(mps.Plan({"model.layers.0.q_proj": precision("w4")}), llama)


def test_one_bit_needs_zero_points(llama, plan_of):
    with pytest.raises(mps.ExportError, match="cannot express w1 for 'lm_head' without zero-points"):
        export.torchao(plan_of(llama, lm_head="w1"), llama, symmetric=True)


def test_vllm_needs_the_fused_names(llama, plan_of):
    plan = plan_of(llama, q_proj="w4", k_proj="w4", v_proj="w4", gate_proj="w8", up_proj="w8", o_proj="w3")
    found = export.torchao(plan, llama, vllm=True).fqn_to_config
    assert found["model.layers.1.self_attn.qkv_proj"] == found["model.layers.1.self_attn.q_proj"]
    assert found["model.layers.0.mlp.gate_up_proj"] == found["model.layers.0.mlp.up_proj"]
    assert len(found) == len(plan) + 4
    with pytest.raises(mps.ExportError, match="fused at run time"):
        export.torchao(plan_of(llama, q_proj="w4", k_proj="w8", v_proj="w4"), llama, vllm=True)


def test_applying_twice_raises(llama, plan_of):
    from torchao.quantization import quantize_

    config = export.torchao(plan_of(llama, lm_head="w4"), llama)
    quantize_(llama, config, filter_fn=None)
    with warnings.catch_warnings(), pytest.raises(Exception, match=r".+"):
        quantize_(llama, config, filter_fn=None)


def test_transformers_quantizes_lm_head_with_the_documented_settings(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    model.save_pretrained(tmp_path)
    plan = mps.Plan({"lm_head": precision("w4g32"), "model.layers.0.self_attn.q_proj": precision("w3")})
    config = transformers.TorchAoConfig(
        quant_type=export.torchao(plan, model), modules_to_not_convert=[], include_input_output_embeddings=True
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    done = {n for n, m in loaded.named_modules() if type(getattr(m, "weight", None)).__name__.startswith("Intx")}
    assert done == set(plan)
