"""Memory of the key-value cache of a decoder."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError, TableError
from mpsearch.layer import Layer
from mpsearch.model import Batch, device_of, inputs_of, moved, preserved
from mpsearch.precision import Precision
from mpsearch.quantize import RoundToNearest, packed_bytes
from mpsearch.resources.resource import Resource


@dataclass(frozen=True)
class Cache:
    """Keys or values of one attention layer.

    Attributes:
        heads: that have keys and values of their own.
        size: numbers of a head for one token.
        window: tokens that are kept at most; None keeps all.
        dtype_bytes: of one number.
    """

    heads: int
    size: int
    window: int | None
    dtype_bytes: int

    def nbytes(self, precision: Precision, context: int, quantizer: object) -> float:
        """Bytes for one sequence; every head of every token has a scale of its own. nan where the format cannot hold a head."""
        tokens = context if self.window is None else min(context, self.window)
        try:
            one = packed_bytes(self.heads * self.size, self.heads, self.dtype_bytes, precision, quantizer)
        except EstimatorError:
            return math.nan
        return float(tokens * one)


@dataclass(frozen=True)
class KVCacheBytes:
    """Bytes of the keys and values of a whole context: tokens x batch x heads x head size x bytes, over all attention layers.

    Heads, sizes and sliding windows are read off the cache that the model really returns. Layers of kind `kv_cache` are decisions, keys
    and values of the first attention layer, then of the second, and so on; their weight format is that of the cache. Without them
    the caches are `fixed`, at the precisions given here.

    Attributes:
        context: tokens in the cache.
        batch: sequences at once.
        keys: precision of the keys where they are no decision.
        values: of the values.
        quantizer: tells the bytes of scales and zero-points.

    Raises:
        TableError: for a context or batch below 1.
    """

    context: int = 4096
    batch: int = 1
    keys: Precision = Precision("16")  # noqa: RUF009 frozen
    values: Precision = Precision("16")  # noqa: RUF009 frozen
    quantizer: object = RoundToNearest()

    def __post_init__(self) -> None:
        if self.context < 1 or self.batch < 1:
            raise TableError(
                f"a cache of {self.context} tokens x {self.batch} sequences, expected at least one of each"
            )

    def __call__(
        self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision], *, example: Batch
    ) -> Resource:
        """Count; see `Resource`. `reference` is the cache in the dtype of the model.

        Raises:
            TableError: where the model returns no cache, or some of its caches are decisions and some are not.
        """
        caches = caches_of(model, example)
        rows = [row for row, layer in enumerate(layers) if layer.kind == "kv_cache"]
        if rows and len(rows) != len(caches):
            raise TableError(
                f"{len(rows)} layers of kind kv_cache for {len(caches)} keys and values; decide all or none"
            )
        usage = np.zeros((len(layers), len(precisions)))
        for row, cache in zip(rows, caches, strict=False):
            usage[row] = [self._nbytes(cache, precision) for precision in precisions]
        own = [self.keys, self.values] * (len(caches) // 2)
        fixed = 0.0 if rows else sum(self._nbytes(cache, one) for cache, one in zip(caches, own, strict=True))
        return Resource(usage, fixed, sum(self._nbytes(cache, Precision("16")) for cache in caches))

    def _nbytes(self, cache: Cache, precision: Precision) -> float:
        return self.batch * cache.nbytes(precision, self.context, self.quantizer)


def caches_of(model: nn.Module, example: Batch) -> list[Cache]:
    """Keys and values of each attention layer, in order, from one run with the cache on.

    Raises:
        TableError: where the model (of transformers, or one that acts alike) returns none.
    """
    inputs = moved(inputs_of(example), device_of(model))
    with preserved(model), torch.no_grad():
        try:
            output = model(**inputs, use_cache=True) if isinstance(inputs, dict) else model(inputs, use_cache=True)
        except TypeError as error:
            raise TableError(f"kv_cache_bytes: {type(model).__name__} takes no use_cache=True ({error})") from None
    cache: Any = getattr(output, "past_key_values", None)
    parts = getattr(cache, "layers", cache)
    found = []
    for part in parts if parts is not None else ():
        keys, values = (part.keys, part.values) if hasattr(part, "keys") else part[:2]
        for tensor in (keys, values):
            if isinstance(tensor, Tensor) and tensor.ndim == 4:  # (batch, heads, tokens, size)
                window = getattr(part, "sliding_window", None)
                found.append(Cache(tensor.shape[1], tensor.shape[3], window, tensor.element_size()))
    if not found:
        raise TableError(f"kv_cache_bytes: {type(model).__name__} returns no keys and values under past_key_values")
    return found
