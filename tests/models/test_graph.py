"""What the trace sees, against models whose flow is known from how they are written."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.decisions.grouping import connected
from mpsearch.models.graph import trace


def traced(model, *shape):
    named = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return trace(model, named, torch.randn(*shape), lambda *_: None)


def pairs(found):
    return {"".join(sorted(pair)) for pair in found}


class Linears(nn.Module):
    def __init__(self, names, size=4):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(size, size))


class ByHand(Linears):
    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class InOne(Linears):
    def forward(self, x):
        q, k, v = (f(x)[:, None] for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v)[:, 0])


def test_queries_keys_and_values_meet_in_products():
    for model in (ByHand("qkvo"), InOne("qkvo")):
        flow = traced(model, 2, 3, 4)
        assert flow.reads["q"] == flow.reads["k"] == flow.reads["v"] != flow.reads["o"]
        assert connected("qkvo", flow.multiplied) == [("q", "k", "v")]
        assert not flow.added


class Residual(Linears):
    def forward(self, x):
        x = self.a(x)
        x = x + self.b(F.relu(x))
        x += self.c(x)
        return self.d(x)


def test_operands_of_residual_sums():
    flow = traced(Residual("abcd"), 2, 4)
    assert connected("abcd", flow.added) == [("a", "b", "c")]
    assert not flow.multiplied


class Heads(Linears):
    def forward(self, x):
        return self.a(x) + 1, self.b(x) * 2


def test_heads_read_the_same_and_never_meet():
    flow = traced(Heads("ab"), 2, 4)
    assert flow.reads["a"] == flow.reads["b"]
    assert not flow.multiplied
    assert not flow.added


class Rewritten(Linears):
    def forward(self, x):
        x = x * 1
        a = self.a(x)
        x.add_(1)
        return a * self.b(x) * self.c(x[..., :4].reshape(-1, 4))


def test_memory_written_in_between_is_another_tensor():
    flow = traced(Rewritten("abc"), 2, 4)
    assert flow.reads["a"] != flow.reads["b"]


class Reused(Linears):
    def forward(self, x):
        total = 0
        for name in ("a", "b", "c"):
            fresh = x * 2  # freed at the end of each turn: its memory may be given out again
            total = total + getattr(self, name)(fresh)
            del fresh
        return total


def test_memory_given_out_again_is_another_tensor():
    flow = traced(Reused("abc"), 512, 4)
    assert len({tuple(flow.reads[name]) for name in "abc"}) == 3


class Twice(Linears):
    def forward(self, x):
        return self.a(x) * self.b(x) + self.a(x + 1)


def test_every_call_is_told():
    flow = traced(Twice("ab"), 2, 4)
    assert len(flow.reads["a"]) == 2
    assert flow.reads["a"][:1] == flow.reads["b"]


def test_hooks_are_gone_also_after_a_failure():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 4))
    with pytest.raises(mps.EstimatorError, match="shape"):
        traced(model, 1, 3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)


def test_layers_that_meet_are_paired_in_a_number_that_grows_as_the_layers():
    """Products along a residual connection, a norm of it and a mixture of experts, once paired all layers before them."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.gate, self.up, self.down = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            h = x * x.square().mean(-1, keepdim=True).rsqrt()
            return x + self.down(self.gate(h).sigmoid() * self.up(h))

    def pairs_of(blocks):
        model = nn.Sequential(*(Block() for _ in range(blocks)))
        flow = trace(
            model,
            {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)},
            torch.randn(2, 4),
            lambda *_: None,
        )
        assert {frozenset((f"{n}.gate", f"{n}.up")) for n in range(blocks)} == flow.multiplied
        downs = [f"{n}.down" for n in range(blocks)]
        assert connected(list(flow.reads), flow.added) == [tuple(downs)]
        return len(flow.multiplied) + len(flow.added)

    assert pairs_of(24) <= 2 * pairs_of(12) + 1
