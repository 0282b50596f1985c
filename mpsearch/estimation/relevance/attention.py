"""Multi-head attention as the operations that it is made of."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mpsearch.errors import EstimatorError


def multi_head_attention(*args: Any, **keywords: Any) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`, of the same arguments, written out.

    Own code, since torch's hands itself over as one function, in which nothing can be seen of what holds relevance.

    Returns:
        (T, B, E) output, or (T, E) where the query is (T, E); and the weights of attention, (B, T, S) averaged over heads or
        (B, heads, T, S), or None where they are not wanted.

    Raises:
        EstimatorError: for keys or values that are given ready (`static_k`), which no module of torch does.

    >>> x = torch.arange(6.0).reshape(3, 1, 2)
    >>> arguments = (x, x, x, 2, 1, torch.eye(2).repeat(3, 1), None, None, None, False, 0.0, torch.eye(2), None)
    >>> ours, theirs = multi_head_attention(*arguments)[0], F.multi_head_attention_forward(*arguments)[0]
    >>> torch.allclose(ours, theirs)
    True
    """
    bound = inspect.signature(F.multi_head_attention_forward).bind(*args, **keywords)
    bound.apply_defaults()
    options = bound.arguments
    if options["static_k"] is not None or options["static_v"] is not None:
        raise EstimatorError("relevance has no rule for multi-head attention with static keys or values")
    heads = options["num_heads"]
    batched = options["query"].ndim == 3
    q, k, v = _projected(options, batched)
    (length, batch, width), sources = q.shape, k.shape[0]
    mask = _mask(options, batched, batch, sources, q.dtype)
    if options["bias_k"] is not None:
        k = torch.cat([k, options["bias_k"].repeat(1, batch, 1)])
        v = torch.cat([v, options["bias_v"].repeat(1, batch, 1)])
    q, k, v = (
        t.reshape(len(t), batch * heads, width // heads).transpose(0, 1) for t in (q, k, v)
    )  # (B heads, T, E / heads)
    if options["add_zero_attn"]:
        k, v = (torch.cat([t, t.new_zeros(len(t), 1, width // heads)], 1) for t in (k, v))
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[1] - sources))  # the further places are open to all
    dropout = options["dropout_p"] if options["training"] else 0.0
    shares = None
    if options["need_weights"]:
        q = q * math.sqrt(1.0 / q.shape[-1])
        scores = torch.bmm(q, k.transpose(1, 2)) if mask is None else torch.baddbmm(mask, q, k.transpose(1, 2))
        shares = torch.softmax(scores, -1)
        mixed = torch.bmm(F.dropout(shares, dropout) if dropout else shares, v)
        shares = shares.view(batch, heads, length, -1)
        if options["average_attn_weights"]:
            shares = shares.mean(1)
    else:
        q, k, v = (t.reshape(batch, heads, -1, width // heads) for t in (q, k, v))
        if mask is not None:
            mask = mask[None] if len(mask) == 1 else mask.reshape(batch, heads, -1, mask.shape[-1])
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout).reshape(batch * heads, length, -1)
    mixed = mixed.transpose(0, 1).reshape(length, batch, width)
    out = F.linear(mixed, options["out_proj_weight"], options["out_proj_bias"])
    if batched:
        return out, shares
    return out.squeeze(1), None if shares is None else shares.squeeze(0)


def _projected(options: dict[str, Any], batched: bool) -> tuple[Tensor, ...]:
    """(T, B, E) queries, keys and values."""
    whole, bias = options["in_proj_weight"], options["in_proj_bias"]
    x = query, key, value = options["query"], options["key"], options["value"]
    if not batched:
        x = query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    alike = options["query"] is options["key"] and options["key"] is options["value"]
    if alike and not options["use_separate_proj_weight"]:
        return F.linear(query, whole, bias).chunk(3, -1)
    weights = (
        whole.chunk(3) if not options["use_separate_proj_weight"] else [options[f"{t}_proj_weight"] for t in "qkv"]
    )
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return tuple(F.linear(*arguments) for arguments in zip(x, weights, biases, strict=True))


def _mask(options: dict[str, Any], batched: bool, batch: int, sources: int, dtype: torch.dtype) -> Tensor | None:
    """(1 or B heads, T or 1, S) numbers that are added to the scores; None where nothing is masked."""
    heads = options["num_heads"]
    mask, padding = _added(options["attn_mask"], dtype), _added(options["key_padding_mask"], dtype)
    if mask is not None and mask.ndim == 2:
        mask = mask[None]
    if padding is None:
        return mask
    padding = padding if batched else padding[None]
    padding = padding.view(batch, 1, 1, sources).expand(-1, heads, -1, -1).reshape(batch * heads, 1, sources)
    return padding if mask is None else mask + padding


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as numbers to add: -inf where a mask of booleans is true."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
