"""Experts that transformers keeps in one tensor, carried out by the tools that take them, each held against its weights by hand."""

import json
import re

import numpy as np
import pytest
import torch

import mpsearch as mps
from mpsearch import export
from mpsearch.export.stacked_experts import checkpoint_names, targets
from mpsearch.quantizers.rounding import RoundToNearest

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
TOKENS = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))


def mixtral(**changes):
    return made(transformers.MixtralConfig(**{**SIZES, "intermediate_size": 256, "num_local_experts": 3, **changes}))


def qwen(**changes):
    sizes = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "head_dim": 32,
    }
    return made(transformers.Qwen3MoeConfig(**{**SIZES, **sizes, **changes}))


def made(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that routers, rotations and rounding matter
    return model


def rounded(model, plan):
    """Logits of the model with weights rounded in place, expert by expert, without any exporter."""
    with torch.no_grad():
        for name, precision in plan.items():
            if "experts" in name:
                block, number, part = name.rsplit(".", 2)
                weight = getattr(model.get_submodule(block), part)[int(number)]
            else:
                weight = model.get_submodule(name).weight
            weight.copy_(RoundToNearest()(weight, precision))
        return model(TOKENS).logits


@pytest.fixture
def ggml_plan(experts_plan):
    texts = [["wq2_k", "wq6_k"], ["wq4_k", "wq8_0"]]
    return lambda model: experts_plan(model, lambda block, number, part: texts[block]["down" in part], "wq8_0")


def test_targets_that_look_at_modules_refuse_them():
    model, expert = mixtral(), "model.layers.0.mlp.experts.1.down_proj"
    for name, target in export.TARGETS.items():
        if not target.stacked and name in export.EXPORTERS:
            example = {"example": TOKENS} if name.startswith(("onnxruntime", "executorch")) else {}
            with pytest.raises(mps.ExportError, match=r"part of 'model.layers.0.mlp.experts', a MixtralExperts"):
                export.EXPORTERS[name](mps.Plan({expert: mps.Precision("8")}), model, **example)


@pytest.mark.parametrize(("make", "architecture"), [(mixtral, "llama"), (qwen, "qwen3moe")])
def test_gguf_has_one_tensor_a_matrix_of_all_experts(make, architecture, tmp_path, ggml_plan):
    library = pytest.importorskip("gguf")
    model = make()
    plan = ggml_plan(model)
    found = export.verify(plan, model, "gguf", architecture=architecture)
    assert {check.name: check.precision for check in found.layers} == dict(plan)
    types = export.gguf(plan, model, path=tmp_path / "model.gguf", architecture=architecture)
    tensors = {tensor.name: tensor for tensor in library.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {name: tensor.tensor_type.name for name, tensor in tensors.items()} == types
    for block, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        rows = experts.gate_up_proj.shape[1] // 2
        matrices = {
            "gate": experts.gate_up_proj[:, :rows],
            "up": experts.gate_up_proj[:, rows:],
            "down": experts.down_proj,
        }
        for part, weight in matrices.items():
            tensor = tensors[f"blk.{block}.ffn_{part}_exps.weight"]
            precision = plan[f"model.layers.{block}.mlp.experts.0.{'down_proj' if part == 'down' else 'gate_up_proj'}"]
            expected = torch.stack([RoundToNearest()(one, precision) for one in weight.detach()])
            values = library.dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_allclose(values, expected.numpy(), rtol=1e-5, atol=1e-6)
        assert types[f"blk.{block}.ffn_gate_inp.weight"] == "F32"


@pytest.mark.parametrize(("make", "architecture"), [(mixtral, "llama"), (qwen, "qwen3moe")])
def test_llama_cpp_runs_the_experts(make, architecture, tmp_path, llama_cpp, experts_plan):
    """It rounds inputs to 8 bits: near, and nearer to the plan than to the model."""
    pytest.importorskip("gguf")
    model = make(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    plan = experts_plan(model, lambda block, number, part: "wq2_k", "wq8_0")
    export.gguf(plan, model, path=tmp_path / "model.gguf", architecture=architecture)
    plain = model(TOKENS).logits.detach()
    planned = rounded(model, plan)
    real = llama_cpp.LlamaCpp(tmp_path / "model.gguf", 64)
    found = real(TOKENS)
    real.close()
    assert (found - planned).norm() < 0.1 * planned.norm()
    assert (found - planned).norm() < 0.3 * (plain - planned).norm()


def test_transformers_reads_the_experts_of_a_gguf_file(tmp_path, ggml_plan):
    pytest.importorskip("gguf")
    model = qwen()
    plan = ggml_plan(model)
    export.gguf(plan, model, path=tmp_path / "model.gguf", architecture="qwen3moe")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    torch.testing.assert_close(loaded(TOKENS).logits, rounded(model, plan), rtol=1e-4, atol=1e-4)


def test_llama_quantize_names_each_tensor_once(ggml_plan):
    pytest.importorskip("gguf")
    model = mixtral()
    plan = ggml_plan(model)
    lines = export.llama_quantize(plan, model)[1:-1:2]
    found = [line for line in lines if "exps" in line]
    kinds = [
        ("gate", 0, "q2_k"),
        ("up", 0, "q2_k"),
        ("down", 0, "q6_k"),
        ("gate", 1, "q4_k"),
        ("up", 1, "q4_k"),
        ("down", 1, "q8_0"),
    ]
    assert found == [rf"^blk\.{block}\.ffn_{part}_exps\.weight$={kind}" for part, block, kind in kinds]
    left = export.llama_quantize(mps.Plan({"lm_head": mps.Precision("q8_0")}), model)[1:-1:2]
    assert r"^blk\.0\.ffn_up_exps\.weight$=f16" in left
    apart = mps.Plan(
        dict.fromkeys(
            ("model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj"), mps.Precision("q4_k")
        )
    )
    assert export.llama_quantize(apart)[1] == r"^blk\.0\.ffn_up_exps\.weight$=q4_k"


@pytest.mark.parametrize("target", ["gguf", "llama-quantize"])
def test_experts_of_a_block_have_one_type_in_llama_cpp(target, ggml_plan):
    pytest.importorskip("gguf")
    model = mixtral()
    plan = ggml_plan(model)
    odd = "model.layers.0.mlp.experts.2.down_proj"
    for other in (
        mps.Plan({**plan, odd: mps.Precision("q8_0")}),
        mps.Plan({n: p for n, p in plan.items() if n != odd}),
    ):
        with pytest.raises(
            mps.ExportError, match=r"one precision for layers that are fused at run time: .*experts.0.down_proj"
        ):
            export.EXPORTERS[target](other, model)


def test_what_llama_cpp_would_compute_otherwise_is_refused(ggml_plan):
    pytest.importorskip("gguf")
    model = qwen(norm_topk_prob=False)
    with pytest.raises(mps.ExportError, match="norm_topk_prob=False"):
        export.gguf(ggml_plan(model), model, architecture="qwen3moe")


def names_of(weights, part):
    """Last part of the names in checkpoints: two for gate and up, by the published files of Mixtral and Qwen3-MoE."""
    both = ("w1", "w3") if weights == "mixtral" else ("gate_proj", "up_proj")
    down = ("w2",) if weights == "mixtral" else ("down_proj",)
    return both if part == "gate_up_proj" else down


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_compressed_tensors_writes_experts_as_checkpoints_have_them(make, tmp_path, experts_plan):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import unpack_from_int32
    from safetensors.torch import load_file

    model = make()
    plan = experts_plan(model, lambda block, number, part: "w4g32" if block == 0 else "w8", "w6")
    found = export.verify(plan, model, "compressed-tensors")
    assert {check.name: check.precision for check in found.layers} == dict(plan)
    assert max(check.difference for check in found.layers) == 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="experts have w4g32, w8: vLLM reads them, transformers misreads or refuses"):
        export.compressed_tensors(plan, model, path=tmp_path / "out")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    state = load_file(tmp_path / "out" / "model.safetensors")
    parent = "block_sparse_moe" if make is mixtral else "mlp"
    for name, precision in plan.items():
        if "experts" not in name:
            continue
        _, _, block, _, _, number, part = name.split(".")
        weight = getattr(model.model.layers[int(block)].mlp.experts, part)[int(number)].detach()
        names = names_of(make.__name__, part)
        for saved, rows in zip(names, weight.chunk(len(names)), strict=True):
            head = f"model.layers.{block}.{parent}.experts.{number}.{saved}"
            assert state[f"{head}.weight_shape"].tolist() == list(rows.shape)
            codes = unpack_from_int32(state[f"{head}.weight_packed"], precision.weight_bits, rows.shape)
            scale = state[f"{head}.weight_scale"]
            values = (codes.reshape(scale.numel(), -1) * scale.reshape(-1, 1)).reshape(rows.shape)
            assert torch.equal(values, RoundToNearest()(rows, precision))
    assert not [name for name in state if "gate_up_proj" in name]


def scheme(config, layer):
    """As vLLM finds the scheme of a layer: the ignored first, then the first target, equal or `re.match`; every layer has one."""
    matches = lambda target: re.match(target[3:], layer) if target.startswith("re:") else target == layer  # noqa: E731
    if any(map(matches, config["ignore"])):
        return None
    found = [
        group["weights"] for group in config["config_groups"].values() for target in group["targets"] if matches(target)
    ]
    assert len(found) == 1, layer
    return found[0]["num_bits"], found[0]["group_size"]


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_vllm_finds_the_scheme_of_every_block(make, tmp_path, experts_plan):
    """It asks for `<block>.0.gate_proj`, `.0.up_proj`, `.0.down_proj`, whatever the checkpoint calls them, and needs one answer."""
    pytest.importorskip("compressed_tensors")
    small = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
    model = make(num_hidden_layers=12, **small)  # layer 1 is the start of layer 10
    texts = {0: "w4g32", 1: "w8", 10: "w4g64"}
    plan = experts_plan(model, lambda block, number, part: texts.get(block), "w6")
    export.compressed_tensors(plan, model, path=tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    parent = "block_sparse_moe" if make is mixtral else "mlp"
    for block in range(12):
        precision = mps.Precision.parse(texts[block]) if block in texts else None
        wanted = precision and (precision.weight_bits, precision.group_size)
        for part in ("gate_proj", "up_proj", "down_proj"):
            assert scheme(config, f"model.layers.{block}.{parent}.experts.0.{part}") == wanted
        assert scheme(config, f"model.layers.{block}.self_attn.o_proj") == (6, None)
    assert scheme(config, "lm_head") is None


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_transformers_loads_experts_of_one_precision(make, tmp_path, experts_plan):
    pytest.importorskip("compressed_tensors")
    model = make()
    plan = experts_plan(model, lambda block, number, part: "w4g32", "w6")
    export.compressed_tensors(plan, model, path=tmp_path / "out")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(loaded(TOKENS).logits, rounded(model, plan), rtol=1e-4, atol=1e-4)


def test_what_vllm_refuses_for_experts_is_refused(experts_plan):
    """One scheme a block, of 4 or 8 bits; without vLLM, each expert may differ."""
    pytest.importorskip("compressed_tensors")
    model = mixtral()
    with pytest.raises(
        mps.ExportError, match=r"cannot express w3 for .*experts.0.gate_up_proj': it takes weights of 4, 8 there"
    ):
        export.compressed_tensors(experts_plan(model, lambda block, number, part: "w3", "w6"), model)
    mixed = experts_plan(model, lambda block, number, part: "w4" if "down" in part else "w8", "w6")
    with pytest.raises(
        mps.ExportError, match=r"one precision for layers that are fused at run time: .*experts.0.gate_up_proj w8"
    ):
        export.compressed_tensors(mixed, model)
    each = mps.Plan({name: mps.Precision(str(2 + i % 7)) for i, name in enumerate(mixed)})
    found = export.verify(each, model, "compressed-tensors")
    assert {check.name: check.precision for check in found.layers} == dict(each)
    config = export.compressed_tensors(each, model, vllm=False)
    assert sorted(name for group in config.config_groups.values() for name in group.targets) == sorted(each)


def test_a_model_whose_checkpoints_stack_experts_is_refused(experts_plan):
    pytest.importorskip("compressed_tensors")
    sizes = {"intermediate_size": 64, "num_local_experts": 2, "head_dim": 32, "num_experts_per_tok": 1}
    model = made(transformers.GptOssConfig(**SIZES, **sizes))
    assert checkpoint_names(model) == {}
    with pytest.raises(mps.ExportError, match="checkpoints of the model keep its experts in one tensor; plan w16"):
        export.compressed_tensors(experts_plan(model, lambda block, number, part: "w4", "w8"), model)
    assert export.compressed_tensors(experts_plan(model, lambda block, number, part: "w16", "w8"), model)


def test_patterns_match_the_layers_of_their_block_alone():
    every = [f"a.{block}.experts.{number}.{part}" for block in (1, 10) for number in (0, 11) for part in ("w1", "w2")]
    pattern, *others = targets([*every[:4], every[4]], every)
    assert others == [every[4]]
    assert [name for name in every if re.match(pattern[3:], name)] == every[:4]
    assert targets(["experts.0.fc"], ["experts.0.fc"]) == ["experts.0.fc"]
    assert not re.match(targets(["experts.0.w1"], ["experts.0.w1"])[0][3:], "experts.0.act_fn")


def test_a_target_that_takes_experts_lets_them_be_decided_on():
    model = qwen()
    names = {layer.name for layer in mps.layers(model, TOKENS, target="gguf")}
    assert "model.layers.0.mlp.experts.2.down_proj" in names
    with pytest.warns(UserWarning, match=r"torchao has no name for"):
        left = {layer.name for layer in mps.layers(model, TOKENS, target="torchao")}
    assert not any("experts" in name for name in left)
