"""Keys and values on their way into the cache of a decoder, each in a module of its own, so that they can be decided on."""

import contextlib
import copy
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class KVCache(nn.Module):
    """Keys or values of one attention layer, as they are stored: (batch, heads, tokens, size). It returns its input.

    A decision without a weight: at a precision such as `w4`, each head of each token is quantized to the weight format, with scales of
    its own (of groups along its numbers with `w4g32`) taken on the spot; an activation format says nothing of it. Attention of
    transformers gets such modules for as long as the search looks (`with_caches`); a model of one's own has them in place:

        keys, values = self.k_cache(keys), self.v_cache(values)

    Attributes:
        window: most tokens that are stored; None: all.
        weight: of no elements, and not part of the state: nothing of a cache is stored with the model.
    """

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.__dict__["weight"] = nn.Parameter(torch.empty(0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The input, unchanged: (batch, heads, tokens, size)."""
        return x


@contextlib.contextmanager
def with_caches(model: nn.Module) -> Iterator[None]:
    """Inside, what attention of transformers puts into its cache goes through its modules `k_cache` and `v_cache`.

    These are after rotation by position, and also where the model is run without a cache; DeepSeek's attention stores two latent tensors
    instead, in the same two places.
    """
    attention = {module: place for module in model.modules() if (place := _cache_argument(module)) is not None}
    inner = {
        module: place for module, place in attention.items() if attention.keys().isdisjoint(list(module.modules())[1:])
    }
    handles = []
    try:
        for module, place in inner.items():
            window = _window(module)
            module.add_module("k_cache", KVCache(window))
            module.add_module("v_cache", KVCache(window))
            enter = functools.partial(_enter, argument=place)
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in inner:
            module._modules.pop("k_cache", None)
            module._modules.pop("v_cache", None)


def _cache_argument(module: nn.Module) -> tuple[int, str] | None:
    """Place and name of the cache among the arguments of attention of transformers 5; None of other modules, and once prepared.

    The arguments are those of the class's own `forward`: a re-run puts another one into the module. The name is `cache` from
    transformers 5.24 on.
    """
    if (
        getattr(module, "layer_idx", None) is None
        or not hasattr(getattr(module, "config", None), "get_text_config")
        or "k_cache" in module._modules
    ):
        return None
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return next(
        ((names.index(name), name) for name in ("past_key_values", "cache", "layer_past") if name in names), None
    )


def _window(module: Any) -> int | None:
    """Most tokens that the cache of an attention layer stores; None: all."""
    layers = _empty_cache(config=module.config).layers
    return getattr(layers[module.layer_idx], "sliding_window", None) if module.layer_idx < len(layers) else None


def _empty_cache(**settings: Any) -> Any:
    """A cache of transformers, which is there where its attention is."""
    return importlib.import_module("transformers").DynamicCache(**settings)


def _enter(
    module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], argument: tuple[int, str]
) -> tuple[Any, ...]:
    """The arguments of attention with its cache, which is `argument`, behind the two modules."""
    place, name = argument
    cache = args[place] if place < len(args) else keywords.get(name)
    if cache is None and getattr(module, "is_causal", False):
        cache = _empty_cache()
    if not hasattr(cache, "update"):  # an encoder has none
        return args, keywords
    if place < len(args):
        return (*args[:place], _through(module, cache), *args[place + 1 :]), keywords
    return args, {**keywords, name: _through(module, cache)}


def _through(module: Any, cache: Any) -> Any:
    """A cache with the contents of another, which everything enters through the modules."""
    wrapped = copy.copy(cache)
    if hasattr(cache, "self_attention_cache"):
        wrapped.self_attention_cache = _through(module, cache.self_attention_cache)
        wrapped.cross_attention_cache = _through(module, cache.cross_attention_cache)
    else:
        wrapped.update = lambda keys, values, *rest, **more: cache.update(
            module.k_cache(keys), module.v_cache(values), *rest, **more
        )
    return wrapped
