"""A model on the meta device has the layers, groups and costs of the same model with weights; what needs values is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.calibration.deciding import unscored
from mpsearch.models.distilling import distill_data
from mpsearch.models.modules.experts import place_of
from mpsearch.models.running import preserved
from mpsearch.resources import BitOps, Energy, KVCacheBytes, MeasuredLatency, MemoryBytes, Roofline
from mpsearch.sensitivity import KLDivergence, RelativeWeightError
from tests.models.test_transformers import DATA, GROUPED, MODELS, SIZES, TOKENS

transformers = pytest.importorskip("transformers")

MORE = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, "text"),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 4, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 2},
        "text",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
        | {"word_embed_proj_dim": 16, "max_position_embeddings": 32},
        "text",
    ),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SIZES, "text"),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_layers": 1, "num_heads": 4, "vocab_size": 50},
        "two texts",
    ),
}
INPUTS = {**DATA, "two texts": {"input_ids": TOKENS, "decoder_input_ids": TOKENS}}


class Mixed(nn.Module):
    """What is taken apart, and parameters that functions read."""

    def __init__(self):
        super().__init__()
        self.table, self.lstm = nn.Embedding(10, 4), nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.matrix = nn.Parameter(torch.ones(12, 12))
        self.head = nn.Linear(12, 10)
        self.register_buffer("scale", torch.ones(10))

    def forward(self, x):
        x, _ = self.lstm(self.table(x))
        x, _ = self.attention(x, x, x)
        return self.head(x @ self.matrix) * self.scale


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 4, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


def tied():
    model = nn.Sequential(nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12, bias=False))
    model[2].weight = model[0].weight
    return model


OWN = {
    "convolutions": (convolutions, torch.ones(2, 3, 16, 16)),
    "mixed": (Mixed, torch.arange(10).reshape(2, 5)),
    "tied": (tied, torch.arange(10).reshape(2, 5)),
}


def build(name, device):
    if name in OWN:
        make, example = OWN[name]
        with torch.device(device):
            return make().eval(), example
    model, config, settings, kind = (MODELS | MORE)[name][:4]
    if not hasattr(transformers, model):
        pytest.skip(f"transformers {transformers.__version__} has no {model}")
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval(), INPUTS[kind]


def opened(name, device, **settings):
    model, example = build(name, device)
    layers = mps.layers(model, example, **settings)
    resources = {"memory_bytes": MemoryBytes(), "bitops": BitOps(), "s": Roofline("t4"), "energy_j": Energy()}
    if settings.get("kv_cache"):
        resources["kv_cache_bytes"] = KVCacheBytes(context=64)
    return layers, unscored(model, example, mps.precisions("w4 w8a8 w16"), layers, resources)


def without_routing(layers):
    return [replace(layer, macs=0) if place_of(layer.name) else layer for layer in layers]


def caches(name):
    """True for a decoder of transformers with attention."""
    return (MODELS | MORE).get(name, ("",))[0].endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    ) and (name != "mamba")


@pytest.mark.parametrize("settings", [{}, {"groups": "fused"}, {"kv_cache": True}, {"target": "gguf"}], ids=str)
@pytest.mark.parametrize("name", [*MODELS, *MORE, *OWN])
@pytest.mark.filterwarnings("ignore")
def test_layers_and_costs_are_those_of_the_model_with_weights(name, settings):
    if settings.get("kv_cache") and not caches(name):
        with pytest.raises(mps.TableError, match="the example fills no cache"):
            opened(name, "meta", **settings)
        return
    layers, table = opened(name, "cpu", **settings)
    bare, costs = opened(name, "meta", **settings)
    assert without_routing(bare) == without_routing(layers)
    assert sum(layer.macs for layer in bare) == sum(layer.macs for layer in layers)
    assert costs.fixed_usage == table.fixed_usage
    assert costs.reference_usage == pytest.approx(table.reference_usage, rel=1e-12)
    assert costs.origin["undecided"] == table.origin["undecided"]
    routed = np.array([place_of(layer.name) is not None for layer in layers])
    for resource, usage in table.usage.items():
        compared = ~routed if resource in ("bitops", "s", "energy_j") else slice(None)
        np.testing.assert_array_equal(costs.usage[resource][compared], usage[compared])
    assert ("bitops" in costs.origin["counted"]) == bool(routed.any())


def test_experts_have_equal_shares_of_the_tokens():
    """14 tokens of 2 samples go to 2 of 4 experts each: 7 an expert, in weights of 16 x 16 and 16 x 8."""
    layers, table = opened("qwen3-moe", "meta")
    assert [layer.macs for layer in layers if place_of(layer.name)] == [7 * 256 // 2, 7 * 128 // 2] * 4
    assert table.origin["counted"]["bitops"].startswith("each expert has an equal share of the tokens")


def test_nothing_is_left_behind():
    model, example = build("mixed", "cpu")
    for module in model.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = None if parameter is None else nn.Parameter(parameter.to("meta"))
    modules, buffers = dict(model.named_modules()), dict(model.named_buffers())
    mps.layers(model, example)
    with preserved(model):
        assert all(buffer.is_meta for buffer in model.buffers())
    assert dict(model.named_modules()) == modules
    assert all(buffer is buffers[name] and not buffer.is_meta for name, buffer in model.named_buffers())


NEEDS_VALUES = {
    "profile": lambda model, x, plan: mps.profile(model, [x], KLDivergence(), mps.precisions("w4"), progress=False),
    "weights alone": lambda model, x, plan: mps.profile(
        model, [x], RelativeWeightError(), mps.precisions("w4"), progress=False
    ),
    "evaluate": lambda model, x, plan: mps.evaluate(model, [x], plan, progress=False),
    "measure_plans": lambda model, x, plan: mps.measure_plans(model, [x], [plan], progress=False),
    "search": lambda model, x, plan: mps.search(
        model, [x] * 12, mps.Budget(average_bits=4), mps.precisions("w4 w8"), progress=False
    ),
    "latency": lambda model, x, plan: unscored(
        model, x, mps.precisions("w16"), mps.layers(model, x), {"latency_s": MeasuredLatency()}
    ),
    "distill_data": lambda model, x, plan: distill_data(model, (3, 8, 8), num_samples=2, progress=False),
}


@pytest.mark.parametrize("name", NEEDS_VALUES)
def test_what_needs_values_says_what_works_without(name):
    model, x = build("convolutions", "meta")
    with pytest.raises(
        mps.EstimatorError, match=r"'0.weight' is on the meta device, without values: .*; without them layers, costs"
    ):
        NEEDS_VALUES[name](model, x, mps.Plan({"0": mps.Precision("4")}))


def test_half_a_model_is_refused_as_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    with pytest.raises(
        mps.EstimatorError, match=r"'1.weight' is on the meta device, without values: load the weights first$"
    ):
        mps.layers(model, torch.ones(1, 4))
