"""GGUF, written and read back by its own library, and the options of llama-quantize."""

import re

import numpy as np
import pytest
import torch

import mpsearch as mps
from mpsearch import export
from mpsearch.quantizers import ggml
from mpsearch.quantizers.rounding import RoundToNearest

library = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TYPES = [
    "q2_k",
    "q3_k",
    "q4_k",
    "q5_k",
    "q6_k",
    "iq4_xs",
    "tq1_0",
    "tq2_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q8_0",
    "iq4_nl",
]


@pytest.fixture
def model():
    return make()


def make(**changes):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes})).eval()


def every_type(model):
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:-1]
    plan = {name: mps.Precision(TYPES[i % len(TYPES)]) for i, name in enumerate(names)}
    return mps.Plan({**plan, "model.embed_tokens": mps.Precision("fp16"), "lm_head": mps.Precision("16")})


def test_every_type_in_one_file(model):
    plan = every_type(model)
    assert {precision.weight for precision in plan.values()} == {*TYPES, "fp16", "16"}
    found = export.verify(plan, model, "gguf")
    assert {check.name: check.precision for check in found.layers} == {n: p for n, p in plan.items() if n != "lm_head"}


def test_bytes_and_values_by_the_library(model, tmp_path):
    """Bits per weight by the published table, values by the library's dequantizer."""
    plan = every_type(model)
    types = export.gguf(plan, model, path=tmp_path / "model.gguf")
    bpw = {
        "Q2_K": 2.625,
        "Q3_K": 3.4375,
        "Q4_K": 4.5,
        "Q5_K": 5.5,
        "Q6_K": 6.5625,
        "Q8_0": 8.5,
        "Q4_0": 4.5,
        "Q4_1": 5.0,
    }
    bpw |= {
        "Q5_0": 5.5,
        "Q5_1": 6.0,
        "IQ4_NL": 4.5,
        "IQ4_XS": 4.25,
        "TQ1_0": 1.6875,
        "TQ2_0": 2.0625,
        "F16": 16,
        "F32": 32,
    }
    tensors = {tensor.name: tensor for tensor in library.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {name: tensor.tensor_type.name for name, tensor in tensors.items()} == types
    for tensor in tensors.values():
        assert tensor.n_bytes * 8 == bpw[tensor.tensor_type.name] * tensor.n_elements
    down = tensors["blk.1.ffn_down.weight"]
    expected = RoundToNearest()(
        model.model.layers[1].mlp.down_proj.weight.detach(), plan["model.layers.1.mlp.down_proj"]
    )
    np.testing.assert_allclose(library.dequantize(down.data, down.tensor_type), expected.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_file_and_computes_the_predicted_outputs(tmp_path, tied):
    model = make(tie_word_embeddings=tied)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:-1]
    plan = mps.Plan({name: mps.Precision("q6_k" if "mlp" in name else "q8_0") for name in names})
    if tied:
        plan = mps.Plan({**plan, "model.embed_tokens": mps.Precision("q8_0"), "lm_head": mps.Precision("q8_0")})
        assert len(export.verify(plan, model, "gguf").layers) == len(plan)
    export.gguf(plan, model, path=tmp_path / "model.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        for name, precision in plan.items():
            if name != "lm_head":
                weight = model.get_submodule(name).weight
                weight.copy_(RoundToNearest()(weight, precision))
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_llama_cpp_runs_the_file(llama_cpp, tmp_path):
    """Its kernels round inputs to 8 bits and keys and values to 16: near, and nearer to the plan than to the model."""
    model = make(
        num_attention_heads=4, num_key_value_heads=2, rope_parameters={"rope_type": "default", "rope_theta": 500.0}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that rotations and rounding matter
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    plan = mps.Plan({name: mps.Precision("q2_k") for name in every_type(model) if "layers" in name})
    export.gguf(plan, model, path=tmp_path / "model.gguf")
    plain = model(tokens).logits.detach()
    with torch.no_grad():
        for name, precision in plan.items():
            weight = model.get_submodule(name).weight
            weight.copy_(RoundToNearest()(weight, precision))
    planned = model(tokens).logits.detach()
    real = llama_cpp.LlamaCpp(tmp_path / "model.gguf", 64)
    found = real(tokens)
    real.close()
    assert (found - planned).norm() < 0.1 * planned.norm()
    assert (found - planned).norm() < 0.3 * (plain - planned).norm()


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_are_those_of_ggml(llama_cpp, kind):
    """K and IQ4 types search scales: sums in another order choose another scale in few blocks, and do no worse."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    own, theirs = ggml.quantize(weight, kind), llama_cpp.quantized(weight, kind)
    size = ggml.TYPES[kind].nbytes
    same = (own == theirs).reshape(-1, size).all(1).double().mean()
    assert same == 1 if kind[-1] in "01" else same > 0.9
    errors = [(ggml.dequantize(part, kind) - weight).square().sum() for part in (own, theirs)]
    assert errors[0] <= errors[1] * 1.001


def test_what_llama_cpp_would_replace_is_refused():
    """On a width that 256 does not divide it takes another type, with a line in its log."""
    model = make(hidden_size=128, num_hidden_layers=1)
    plan = mps.Plan({"model.layers.0.self_attn.o_proj": mps.Precision("q4_k")})
    with pytest.raises(mps.ExportError, match="needs columns in multiples of 256, the weight has 128"):
        export.gguf(plan, model)
    with pytest.raises(mps.ExportError, match="multiples of 256"):
        export.llama_quantize(plan, model)
    with pytest.warns(UserWarning, match="o_proj: wq4_k -> w(q4_0|iq4_nl)"):
        assert export.gguf(plan, model, snap=True)["blk.0.attn_output.weight"] in ("Q4_0", "IQ4_NL")


def test_it_needs_a_config_and_known_tensors(llama):
    plan = mps.Plan({"lm_head": mps.Precision("q8_0")})
    with pytest.raises(mps.ExportError, match=r"model.config tells heads"):
        export.gguf(plan, llama)
    with pytest.raises(mps.ExportError, match="gguf needs the model"):
        export.gguf(plan)
    with pytest.raises(mps.ExportError, match="has no tensor for"):
        export.gguf(plan, make(attention_bias=True))
    with pytest.raises(mps.ExportError, match="knows no architecture 'lama'"):
        export.gguf(plan, make(), architecture="lama")


def test_llama_quantize_options_match_one_tensor_each(tmp_path):
    model = make(num_hidden_layers=11)  # blk.1 is the start of blk.10
    plan = every_type(model)
    options = export.llama_quantize(plan, model, path=tmp_path / "types.txt")
    assert options[-1] == "Q8_0"
    assert set(options[:-1:2]) == {"--tensor-type"}
    lines = options[1:-1:2]
    assert (tmp_path / "types.txt").read_text().splitlines() == lines
    patterns = [line.rpartition("=")[::2] for line in lines]
    for layer, kind in export.gguf(plan, model).items():
        found = [
            kind for pattern, kind in patterns if re.search(pattern, layer)
        ]  # as llama.cpp searches, first one wins
        if "norm" in layer:
            assert found == []
        else:
            assert found == [{"F32": "f16"}.get(kind, kind.lower())]


def test_llama_quantize_refuses_names_it_would_ignore():
    with pytest.raises(mps.ExportError, match=r"no tensor for 'model.layers.0.attn.qkv'"):
        export.llama_quantize(mps.Plan({"model.layers.0.attn.qkv": mps.Precision("q4_k")}))
    with pytest.raises(mps.ExportError, match="takes weights of q2_k"):
        export.llama_quantize(mps.Plan({"lm_head": mps.Precision("4")}))
