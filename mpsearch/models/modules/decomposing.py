"""Layers that lie inside larger modules, as modules of their own for as long as the search looks at a model."""

import contextlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mpsearch.models.modules.kv_cache import with_caches
from mpsearch.models.modules.weights import kind_of

#: Hooks that compute a weight anew before each call.
_RECOMPUTED = (WeightNorm, SpectralNorm, BasePruningMethod)


@contextlib.contextmanager
def decomposed(model: nn.Module) -> Iterator[None]:
    """Inside, every weight that can be decided on is the `weight` of a module that is really called.

    - `nn.MultiheadAttention` has the linear layers `q_proj`, `k_proj`, `v_proj`, `out_proj` instead of `in_proj_weight`.
    - Experts of transformers in two tensors of shape (experts, out, in) are linear layers `0.gate_up_proj`, `0.down_proj`,
      `1.gate_up_proj`, ...
    - A parametrized, weight-normed, spectral-normed or pruned layer has the weight that comes out, as it will be stored; an embedding
      with `max_norm` has its rows at that norm.
    - Keys and values go through the modules `k_cache` and `v_cache` of attention of transformers (`mpsearch.models.modules.kv_cache`).

    The new weights are views of the model's own, but for those that are computed. Outputs are the same up to rounding. Outside, the
    modules are those that they were. The model itself is never replaced, only modules in it.

    >>> model = nn.Sequential(nn.MultiheadAttention(4, 2))
    >>> with decomposed(model):
    ...     [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ['0.q_proj', '0.k_proj', '0.v_proj', '0.out_proj']
    >>> type(model[0]).__name__
    'MultiheadAttention'
    """
    places: list[tuple[nn.Module, str, nn.Module]] = []
    replacements: dict[nn.Module, nn.Module | None] = {}
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        for parent in list(model.modules()):
            for key, child in parent._modules.items():
                if child is None:
                    continue
                if child not in replacements:
                    replacements[child] = _replacement(child)
                new = replacements[child]
                if new is not None:
                    places.append((parent, key, child))
                    parent._modules[key] = new
        if places:
            torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the modules that hold them
        with with_caches(model):
            yield
    finally:
        for parent, key, child in places:
            parent._modules[key] = child
        torch.backends.mha.set_fastpath_enabled(fast)


def _replacement(module: nn.Module) -> nn.Module | None:
    """The module that stands in for another; None where that can stay."""
    if isinstance(module, StandIn):
        return None
    if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn:
        return _Attention(module)
    if _holds_experts(module):
        return _Experts(module)
    return _plain(module)


@dataclass(frozen=True, eq=False)
class View:
    """A parameter of a layer inside a stand-in, which is a part of a parameter of the original.

    Attributes:
        layer: that holds it.
        name: of it in the layer.
        of: name of the parameter of the original.
        start: first index of the part, along the first dimension.
        stop: behind its last one.
        matrix: the part is one matrix, or vector, of a stack.
        transposed: it is transposed.
    """

    layer: nn.Module
    name: str
    of: str
    start: int
    stop: int
    matrix: bool = False
    transposed: bool = False

    def laid_out(self, part: Tensor) -> Tensor:
        """The parameter, from the rows of the original's."""
        part = part[0] if self.matrix else part
        return part.T if self.transposed else part


class StandIn(nn.Module):
    """A module in the place of another: its hooks and attributes are those of the other.

    Attributes:
        original: the other.
        views: its parameters as they lie in the layers of this one.
    """

    original: nn.Module
    views: list[View]

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.__dict__["views"] = []
        self.__dict__["original"] = original  # no child: the weights would occur twice
        self.train(original.training)
        for hooks in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
        ):
            self.__dict__[hooks] = original.__dict__[hooks]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


class _Attention(StandIn):
    """`nn.MultiheadAttention` by linear layers."""

    def __init__(self, original: nn.MultiheadAttention) -> None:
        super().__init__(original)
        fused = original._qkv_same_embed_dim
        size = original.embed_dim
        for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
            rows = slice(number * size, (number + 1) * size)
            of = "in_proj_weight" if fused else f"{name}_weight"
            weight, bias = getattr(original, of), original.in_proj_bias
            layer = _linear(weight.detach()[rows] if fused else weight, None if bias is None else bias.detach()[rows])
            self.add_module(name, layer)
            self.views.append(View(layer, "weight", of, *((rows.start, rows.stop) if fused else (0, len(weight)))))
            if bias is not None:
                self.views.append(View(layer, "bias", "in_proj_bias", rows.start, rows.stop))
        self.out_proj = original.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`; `is_causal` is a hint that changes nothing, since a mask comes with it."""
        single = query.ndim == 2
        if single:
            axis = 0 if self.batch_first else 1
            query, key, value = (x.unsqueeze(axis) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        heads = [self._heads(x) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value))]
        q, k, v = heads
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        for mask in (self._mask(attn_mask, q), None if key_padding_mask is None else key_padding_mask[:, None, None]):
            if mask is not None:
                scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        attention = scores.softmax(-1)
        mixed = (attention @ v).transpose(1, 2).flatten(2)  # (N, L, E)
        output = self.out_proj(mixed if self.batch_first else mixed.transpose(0, 1))
        weights = None
        if need_weights:
            weights = attention.mean(1) if average_attn_weights else attention
        if single:
            output, weights = output.squeeze(axis), None if weights is None else weights[0]
        return output, weights

    def _heads(self, x: Tensor) -> Tensor:
        """(N, heads, L, head_dim)."""
        x = x if self.batch_first else x.transpose(0, 1)
        heads: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2)

    def _mask(self, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """A mask of (L, S), or of (N heads, L, S), to go with (N, heads, L, S)."""
        return mask.unflatten(0, q.shape[:2]) if mask is not None and mask.ndim == 3 else mask


def _holds_experts(module: nn.Module) -> bool:
    """True for the experts of transformers 5, which `use_experts_implementation` has marked."""
    weight: Any = getattr(module, "down_proj", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.ndim == 3
        and hasattr(module, "is_transposed")
        and hasattr(module, "_apply_gate")
        and not getattr(module, "has_post_expert_norm", False)
        and not getattr(module, "_is_expert_parallel", False)
    )


class _Experts(StandIn):
    """Experts, each with linear layers of its own; one without tokens is not called."""

    def __init__(self, original: Any) -> None:
        super().__init__(original)
        self._names = ("gate_up_proj" if original.has_gate else "up_proj", "down_proj")
        for number in range(len(original.down_proj)):
            self.add_module(str(number), nn.Module())
        for name in self._names:
            biases = getattr(original, f"{name}_bias").detach() if original.has_bias else [None] * len(self._modules)
            matrices = zip(self.children(), getattr(original, name).detach(), biases, strict=True)
            for number, (expert, weight, bias) in enumerate(matrices):
                layer = _linear(weight.T if original.is_transposed else weight, bias)
                expert.add_module(name, layer)
                place = (number, number + 1, True)
                self.views.append(View(layer, "weight", name, *place, transposed=original.is_transposed))
                if bias is not None:
                    self.views.append(View(layer, "bias", f"{name}_bias", *place))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum over each token's experts of weight x output.

        Args:
            hidden_states: (tokens, hidden).
            top_k_index: (tokens, k) experts of each token.
            top_k_weights: (tokens, k) their weights.
        """
        total = torch.zeros_like(hidden_states)
        order = top_k_index.flatten().argsort(stable=True)
        counts = self._tokens(top_k_index)
        numbers, weights = (order // top_k_index.shape[1]).split(counts), top_k_weights.flatten()[order].split(counts)
        expert: Any
        for expert, tokens, weight in zip(self.children(), numbers, weights, strict=True):
            if not len(tokens):
                continue
            inner = getattr(expert, self._names[0])(hidden_states[tokens])
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            output = expert.down_proj(inner) * weight[:, None]
            total = total.index_add(0, tokens, output.to(total.dtype))
        return total

    def _tokens(self, top_k_index: Tensor) -> list[int]:
        """How many each expert is given; without values to tell, an equal share."""
        number = len(self._modules)
        if top_k_index.is_meta:
            share, rest = divmod(top_k_index.numel(), number)
            return [share + (place < rest) for place in range(number)]
        counts: list[int] = top_k_index.flatten().bincount(minlength=number).tolist()
        return counts


def _plain(module: nn.Module) -> nn.Module | None:
    """A copy of a layer whose parameter is the weight that it computes with; None for a module whose parameter is that already."""
    hooks = {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _RECOMPUTED)}
    values: dict[str, Tensor] = {}
    inner: set[str] = set()
    cls = type(module)
    with torch.no_grad():
        if parametrize.is_parametrized(module):
            parametrized: Any = module.parametrizations
            values = {name: getattr(module, name) for name in parametrized}
            cls = cls.__bases__[0]
        for hook in hooks.values():
            name, value = _recomputed(hook, module)
            values[name] = value
            inner |= {f"{name}_{part}" for part in ("g", "v", "u", "orig", "mask")}
        clipped = _clipped(module)
        if clipped is not None:
            values["weight"] = clipped
    if not values:
        return None
    new = cls.__new__(cls)
    state = {key: value for key, value in vars(module).items() if key not in values}
    state["_modules"] = {key: child for key, child in module._modules.items() if key != "parametrizations"}
    state["_buffers"] = {key: buffer for key, buffer in module._buffers.items() if key not in inner}
    state["_parameters"] = {key: parameter for key, parameter in module._parameters.items() if key not in inner}
    state["_parameters"] |= {name: nn.Parameter(value.detach().clone()) for name, value in values.items()}
    others = [(key, hook) for key, hook in module._forward_pre_hooks.items() if key not in hooks]
    state["_forward_pre_hooks"] = OrderedDict(others)
    if clipped is not None:
        state["max_norm"] = None  # its forward would write into the weight
    new.__dict__ = state
    return None if clipped is None and kind_of(new) is None else new


def _clipped(module: nn.Module) -> Tensor | None:
    """The weight of an embedding with the rows at `max_norm` that are beyond it; None where there is no such limit."""
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.max_norm is None:
        return None
    return torch.renorm(module.weight, module.norm_type, 0, module.max_norm)


def _recomputed(hook: Any, module: nn.Module) -> tuple[str, Tensor]:
    """Name and value of the weight that a hook computes before each call in evaluation mode."""
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name, hook.apply_mask(module)
    settings = {"do_power_iteration": False} if isinstance(hook, SpectralNorm) else {}
    return hook.name, hook.compute_weight(module, **settings)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer around existing tensors, which are not copied."""
    layer = nn.Linear.__new__(nn.Linear)  # which makes no weight of its own: of thousands of experts that takes seconds
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach())
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return layer
