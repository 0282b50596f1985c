"""Keys and values as decisions: what goes into the caches, against attention written out."""

import copy
import math

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models.running import preserved
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.input_statistics import input_statistics
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources import BitOps, KVCacheBytes, MemoryBytes, Total
from mpsearch.sensitivity import SNIP, DeltaLoss, Fisher, FisherProjection, KLDivergence, OutputGradient, PathShapley

OPTIONS = mps.precisions("w2 w4 w8 w16")
TOKENS = torch.randint(0, 11, (6, 9), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Causal attention of two heads of 8, keys and values of one head for both."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, n) for n in (16, 8, 8, 16))
        self.k_cache, self.v_cache = mps.KVCache(), mps.KVCache()

    def forward(self, x):
        queries = self.q_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
        keys, values = self.k_cache(self.k_proj(x)[:, None]), self.v_cache(self.v_proj(x)[:, None])
        mixed = nn.functional.scaled_dot_product_attention(
            queries, keys.expand(-1, 2, -1, -1), values.expand(-1, 2, -1, -1), is_causal=True
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attention, self.head = nn.Embedding(11, 16), Attention(), nn.Linear(16, 11)
        with torch.no_grad():
            self.embed.weight.mul_(2)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.attention(x))


def rounded(x, precision):
    """Each head of each token with a scale of its own, by its largest value."""
    out = torch.empty_like(x)
    for place in torch.cartesian_prod(*map(torch.arange, x.shape[:3])):
        row = x[tuple(place)]
        step = row.abs().max() / max(2 ** (precision.weight_bits - 1) - 1, 1)
        out[tuple(place)] = (row / step).round() * step
    return out


def divergence(model, keys, values):
    """KL of the decoder with its keys and values rounded, attention written out."""
    x = model.embed(TOKENS)
    one = model.attention
    q = one.q_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)
    k, v = one.k_proj(x)[:, None], one.v_proj(x)[:, None]
    k = rounded(k, keys) if keys.quantizes_weight else k
    v = rounded(v, values) if values.quantizes_weight else v
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(8)
    future = torch.ones(9, 9, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
    logits = model.head(x + one.o_proj(mixed.transpose(1, 2).flatten(2)))
    p, q = model(TOKENS).log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def decided(model):
    return mps.layers(model, TOKENS, kv_cache=True)


def test_listed_beside_the_weights():
    model = Decoder()
    plain = mps.layers(model, TOKENS)
    layers = decided(model)
    caches = [layer for layer in layers if layer.is_cache]
    assert [layer.name for layer in layers if not layer.is_cache] == [layer.name for layer in plain]
    assert [(one.name, one.kind, one.weight_shape, one.dtype) for one in caches] == [
        ("attention.k_cache", "kv_cache", (), "float32"),
        ("attention.v_cache", "kv_cache", (), "float32"),
    ]
    assert [one.macs for one in caches] == [2 * 9 * 9 * 8] * 2  # heads x queries x keys x size
    assert [layer.group for layer in layers if not layer.is_cache] == [layer.group for layer in plain]
    counted = BitOps()(model, layers, OPTIONS, example=TOKENS)
    before = BitOps()(model, plain, OPTIONS, example=TOKENS)
    assert counted.reference == before.reference
    assert counted.fixed == 0
    assert before.fixed == 256 * 2 * 2 * 9 * 9 * 8
    names = [layer.name for layer in mps.layers(model, TOKENS, kv_cache=True, exclude=["*.v_cache"])]
    assert "attention.k_cache" in names
    assert "attention.v_cache" not in names
    tied = mps.layers(model, TOKENS, kv_cache=True, groups={"cache": ["attention.?_cache"]})
    assert [layer.name for layer in tied if layer.group == "cache"] == ["attention.k_cache", "attention.v_cache"]


def test_measured_damage_is_that_of_attention_written_out():
    model = Decoder().double()
    layers = decided(model)
    with torch.no_grad():
        table = mps.profile(model, [TOKENS], KLDivergence(), OPTIONS, layers=layers, progress=False)
        for row, layer in enumerate(layers):
            for column, one in enumerate(OPTIONS):
                if layer.is_cache:
                    left = mps.Precision("16")
                    pair = (one, left) if layer.name.endswith("k_cache") else (left, one)
                    assert table.sensitivity[row, column] == pytest.approx(
                        divergence(model, *pair), rel=1e-3, abs=1e-12
                    )
        plan = mps.Plan({"attention.k_cache": mps.Precision("2"), "attention.v_cache": mps.Precision("4")})
        expected = divergence(model, mps.Precision("2"), mps.Precision("4"))
    assert mps.evaluate(model, [TOKENS], plan, progress=False).kl == pytest.approx(expected, rel=1e-3)
    assert mps.measure_plans(model, [TOKENS], [plan], progress=False).damage[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("estimator", "factor"),
    [(FisherProjection(draws=64), 1.3), (Fisher(draws=16), 2.0), (OutputGradient(draws=16), 2.5)],
)
def test_gradients_agree_with_what_is_measured(estimator, factor):
    """At 8 bits the damage is quadratic in the error: curvature along it, or of errors without direction, tells it."""
    model = Decoder().double()
    layers = decided(model)
    options = mps.precisions("w8")
    truth, found = (
        mps.profile(model, [TOKENS], one, options, layers=layers, progress=False).sensitivity
        for one in (KLDivergence(), estimator)
    )
    rows = [row for row, layer in enumerate(layers) if layer.is_cache]
    scale = truth[rows] if not isinstance(estimator, OutputGradient) else truth[rows] * 2  # no 1/2 in front
    for a, b in zip(found[rows].ravel(), scale.ravel(), strict=True):
        assert b / factor < a < b * factor


def test_estimators_at_the_quantized_point_see_caches():
    model = Decoder()
    layers = decided(model)
    tables = mps.profile(model, [TOKENS], [DeltaLoss(), PathShapley()], OPTIONS, layers=layers, progress=False)
    for table in tables:
        for row, layer in enumerate(layers):
            if layer.is_cache:
                assert table.sensitivity[row, 0] > table.sensitivity[row, 2] >= table.sensitivity[row, 3] == 0


def test_estimators_of_weights_refuse_a_cache():
    model = Decoder()
    with pytest.raises(mps.EstimatorError, match="SNIP looks at weights, and the cache 'attention"):
        mps.profile(model, [TOKENS], SNIP(), OPTIONS, layers=decided(model), progress=False)
    with pytest.raises(mps.EstimatorError, match="SNIP looks at weights"):
        mps.search(model, [TOKENS] * 6, mps.Budget(average_bits=4), OPTIONS, layers=decided(model), estimators=[SNIP()])


def test_one_budget_for_weights_and_caches():
    """The best plan of all, by enumeration, under two limits and under their sum."""
    model = Decoder()
    layers = [layer for layer in decided(model) if layer.is_cache or layer.name == "head"]
    resources = {"memory_bytes": MemoryBytes(), "kv_cache_bytes": KVCacheBytes(200)}
    table = mps.profile(
        model,
        [TOKENS],
        KLDivergence(),
        OPTIONS,
        layers=layers,
        resources={**resources, "all_bytes": Total(tuple(resources.values()))},
        progress=False,
    )
    for limits in ({"memory_bytes": "90%", "kv_cache_bytes": "40%"}, {"all_bytes": "60%"}):
        best = mps.solve(table, mps.Budget(**limits))
        plans = torch.cartesian_prod(*[torch.arange(4)] * 3).tolist()
        damages = []
        for plan in plans:
            fits = all(
                sum(table.usage[name][row, p] for row, p in enumerate(plan)) + table.fixed_usage[name]
                <= float(limit.rstrip("%")) / 100 * table.reference_usage[name]
                for name, limit in limits.items()
            )
            damages.append(sum(table.sensitivity[row, p] for row, p in enumerate(plan)) if fits else math.inf)
        assert best.sensitivity == pytest.approx(min(damages))
    assert best.usage["average_bits"] == best.plan["head"].weight_bits  # of the weights
    assert mps.evaluate(model, [TOKENS], best.plan, progress=False).kl > 0


def test_a_table_with_caches_comes_back_from_its_files(tmp_path):
    model = Decoder()
    table = mps.profile(model, [TOKENS], KLDivergence(), OPTIONS, layers=decided(model), progress=False)
    for name in ("table.csv", "table.npz"):
        table.save(tmp_path / name)
        assert mps.CostTable.load(tmp_path / name) == table


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(mps.TableError, match="kv_cache=True, but the example fills no cache: Sequential has neither"):
        mps.layers(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2), kv_cache=True)


def test_the_state_of_a_model_has_nothing_of_a_cache():
    model = Decoder()
    assert not [name for name in model.state_dict() if "cache" in name]
    copy.deepcopy(model).load_state_dict(model.state_dict())


def transformer(name, **settings):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {**sizes, "vocab_size": 11, "num_key_value_heads": 2, "initializer_range": 0.3, **settings}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**made)).eval()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers_quantize_what_the_cache_holds(use_cache, attention):
    """Against a cache that rounds by itself, written for the library's own interface."""
    model = transformer("Llama", attn_implementation=attention)
    from transformers import DynamicCache

    class Rounding(DynamicCache):
        def update(self, keys, values, layer_idx, *args, **keywords):
            if layer_idx == 1:
                keys, values = rounded(keys, mps.Precision("2")), rounded(values, mps.Precision("4"))
            return super().update(keys, values, layer_idx, *args, **keywords)

    with torch.no_grad():
        p = model(TOKENS).logits.log_softmax(-1)
        q = model(TOKENS, past_key_values=Rounding()).logits.log_softmax(-1)
    model.config.use_cache = use_cache
    head = "model.layers.1.self_attn"
    plan = mps.Plan({f"{head}.k_cache": mps.Precision("2"), f"{head}.v_cache": mps.Precision("4")})
    found = mps.evaluate(model, [{"input_ids": TOKENS}], plan, progress=False).kl
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert expected > 1e-4
    assert found == pytest.approx(expected, rel=1e-3)
    assert not [name for name, _ in model.named_modules() if "cache" in name]


@pytest.mark.parametrize(
    ("name", "settings", "window"),
    [("Llama", {}, None), ("Mistral", {"sliding_window": 4}, 4), ("Qwen3", {"head_dim": 8}, None)],
)
def test_caches_of_transformers_and_their_bytes(name, settings, window):
    model = transformer(name, **settings)
    layers = mps.layers(model, {"input_ids": TOKENS}, kv_cache=True)
    caches = [layer for layer in layers if layer.is_cache]
    assert [layer.name for layer in caches] == [f"model.layers.{n}.self_attn.{x}_cache" for n in (0, 1) for x in "kv"]
    assert {layer.macs for layer in caches} == {4 * 9 * 9 * 8}
    found = KVCacheBytes(50, batch=2)(model, layers, OPTIONS, example={"input_ids": TOKENS})
    assert (
        found.reference == 2 * min(50, window or 50) * 2 * 2 * 2 * 8 * 4
    )  # tokens x layers x K and V x heads x size x bytes


def test_keys_and_values_of_one_matrix_and_of_two_sides():
    """GPT-2 cuts them from one output; the decoder of Whisper has caches of its own tokens and of the encoder's."""
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=16)
    )
    found = {x.name: x.macs for x in mps.layers(gpt2, {"input_ids": TOKENS}, kv_cache=True) if x.is_cache}
    assert found == {f"transformer.h.0.attn.{x}_cache": 2 * 9 * 9 * 8 for x in "kv"}
    sides = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("attention_heads", 2), ("ffn_dim", 16), ("layers", 1))
    }
    config = transformers.WhisperConfig(
        d_model=16,
        vocab_size=11,
        max_source_positions=10,
        num_mel_bins=4,
        pad_token_id=0,
        decoder_start_token_id=1,
        **sides,
    )
    whisper = transformers.WhisperForConditionalGeneration(config)
    batch = {"input_features": torch.randn(6, 4, 20), "decoder_input_ids": TOKENS}
    found = {x.name: x.macs for x in mps.layers(whisper, batch, kv_cache=True) if x.is_cache}
    layer = "model.decoder.layers.0"
    assert found == {f"{layer}.self_attn.{x}_cache": 2 * 9 * 9 * 8 for x in "kv"} | {
        f"{layer}.encoder_attn.{x}_cache": 2 * 9 * 10 * 8 for x in "kv"
    }


@pytest.mark.parametrize("kv_cache", [False, True])
def test_only_what_lies_behind_a_perturbation_is_run_again(kv_cache):
    model, batch = transformer("Llama"), {"input_ids": TOKENS}
    layers = mps.layers(model, batch, kv_cache=kv_cache, groups="none")
    table = mps.profile(model, [batch], KLDivergence(), OPTIONS[:2], layers=layers, progress=False)
    assert table.origin["passes"]["forward"] < 0.7 * 2 * len(layers)
    for row, layer in enumerate(layers):
        alone = mps.evaluate(model, [batch], mps.Plan({layer.name: OPTIONS[0]}), progress=False)
        assert table.sensitivity[row, 0] == pytest.approx(alone.kl, rel=1e-4)


def test_latent_keys_and_values():
    """DeepSeek stores latents, which a layer makes keys and values of: that product is the layer's, not the cache's."""
    model = transformer(
        "DeepseekV3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1,
    )  # fmt: skip
    batch = {"input_ids": TOKENS}
    layers = mps.layers(model, batch, kv_cache=True)
    macs = {layer.name.rpartition(".")[2]: layer.macs for layer in layers if layer.is_cache}
    assert macs == {"k_cache": 4 * 9 * 9 * 16, "v_cache": 0}
    found = BitOps()(model, layers, OPTIONS, example=batch)
    assert found.reference == BitOps()(model, mps.layers(model, batch), OPTIONS, example=batch).reference
    caches = mps.Plan({layer.name: mps.Precision("2") for layer in layers if layer.is_cache})
    assert mps.evaluate(model, [batch], caches, progress=False).kl > 0


def test_an_encoder_has_none():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=11
    )
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(mps.TableError, match="fills no cache"):
        mps.layers(model, {"input_ids": TOKENS}, kv_cache=True)


def test_quantizers_that_look_at_inputs_leave_caches_to_rounding():
    model = Decoder()
    quantizer = GPTQ(input_statistics(model, [TOKENS]))
    plan = mps.Plan({layer.name: mps.Precision("3") for layer in decided(model)})
    caches = mps.Plan({name: precision for name, precision in plan.items() if "cache" in name})
    found = [mps.evaluate(model, [TOKENS], one, quantizer=quantizer, progress=False).kl for one in (plan, caches)]
    assert found[0] > found[1] == mps.evaluate(model, [TOKENS], caches, progress=False).kl


def test_attention_of_ones_own_is_left_as_it_is():
    """The names that transformers uses mean nothing in other code."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_idx, self.is_causal, self.fc = 0, True, nn.Linear(4, 4)

        def forward(self, x, past_key_values=None):
            assert past_key_values is None
            return self.fc(x)

    model = nn.Sequential(Own())
    assert [layer.name for layer in mps.layers(model, torch.ones(2, 4))] == ["0.fc"]
    with preserved(model):
        assert [name for name, _ in model.named_modules()] == ["", "0", "0.fc"]


def test_half_precision_and_groups():
    model = transformer("Llama").to(torch.bfloat16)
    layers = mps.layers(model, {"input_ids": TOKENS}, kv_cache=True)
    assert {layer.dtype for layer in layers if layer.is_cache} == {"bfloat16"}
    kv = {layer.name: mps.Precision.parse("w4g4") for layer in layers if layer.is_cache}
    assert mps.evaluate(model, [{"input_ids": TOKENS}], mps.Plan(kv), progress=False).kl > 0
    keys = torch.randn(2, 2, 3, 8, dtype=torch.bfloat16)
    from mpsearch.quantizers.fake_quantization import input_quantizer

    function = input_quantizer(mps.KVCache(), "k", mps.Precision.parse("w4g4"), RoundToNearest(), {})
    rows = [RoundToNearest(scale="max")(row[None], mps.Precision.parse("w4g4"))[0] for row in keys.reshape(-1, 8)]
    assert torch.equal(function(keys), torch.stack(rows).reshape(keys.shape))


def test_the_model_is_left_as_it_was_when_it_fails():
    model = transformer("Llama")
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]

    def fail():
        with preserved(model):
            assert "model.layers.0.self_attn.k_cache" in dict(model.named_modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert not [name for name, _ in model.named_modules() if "cache" in name]
