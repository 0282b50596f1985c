"""Multi-head attention written out against torch's, and rules of a user's own."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.estimation.relevance.attention import multi_head_attention
from mpsearch.estimation.relevance.propagation import Propagation
from mpsearch.estimation.relevance.rules import RULES, Operation, Settings

LENGTH, SOURCES, BATCH, WIDTH, HEADS = 5, 7, 3, 8, 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def later(length: int, sources: int) -> Tensor:
    return torch.ones(length, sources, dtype=torch.bool).triu(1)


def padded() -> Tensor:
    return torch.arange(SOURCES)[None] >= torch.tensor([[SOURCES], [4], [1]])


def arguments(alike: bool = True, batched: bool = True, **changes: Any) -> dict[str, Any]:
    """Arguments of `multi_head_attention_forward`."""
    query = draw(SOURCES if alike else LENGTH, BATCH, WIDTH)
    key, value = (query, query) if alike else (draw(SOURCES, BATCH, WIDTH, seed=1), draw(SOURCES, BATCH, WIDTH, seed=2))
    if not batched:
        query, key, value = (query[:, 0],) * 3 if alike else (query[:, 0], key[:, 0], value[:, 0])
    given: dict[str, Any] = {
        "query": query,
        "key": key,
        "value": value,
        "embed_dim_to_check": WIDTH,
        "num_heads": HEADS,
        "in_proj_weight": draw(3 * WIDTH, WIDTH, seed=3),
        "in_proj_bias": draw(3 * WIDTH, seed=4),
        "bias_k": None,
        "bias_v": None,
        "add_zero_attn": False,
        "dropout_p": 0.0,
        "out_proj_weight": draw(WIDTH, WIDTH, seed=5),
        "out_proj_bias": draw(WIDTH, seed=6),
    }
    return given | changes


SEPARATE = {
    "use_separate_proj_weight": True,
    "in_proj_weight": None,
    **{f"{part}_proj_weight": draw(WIDTH, WIDTH, seed=seed) for part, seed in (("q", 7), ("k", 8), ("v", 9))},
}
CASES: dict[str, dict[str, Any]] = {
    "self": arguments(),
    "cross": arguments(False),
    "unbatched": arguments(batched=False),
    "unbatched cross": arguments(False, False),
    "no biases": arguments(in_proj_bias=None, out_proj_bias=None),
    "separate": arguments(False, **SEPARATE),
    "causal": arguments(attn_mask=later(SOURCES, SOURCES), is_causal=True),
    "float mask of each head": arguments(attn_mask=draw(BATCH * HEADS, SOURCES, SOURCES, seed=10)),
    "padding": arguments(False, key_padding_mask=padded()),
    "padding and mask": arguments(False, key_padding_mask=padded(), attn_mask=later(LENGTH, SOURCES)),
    "unbatched padding": arguments(batched=False, key_padding_mask=padded()[1]),
    "further keys": arguments(bias_k=draw(1, 1, WIDTH, seed=11), bias_v=draw(1, 1, WIDTH, seed=12), add_zero_attn=True),
    "further keys, masked": arguments(
        bias_k=draw(1, 1, WIDTH, seed=11),
        bias_v=draw(1, 1, WIDTH, seed=12),
        add_zero_attn=True,
        attn_mask=later(SOURCES, SOURCES),
        key_padding_mask=padded(),
    ),
    "weights of each head": arguments(average_attn_weights=False),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_multi_head_attention(name: str, need_weights: bool) -> None:
    given = CASES[name] | {"need_weights": need_weights}
    (ours, shares), (theirs, expected) = multi_head_attention(**given), F.multi_head_attention_forward(**given)
    torch.testing.assert_close(ours, theirs)
    assert (shares is None) == (expected is None) == (not need_weights)
    if shares is not None:
        torch.testing.assert_close(shares, expected)


def test_dropout_where_it_trains() -> None:
    given = arguments(dropout_p=0.5)
    torch.manual_seed(0)
    ours = multi_head_attention(**given)[0]
    torch.manual_seed(0)
    torch.testing.assert_close(ours, F.multi_head_attention_forward(**given)[0])
    still = multi_head_attention(**given, training=False)[0]
    torch.testing.assert_close(still, F.multi_head_attention_forward(**given, training=False)[0])
    assert not torch.allclose(ours, still)


def test_every_argument_of_torch_is_read() -> None:
    """Torch takes no argument that is not among these: a new one would go unread."""
    known = {*arguments(), *SEPARATE, "training", "key_padding_mask", "need_weights", "attn_mask", "is_causal"}
    known |= {"static_k", "static_v", "average_attn_weights"}
    assert set(inspect.signature(F.multi_head_attention_forward).parameters) == known


def test_static_keys_are_refused() -> None:
    with pytest.raises(mps.EstimatorError, match="static keys"):
        multi_head_attention(**arguments(static_k=draw(BATCH * HEADS, SOURCES, WIDTH // HEADS)))


def test_a_rule_of_a_users_own() -> None:
    """`atan` has no rule; with one that halves what passes, half arrives."""

    def half(operation: Operation, settings: Settings) -> Any:
        x = operation.args[0]
        value = operation.plain().detach()
        return value + 0.5 * (x - x.detach()) * value / x.detach()

    layer = nn.Linear(3, 4, bias=False).double().requires_grad_(False)
    assert "atan" not in RULES

    def relevance(rules: Any) -> Tensor:
        x = draw(2, 3).requires_grad_()
        with Propagation(epsilon=1e-12, rules=rules):
            out = torch.atan(layer(x))
        (gradient,) = torch.autograd.grad(out.sum(), x)
        return (x * gradient).detach().sum(1)

    torch.testing.assert_close(relevance({"atan": half}), 0.5 * torch.atan(layer(draw(2, 3))).sum(1))
    with pytest.raises(mps.EstimatorError, match=r"no rule for torch\.atan"):
        relevance(None)
