"""Opening a model is linear in its modules: steps of Python are counted, function by function, at one size and at twice that."""

import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.calibration.deciding import unscored
from mpsearch.models.graph import trace

PACKAGE = str(Path(mps.__file__).parent)


class Gated(nn.Module):
    """Two layers that read the same and write to the residual stream: all of them meet there."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.gate, self.up = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.norm(x)
        return x + self.gate(h).sigmoid() + self.up(h)


def stack(number):
    return nn.Sequential(*(Gated() for _ in range(number))), torch.randn(2, 4)


def slices_of_one_tensor(number):
    weights = torch.randn(number, 4, 4)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(number)))
    for layer, weight in zip(model, weights, strict=True):
        layer.weight = nn.Parameter(weight)
    return model, torch.randn(2, 4)


def mixture(blocks, experts):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "moe_intermediate_size": 4, "head_dim": 4, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_experts_per_tok": 4}
    config = transformers.Qwen3MoeConfig(**sizes, **heads, num_hidden_layers=blocks, num_experts=experts)
    return transformers.Qwen3MoeForCausalLM(config).eval(), {"input_ids": torch.arange(48)[None]}


def steps(function, *args, **keywords):
    """Lines of the package that run, by function; a turn of a loop within a line is one too."""
    counts = Counter()
    before = sys.gettrace()

    def seen(frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE):
            return None
        counts[f"{Path(code.co_filename).name}:{code.co_name}"] += 1
        return seen

    sys.settrace(seen)
    try:
        function(*args, **keywords)
    finally:
        sys.settrace(before)
    return counts


def opened(model, example, **settings):
    layers = mps.layers(model, example, **settings)
    return unscored(model, example, mps.precisions("w4 w8"), layers)


SIZES = {
    "depth": (lambda n: stack(4 * n), {}),
    "depth, fused": (lambda n: stack(4 * n), {"groups": "fused"}),
    "depth, residuals tied": (lambda n: stack(4 * n), {"tie_residuals": True}),
    "one memory": (lambda n: slices_of_one_tensor(10 * n), {}),
    "excluded": (lambda n: slices_of_one_tensor(10 * n), {"exclude": ["[1-9]*"]}),
    "blocks of experts": (lambda n: mixture(n, 8), {"groups": "fused"}),
    "experts of a block": (lambda n: mixture(1, 8 * n), {"groups": "fused"}),
    "experts of a block, as one": (lambda n: mixture(1, 8 * n), {"experts": "block"}),
    "experts in a target": (lambda n: mixture(1, 8 * n), {"target": "compressed-tensors"}),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.filterwarnings("ignore")
def test_twice_the_modules_take_twice_the_steps(size):
    make, settings = SIZES[size]
    opened(*make(1), **settings)  # what is done once in a process
    small, large = (steps(opened, *make(n), **settings) for n in (2, 4))
    grown = {name: (small[name], count) for name, count in large.items() if count > 2.2 * small[name] + 100}
    assert not grown
    assert large.total() < 2.1 * small.total()


def test_a_deep_stack_takes_memory_as_its_layers():
    """Names of all layers that wrote to the residual stream, kept for each step of it, once took 216 MB at 1,280 layers."""

    def peak_bytes(number):
        model, x = stack(number)
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        tracemalloc.start()
        try:
            trace(model, linear, x, lambda *_: None)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(2)
    assert peak_bytes(800) < 5 * peak_bytes(200)
