"""A small Llama-like model with the names of the real one."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import mpsearch as mps
from mpsearch.models.modules.decomposing import decomposed

HIDDEN, INNER, HEADS, VOCABULARY = 64, 128, 4, 96


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(HIDDEN, HIDDEN, bias=False))

    def forward(self, x):
        heads = [f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x):
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(HIDDEN)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(HIDDEN)
        self.mlp = MLP()

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.model.layers = nn.ModuleList(Block() for _ in range(2))
        self.model.norm = nn.RMSNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens):
        x = self.model.embed_tokens(tokens)
        for block in self.model.layers:
            x = block(x)
        return self.lm_head(self.model.norm(x))


@pytest.fixture
def llama():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Llama().eval()


@pytest.fixture
def plan_of():
    """A plan of text: `plan_of(q_proj="w4g32")` gives every layer whose name ends so that precision."""

    def make(model, **precisions):
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
        chosen = {name: precisions.get(name.rpartition(".")[2]) for name in names}
        return mps.Plan({name: mps.Precision.parse(text) for name, text in chosen.items() if text})

    return make


@pytest.fixture
def transformers_llama():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()


@pytest.fixture
def transformers_mixtral():
    """Its experts lie in two tensors a block."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "num_local_experts": 2, "num_experts_per_tok": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=64, **sizes)).eval()


@pytest.fixture
def experts_plan():
    """A plan of text: `experts_plan(model, text, others)` asks `text(block, number, part)` of every layer of an expert."""

    def make(model, text, others):
        with decomposed(model):
            names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
        chosen = dict.fromkeys(names, others)
        for name in names:
            if "experts" in name:
                _, _, block, *_, number, part = name.split(".")
                chosen[name] = text(int(block), int(number), part)
        return mps.Plan({name: mps.Precision.parse(precision) for name, precision in chosen.items() if precision})

    return make


@pytest.fixture
def llama_cpp(monkeypatch):
    pytest.importorskip("xllamacpp")
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    if not benchmarks.is_dir():
        pytest.skip("needs a checkout, not an installed package")
    monkeypatch.syspath_prepend(str(benchmarks))
    return importlib.import_module("llama_cpp")


@pytest.fixture
def torchvision_operators(monkeypatch):
    """What torchvision asks for on import: its compiled part is for another build of PyTorch."""
    peers = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"
    if not peers.is_dir():
        pytest.skip("needs a checkout, not an installed package")
    monkeypatch.syspath_prepend(str(peers))
    importlib.import_module("torchvision_operators")
