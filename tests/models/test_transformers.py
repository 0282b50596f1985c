"""Models of transformers, built small from their configs: decisions, groups, profiles, plans."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mpsearch as mps
from mpsearch.models.modules.decomposing import decomposed
from mpsearch.models.modules.weights import canonical, restore
from mpsearch.models.running import preserved
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import FisherProjection, KLDivergence

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TWO_SIDED = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("attention_heads", 2), ("ffn_dim", 32))
}
TOKENS = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
QKV, GATE_UP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}

#: Name -> class, its config, what it takes, groups as sets of last names.
MODELS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, "text", [QKV, GATE_UP]),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 4}, "text", [QKV, GATE_UP]),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**GROUPED, "head_dim": 4},
        "text",
        [{"embed_tokens", "lm_head"}, QKV, GATE_UP],
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 32},
        "text",
        [{"wte", "lm_head"}],
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}, "text", [QKV]),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**GROUPED, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        | {"num_experts_per_tok": 2},
        "text",
        [QKV, GATE_UP],
    ),
    "phimoe": (  # its router is a linear layer that returns a tuple
        "PhimoeForCausalLM",
        "PhimoeConfig",
        {**GROUPED, "head_dim": 4, "num_local_experts": 4},
        "text",
        [QKV],
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
        "text",
        [QKV],
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 50, "state_size": 4},
        "text",
        [{"embeddings", "lm_head"}],
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES, "text", [{"query", "key", "value"}]),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**TWO_SIDED, "max_source_positions": 10, "num_mel_bins": 8, "pad_token_id": 0, "decoder_start_token_id": 1}
        | {"bos_token_id": 1, "eos_token_id": 2},
        "speech",
        [QKV, {"embed_tokens", "proj_out"}, QKV, {"k_proj", "v_proj"}],
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {key: value for key, value in SIZES.items() if key != "vocab_size"} | {"image_size": 16, "patch_size": 4},
        "image",
        [QKV],
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "image_size": 16, "patch_size": 2, "window_size": 2},
        "image",
        [QKV, QKV],
    ),
    "swin-v2": (  # writes into what layers of one input for all samples return
        "Swinv2ForImageClassification",
        "Swinv2Config",
        {"embed_dim": 8, "depths": [1], "num_heads": [2], "image_size": 16, "patch_size": 4, "window_size": 2},
        "image",
        [{"query", "key", "value"}],
    ),
    "segformer": (  # hooks itself in its first run
        "SegformerForImageClassification",
        "SegformerConfig",
        {"hidden_sizes": [8], "depths": [1], "num_attention_heads": [2], "sr_ratios": [2], "num_encoder_blocks": 1}
        | {"patch_sizes": [3], "strides": [2], "mlp_ratios": [2]},
        "image",
        [{"k_proj", "v_proj"}],
    ),
    "mobilenet-v2": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25, "min_depth": 4, "image_size": 16, "initializer_range": 0.5},
        "image",
        [],
    ),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "image",
        [],
    ),
}
DATA = {
    "text": {"input_ids": TOKENS},
    "image": {"pixel_values": IMAGES},
    "speech": {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": TOKENS},
}


def build(name):
    model, config, settings, kind, _ = MODELS[name]
    if not hasattr(transformers, model):
        pytest.skip(f"transformers {transformers.__version__} has no {model}")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval(), DATA[kind]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:the example never calls")
def test_listed_profiled_solved_evaluated(name):
    model, batch = build(name)
    with torch.no_grad():
        expected = model(**batch).logits
        with decomposed(model):
            torch.testing.assert_close(model(**batch).logits, expected)
    assert all("shared weight" in layer.group for layer in mps.layers(model, batch) if layer.group)
    layers = mps.layers(model, batch, groups="fused")
    groups: dict[str, set[str]] = {}
    for layer in layers:
        if layer.group:
            groups.setdefault(layer.group, set()).add(layer.name.rpartition(".")[2])
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, MODELS[name][4]))
    options = mps.precisions("w2 w4 w16")
    tables = mps.profile(model, [batch], [KLDivergence(), FisherProjection()], options, layers=layers, progress=False)
    for table in tables:
        assert table.sensitivity[:, 0].sum() > table.sensitivity[:, 1].sum() > 0
        assert (table.sensitivity[:, 2] == 0).all()
    best = mps.solve(tables[0], mps.Budget(average_bits=8))
    assert 0 < mps.evaluate(model, [batch], best.plan, progress=False).kl < tables[0].sensitivity[:, 0].sum()


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_experts_in_one_tensor_are_decided_on_one_by_one(name):
    """One expert quantized by hand, inside the tensor of all, gives the measured divergence."""
    model, batch = build(name)
    names = [layer.name for layer in mps.layers(model, batch)]
    chosen = next(name for name in names if name.endswith("experts.1.down_proj"))
    block, _, _ = chosen.rpartition(".1.down_proj")
    with torch.no_grad():
        model.get_submodule(block).down_proj.mul_(300)  # so that one expert of freshly drawn weights counts
    changed = copy.deepcopy(model)
    experts = changed.get_submodule(block)
    with torch.no_grad():
        stored = experts.down_proj[1]
        weight = stored.T if experts.is_transposed else stored
        rounded = RoundToNearest()(weight.contiguous(), mps.Precision("2"))
        stored.copy_(rounded.T if experts.is_transposed else rounded)
        p, q = model(**batch).logits.log_softmax(-1), changed(**batch).logits.log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    found = mps.evaluate(model, [batch], mps.Plan({chosen: mps.Precision("2")}), progress=False).kl
    assert expected > 0
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "whisper", "mobilenet-v2"])
@pytest.mark.filterwarnings("ignore:the example never calls")
def test_a_plan_uses_what_the_quantized_model_does(name):
    """Bytes of the packed tensors and all others; operations counted while the quantized model runs, each with the bits of its layer."""
    model, batch = build(name)
    options = mps.precisions("w3 w4a8 w8 w16")
    layers = mps.layers(model, batch, kv_cache=name != "mobilenet-v2")
    table = mps.profile(model, [batch], FisherProjection(), options, layers=layers, progress=False)
    plan = mps.solve(table, mps.Budget(memory_bytes="70%", bitops="35%")).plan
    flops: dict[str, int] = {}

    def watch(name, module):
        begun = []
        module.register_forward_pre_hook(lambda *_: begun.append(counter.get_total_flops()))
        module.register_forward_hook(
            lambda *_: flops.update({name: flops.get(name, 0) + counter.get_total_flops() - begun.pop()})
        )

    with preserved(model), torch.no_grad():
        quantized = copy.deepcopy(model)
        stored, packed = {}, 0
        for tensor in [*model.parameters(), *model.buffers()]:
            stored[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        for key in (key for key in plan if not key.endswith("_cache")):
            module, precision = model.get_submodule(key), plan[key]
            if precision.quantizes_weight and stored.pop(module.weight.data_ptr(), None):
                codes = RoundToNearest().codes(canonical(module), precision)
                packed += codes.pack().nbytes
                quantized.get_submodule(key).weight.copy_(restore(module, codes.values()))
            watch(key, quantized.get_submodule(key))
        assert plan.usage["memory_bytes"] == packed + sum(stored.values())
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            quantized(**batch)
    count = 2 * len(next(iter(batch.values())))  # two operations a multiply-accumulate
    used = sum(made // count * plan[key].weight_bits * plan[key].activation_bits for key, made in flops.items())
    left = (counter.get_total_flops() - sum(flops.values())) // count
    for layer in layers:
        if layer.is_cache:  # the products of attention that read it, with queries and attention weights in 16 bits
            used, left = used + layer.macs * plan[layer.name].weight_bits * 16, left - layer.macs
    assert plan.usage["bitops"] == used + left * 256
