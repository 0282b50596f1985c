"""What a target can express, exact names, joined layers, snapping."""

import warnings

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.export.fitting import fitted
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.targets.rules import TARGETS, Scheme, Target


def plan(**precisions):
    return mps.Plan({name.replace("__", "."): mps.Precision.parse(text) for name, text in precisions.items()})


@pytest.mark.parametrize(
    ("target", "layer", "precision", "words"),
    [
        ("torchao", mps.Layer("fc", "linear", (8, 64)), "w9", "takes weights of 1, 2, 3, 4, 5, 6, 7, 8 there"),
        ("torchao", mps.Layer("fc", "linear", (8, 64)), "wnf4", "takes weights of 1"),
        ("torchao", mps.Layer("fc", "linear", (8, 64)), "w4a4", "takes activations of 16, 8 there"),
        ("torchao", mps.Layer("fc", "linear", (8, 64)), "w16a8", "takes weights of 1"),
        ("torchao", mps.Layer("e", "embedding", (8, 64)), "w4a8", "takes activations of 16 there"),
        ("torchao", mps.Layer("fc", "linear", (8, 64)), "w4g48", "needs columns in multiples of 48, the weight has 64"),
        ("torchao", mps.Layer("c", "conv2d", (8, 4, 3, 3)), "w4", "kernels of 1"),
        ("torchao", mps.Layer("c", "conv3d", (8, 4, 1, 1, 1)), "w4", "conv2d, embedding, linear, not conv3d"),
        ("torchao", mps.Layer("h", "transposed linear", (8, 64)), "w4", "not transposed linear"),
        ("compressed-tensors", mps.Layer("fc", "linear", (8, 64)), "w1", "takes weights of 2, 3, 4, 5, 6, 7, 8"),
        ("onnxruntime", mps.Layer("fc", "linear", (8, 64)), "w3g32", "takes weights of 2, 4, 8 there"),
        ("onnxruntime", mps.Layer("fc", "linear", (8, 64)), "w4", "takes group sizes of 16, 32, 64, 128, 256 there"),
    ],
)
def test_a_refusal_names_layer_precision_and_what_is_possible(target, layer, precision, words):
    found = TARGETS[target].refusal(layer, mps.Precision.parse(precision))
    assert found is not None
    assert found.startswith(f"{target} cannot express {precision} for {layer.name!r}: ")
    assert words in found


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_a_target_takes_what_it_offers_and_refuses_the_rest(name):
    target = TARGETS[name]
    for kind, shape in (("linear", (8, 256)), ("embedding", (8, 96)), ("conv2d", (8, 32, 3, 3)), ("conv1d", (8, 4, 3))):
        layer = mps.Layer("x", kind, shape)
        offers = target.offers(layer, {48})
        for weight in ("1", "2", "3", "4", "8", "9", "16", "nf4"):
            for activation in ("4", "8", "16"):
                for size in (None, 16, 32, 48, 256):
                    precision = mps.Precision(weight, activation, size)
                    alone = (weight, activation) == ("16", "16")
                    assert (target.refusal(layer, precision) is None) == (alone or precision in offers)


def test_names_are_exact():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for name in ("fc", "1", "0.weight", ""):
        if name:
            with pytest.raises(mps.ExportError, match=f"names {name!r}, which is no quantizable layer"):
                fitted(mps.Plan({name: mps.Precision("4")}), model, "torchao")


class Attention(nn.Module):
    """Weights that other tools do not see as modules: in attention, and computed ones."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
        self.plain = nn.Linear(64, 64)
        self.k_cache = mps.KVCache()


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("attention.q_proj", "it is a part of 'attention', a MultiheadAttention, which is one module to other tools"),
        ("attention.out_proj", "it is a part of 'attention', a MultiheadAttention"),
        ("scaled", "its weight is computed from other tensors"),
        ("k_cache", "it quantizes weights, and this is a cache of keys or values"),
    ],
)
def test_what_other_tools_cannot_reach_is_refused_or_left_alone(target, name, words):
    model = Attention()
    for snap in (False, True):
        with pytest.raises(mps.ExportError, match=f"^{target} cannot express w4 for {name!r}: {words}"):
            fitted(plan(plain="w16", **{name.replace(".", "__"): "w4"}), model, target, snap=snap)
        left = fitted(plan(plain="w16", **{name.replace(".", "__"): "w16"}), model, target, snap=snap)
        assert dict(left) == {"plain": mps.Precision("16")}
    assert type(model.attention) is nn.MultiheadAttention


def test_experts_in_one_tensor_are_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 16, "num_local_experts": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    expert = "model.layers.0.mlp.experts.1.down_proj"
    with pytest.raises(mps.ExportError, match=r"part of 'model.layers.0.mlp.experts', a MixtralExperts, which is one"):
        fitted(mps.Plan({expert: mps.Precision("4")}), model, "torchao")
    cache = "model.layers.0.self_attn.v_cache"
    with pytest.raises(mps.ExportError, match=f"cannot express w8 for {cache!r}: it quantizes weights"):
        fitted(mps.Plan({cache: mps.Precision("8")}), model, "torchao")
    assert export.neutral(mps.Plan({expert: mps.Precision("4"), cache: mps.Precision("8")}), model).keys() == {
        expert,
        cache,
    }


def test_layers_that_share_a_weight_agree():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    model[1].weight = model[0].weight
    assert fitted(plan(**{"0": "w4", "1": "w4"}), model, "torchao")
    assert fitted(plan(**{"0": "w16", "1": "w16g32"}), model, "torchao")
    for other in ({"0": "w4", "1": "w8"}, {"0": "w4"}):
        with pytest.raises(mps.ExportError, match=r"share a weight: 0 w4, 1 (w8|left alone)"):
            fitted(plan(**other), model, "torchao")


def test_fused_layers_agree(llama, plan_of):
    fine = plan_of(llama, q_proj="w4", k_proj="w4", v_proj="w4", o_proj="w8", gate_proj="w3", up_proj="w3")
    assert fitted(fine, llama, "compressed-tensors") is fine
    bad = plan_of(llama, q_proj="w4", k_proj="w8", v_proj="w4")
    with pytest.raises(mps.ExportError, match=r"fused at run time: model.layers.0.self_attn.q_proj w4, .*k_proj w8"):
        fitted(bad, llama, "compressed-tensors")
    with pytest.raises(mps.ExportError, match="fused at run time"):
        fitted(bad, None, "compressed-tensors")
    with pytest.raises(mps.ExportError, match=r"model.layers.0.self_attn.v_proj left alone"):
        fitted(plan_of(llama, q_proj="w4", k_proj="w4"), llama, "compressed-tensors")
    assert fitted(bad, llama, "torchao") is bad  # fuses nothing


def test_the_option_of_an_exporter_decides_what_is_fused(llama, plan_of):
    bad = plan_of(llama, q_proj="w4", k_proj="w8", v_proj="w4")
    for target in ("torchao", "compressed-tensors", "auto-round", "gptqmodel"):
        assert fitted(bad, llama, target, vllm=False) is bad
        with pytest.raises(mps.ExportError, match="fused at run time"):
            fitted(bad, llama, target, vllm=True)
        found = export.snapped(bad, llama, target, vllm=True).plan
        assert {str(precision) for precision in found.values()} == {"w4"}
        assert dict(export.snapped(bad, llama, target, vllm=False).plan) == dict(bad)


def test_experts_are_fused_across_their_number():
    names = [f"mlp.experts.{i}.{part}" for i in range(3) for part in ("gate_proj", "up_proj")]
    same = mps.Plan(dict.fromkeys(names, mps.Precision("4")))
    assert fitted(same, None, "compressed-tensors")
    with pytest.raises(mps.ExportError, match="fused at run time"):
        fitted(mps.Plan({**same, names[-1]: mps.Precision("8")}), None, "compressed-tensors")


def cost(model, chosen):
    """Bytes of really packed weights."""
    total = 0
    for name, precision in chosen.items():
        weight = model.get_submodule(name).weight.detach()
        codes = precision.quantizes_weight
        total += RoundToNearest().codes(weight, precision).pack().nbytes if codes else 4 * weight.numel()
    return total


TOY = Target("toy", (Scheme(("2", "4", "8"), ("8", "16"), group_sizes=(16, 32)),), (("ab", ("a", "b")),))


@pytest.mark.parametrize("seed", range(20))
def test_snapping_takes_no_more_bytes_and_nothing_nearer_fits(seed, monkeypatch):
    """Against all precisions of the target, one after the other."""
    monkeypatch.setitem(TARGETS, "toy", TOY)
    generator = torch.Generator().manual_seed(seed)
    pick = lambda options: options[int(torch.randint(len(options), (), generator=generator))]  # noqa: E731
    wanted = mps.Precision(pick(("2", "3", "5", "6", "8", "12")), pick(("4", "8", "16")), pick((None, 16, 32, 64)))
    model = nn.ModuleDict({"c": nn.Linear(64, 8)})
    before = mps.Plan({"c": wanted}, usage={"memory_bytes": 10000.0, "bitops": 5.0})
    options = [
        mps.Precision(w, a, g)
        for w, a, g in [(w, a, g) for w in "248" for a in ("8", "16") for g in (None, 16, 32, 64)]
        + [("16", "16", None)]
        if g != 64
    ]
    cheap = [p for p in options if cost(model, {"c": p}) <= cost(model, before)]
    if not cheap:
        with pytest.raises(mps.ExportError, match="nothing that toy has for 'c' takes at most"):
            export.snapped(before, model, "toy")
        return
    found = export.snapped(before, model, "toy")
    after = found.plan["c"]
    assert after in cheap
    assert abs(after.weight_bits - wanted.weight_bits) == min(abs(p.weight_bits - wanted.weight_bits) for p in cheap)
    if found.changes:
        assert found.plan.usage == {"memory_bytes": cost(model, found.plan) + 8 * 4}  # and the bias
        assert not found.plan.predicted
    else:
        assert after == wanted
        assert wanted in options


def test_snapping_moves_joined_layers_together(monkeypatch):
    monkeypatch.setitem(TARGETS, "toy", TOY)
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 24), "c": nn.Linear(64, 8)})
    before = plan(a="w8", b="w4", c="w3")
    with pytest.raises(mps.ExportError, match="one precision for layers that are fused at run time: a w8, b w4"):
        fitted(plan(a="w8", b="w4", c="w4"), model, "toy")
    found = export.snapped(before, model, "toy")
    assert found.plan["a"] == found.plan["b"] == mps.Precision("4")
    assert cost(model, found.plan) <= cost(model, before)
    with pytest.raises(mps.ExportError, match="the plan leaves 'b' alone"):
        export.snapped(plan(a="w8"), model, "toy")


def test_snap_warns_and_needs_the_model():
    model = nn.Sequential(nn.Linear(64, 8))
    with pytest.warns(UserWarning, match="1 of 1 layers moved to what onnxruntime has: 0: w5g32 -> w4g32"):
        assert dict(fitted(plan(**{"0": "w5g32"}), model, "onnxruntime", snap=True)) == plan(**{"0": "w4g32"}).layers
    with pytest.raises(mps.ExportError, match=r"snap=True \(--snap\) needs the model"):
        fitted(plan(**{"0": "w3"}), None, "onnxruntime", snap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(plan(**{"0": "w8g32"}), model, "onnxruntime", snap=True)


class Matrix(nn.Module):
    """A matrix of no layer behind a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.proj = nn.Linear(32, 32), nn.Parameter(torch.randn(32, 32))

    def forward(self, x):
        return self.first(x) @ self.proj


def test_a_parameter_of_no_layer_is_refused_by_name_or_left_alone():
    model = Matrix()
    plan = mps.Plan({"first": mps.Precision("4", group_size=32), "proj": mps.Precision("4", group_size=32)})
    with pytest.raises(
        mps.ExportError, match=r"gptqmodel cannot express w4g32 for 'proj': a parameter that functions read"
    ):
        fitted(plan, model, "gptqmodel")
    left = mps.Plan({"first": mps.Precision("4", group_size=32), "proj": mps.Precision("16")})
    with pytest.warns(UserWarning, match=r"the plan names 2 layers: 51 % of the weights .*proj 49 %"):
        assert list(fitted(left, model, "gptqmodel")) == ["first"]
