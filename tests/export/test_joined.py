"""Layers that vLLM joins by its models' `packed_modules_mapping` (vllm 0.33.0), and those that it asks for though a model lacks them."""

import re

import pytest
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.core.layer import Layer
from mpsearch.targets.rules import TARGETS, VLLM, fused_groups, lacking, rules

#: Exporters of files that vLLM reads, with what they take to write for it.
READ_BY_VLLM = {
    "compressed-tensors": {},
    "llm-compressor": {},
    "auto-round": {},
    "gptqmodel": {"vllm": True},
    "modelopt": {"vllm": True},
    "torchao": {"vllm": True},
}
#: Layers of one block as models of transformers name them -> those that vLLM joins.
BLOCKS = {
    "gated delta": (
        "in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj",
        {"in_proj_qkv in_proj_z", "in_proj_b in_proj_a"},
    ),
    "gated delta, older": ("in_proj_qkvz in_proj_ba out_proj", set()),
    "mamba": ("in_proj x_proj dt_proj out_proj", set()),
    "latent": ("q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj", {"q_a_proj kv_a_proj_with_mqa"}),
    "latent, whole queries": ("q_proj kv_a_proj_with_mqa kv_b_proj o_proj", set()),
    "indexer": ("indexer.wk indexer.weights_proj indexer.wq_b", {"indexer.wk indexer.weights_proj"}),
    "delta with a gate": (
        "linear_attn.q_proj linear_attn.k_proj linear_attn.v_proj linear_attn.g_proj linear_attn.a_proj linear_attn.b_proj",
        {"linear_attn.q_proj linear_attn.k_proj linear_attn.v_proj linear_attn.g_proj"},
    ),
    "kimi delta": (
        "q_proj k_proj v_proj b_proj f_a_proj f_b_proj o_proj",
        {"q_proj k_proj v_proj b_proj f_a_proj"},
    ),
    "a gate on the output alone": ("q_proj k_proj v_proj g_proj o_proj", {"q_proj k_proj v_proj"}),
    "cross attention": (
        "encoder_attn.q_proj encoder_attn.k_proj encoder_attn.v_proj",
        {"encoder_attn.k_proj encoder_attn.v_proj"},
    ),
    "bert": ("self.query self.key self.value output.dense", {"self.query self.key self.value"}),
    "vision": ("attn.q attn.k attn.v attn.proj", {"attn.q attn.k attn.v"}),
    "exaone": ("c_fc_0 c_fc_1 c_proj", {"c_fc_0 c_fc_1"}),
    "gated": ("gate_proj up_proj down_proj", {"gate_proj up_proj"}),
    "gated, by numbers": ("w1 w2 w3", {"w1 w3"}),
}


def block(names: str) -> nn.Module:
    whole = nn.Module()
    for name in names.split():
        parent = whole
        for part in name.split(".")[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(name.rpartition(".")[2], nn.Linear(64, 64))
    return nn.ModuleList([whole])


@pytest.mark.parametrize("kind", BLOCKS)
def test_what_the_models_of_vllm_join(kind):
    names, expected = BLOCKS[kind]
    full = [f"layers.0.{name}" for name in names.split()]
    groups = {" ".join(n.removeprefix("layers.0.") for n in g) for g in fused_groups(full, VLLM).values() if len(g) > 1}
    assert groups == expected
    assert not lacking(full, VLLM)


@pytest.mark.parametrize("target", READ_BY_VLLM)
def test_a_plan_that_splits_a_joined_matrix_is_refused_by_name(target):
    for names, expected in BLOCKS.values():
        model = block(names)
        for group in expected:
            first, *others = [f"0.{name}" for name in group.split()]
            for last in ("w8g32", "w16"):
                plan = mps.Plan(
                    dict.fromkeys([first, *others], mps.Precision.parse("w4g32"))
                    | {others[-1]: mps.Precision.parse(last)}
                )
                with pytest.raises(mps.ExportError, match=rf"fused at run time: .*{re.escape(others[-1])} {last}"):
                    export.EXPORTERS[target](plan, model, **READ_BY_VLLM[target])


def test_small_gates_may_stay_alone_at_16_bits():
    plan = mps.Plan({"0.in_proj_qkv": mps.Precision("4", "16", 32), "0.in_proj_z": mps.Precision("4", "16", 32)})
    config = export.compressed_tensors(plan, block(BLOCKS["gated delta"][0]))
    assert config.ignore == ["0.in_proj_b", "0.in_proj_a", "0.out_proj"]


def scheme(config, name):
    """Of a layer of vLLM: None where it is ignored, the group that names it, or ValueError, as vLLM's reader does it for joined layers."""
    parent, _, last = name.rpartition(".")
    parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}.get(last)
    names = [f"{parent}.{part}" for part in parts] if parts else [name]
    ignored = [part in config.ignore for part in names]
    if any(ignored) and not all(ignored):
        raise ValueError(f"different schemes for the shards of {name}")
    for title, group in config.config_groups.items():
        if all(part in group.targets for part in names):
            return title
    if not all(ignored):
        raise ValueError(f"no scheme for {name}")
    return None


@pytest.mark.parametrize("bits", ["w4", "w16"])
def test_members_that_the_model_lacks_are_named_with_the_others(bits, tmp_path):
    """Values that are the keys: vLLM's joined matrix has three parts all the same."""
    model = block("self_attn.q_proj self_attn.k_proj self_attn.o_proj mlp.gate_proj mlp.up_proj")
    plan = mps.Plan(
        {
            "0.self_attn.q_proj": mps.Precision.parse(bits),
            "0.self_attn.k_proj": mps.Precision.parse(bits),
            "0.mlp.gate_proj": mps.Precision("8"),
            "0.mlp.up_proj": mps.Precision("8"),
        }
    )
    config = export.compressed_tensors(plan, model, path=tmp_path)
    assert scheme(config, "0.self_attn.qkv_proj") == (None if bits == "w16" else "group_w4")
    assert scheme(config, "0.mlp.gate_up_proj") == "group_w8"
    assert scheme(config, "0.self_attn.o_proj") is None
    saved = (tmp_path / "config.json").read_text()
    assert saved.count('"0.self_attn.v_proj"') == 1
    plain = export.compressed_tensors(plan, model, vllm=False)
    assert "0.self_attn.v_proj" not in [*plain.ignore, *(t for g in plain.config_groups.values() for t in g.targets)]
    recipe = export.llm_compressor(plan, model)["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    assert recipe["ignore"] == config.ignore


def test_a_query_alone_asks_for_nothing():
    assert not lacking(["0.self_attn.q_proj", "0.self_attn.o_proj", "1.self_attn.q_proj"], VLLM)


def test_patterns_for_vllm_leave_the_whole_alone_too():
    """GPTQ's reader in vLLM looks for the name of the joined layer only."""
    model = block("self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj")
    plan = mps.Plan({f"0.mlp.{part}_proj": mps.Precision("4", "16", 32) for part in ("gate", "up")})
    dynamic = export.gptqmodel(plan, model, vllm=True)["dynamic"]
    first = {
        name: next(pattern[0] for pattern in dynamic if re.match(pattern[2:], name))
        for name in ("0.self_attn.qkv_proj", "0.mlp.gate_up_proj", "0.self_attn.q_proj")
    }
    assert first == {"0.self_attn.qkv_proj": "-", "0.mlp.gate_up_proj": "+", "0.self_attn.q_proj": "-"}


@pytest.mark.parametrize("target", ["auto-round", "gptqmodel"])
@pytest.mark.parametrize(
    ("shape", "words"), [((48, 64), "rows in multiples of 32, the weight has 48"), ((64, 48), "columns")]
)
def test_rows_and_columns_of_gptq_are_multiples_of_32(target, shape, words):
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    with pytest.raises(mps.ExportError, match=f"{target} cannot express w4g16 for '0': it needs {words}"):
        export.EXPORTERS[target](mps.Plan({"0": mps.Precision("4", "16", 16)}), model)


def test_gate_and_up_of_experts_in_one_matrix_are_two_layers():
    """Who takes them apart asks for 32 rows of each: 96 are 48 and 48."""
    precision = mps.Precision("4", "16", 32)
    for rows, fits in ((96, False), (128, True)):
        layer = Layer("layers.0.mlp.experts.0.gate_up_proj", "linear", (rows, 64))
        assert (rules("gptqmodel").refusal(layer, precision) is None) == fits
        assert rules("vllm").refusal(layer, precision) is None


def test_what_a_target_writes_in_float_is_no_option():
    for name, reached in (("lm_head", False), ("model.lm_head", False), ("head", True), ("x_lm_head", True)):
        layer = Layer(name, "linear", (64, 64))
        assert (TARGETS["auto-round"].refusal(layer, mps.Precision("4")) is None) == reached
        assert (mps.Precision("4") in TARGETS["auto-round"].offers(layer, set())) == reached
