"""What the suites of several seams are run over."""

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    """A tiny one of transformers, for gguf, which asks the model of its heads and sizes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).eval()
        return model
