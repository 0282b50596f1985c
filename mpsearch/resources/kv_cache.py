"""Memory of the key-value cache of a decoder."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError, TableError
from mpsearch.models.modules.kv_cache import KVCache
from mpsearch.models.running import Batch, call, preserved
from mpsearch.quantizers.packing import ScaleLayout, packed_bytes
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources.resource import Resource, ResourceCapabilities


@dataclass(frozen=True)
class Cache:
    """What one run puts into a cache of keys or values.

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

    def nbytes(self, precision: Precision, context: int, quantizer: ScaleLayout) -> float:
        """Bytes for one sequence; every head of every token has a scale of its own. nan where the format cannot hold a head."""
        tokens = context if self.window is None else min(context, self.window)
        try:
            token = packed_bytes(self.heads * self.size, self.heads, self.dtype_bytes, precision, quantizer)
        except EstimatorError:
            return math.nan
        return float(tokens * token)


@dataclass(frozen=True)
class KVCacheBytes:
    """Bytes of the keys and values of a whole context: tokens x batch x heads x head size x bytes, over all attention layers.

    Heads, sizes and sliding windows are those of the tensors that the example really puts into the caches. Keys and values that
    `layers(..., kv_cache=True)` makes decisions cost what their weight format does; the others are `fixed`, at the precisions given here.
    The cache of an encoder's output, as Whisper's decoder has, counts as a whole context too.

    Attributes:
        context: tokens in the cache.
        batch: sequences at once.
        keys: precision of the keys (modules named `k...`) where they are no decision.
        values: of the values.
        quantizer: tells the bytes of scales and zero-points.

    Raises:
        TableError: for a context or batch below 1.

    100 tokens of 2 heads of 8 numbers: 4 bytes each, or half a byte each and a scale of 4 bytes a head:

    >>> from mpsearch import precisions
    >>> model, keys = nn.Sequential(KVCache()), torch.ones(1, 2, 5, 8)
    >>> KVCacheBytes(100)(model, [Layer("0", "kv_cache")], precisions("w16 w4"), example=keys).usage
    array([[6400., 1600.]])
    """

    capabilities: ClassVar[ResourceCapabilities] = ResourceCapabilities(
        unit="bytes",
        column="kv_cache_bytes",
        example=True,
        quantizer=True,
        on_meta=True,
        monotone=True,
        reference="plan",
    )

    context: int = 4096
    batch: int = 1
    keys: Precision = Precision("16")  # noqa: RUF009 frozen
    values: Precision = Precision("16")  # noqa: RUF009 frozen
    quantizer: ScaleLayout = RoundToNearest()  # noqa: RUF009 frozen

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
            TableError: where the example fills no cache.
        """
        caches = caches_of(model, example)
        usage = np.zeros((len(layers), len(precisions)))
        for row, layer in enumerate(layers):
            usage[row] = [self._nbytes(caches.get(layer.name, []), precision) for precision in precisions]
        decided = {layer.name for layer in layers}
        fixed = sum(
            self._nbytes(fills, self.keys if name.rpartition(".")[2].startswith("k") else self.values)
            for name, fills in caches.items()
            if name not in decided
        )
        return Resource(usage, fixed, sum(self._nbytes(fills, Precision("16")) for fills in caches.values()))

    def _nbytes(self, caches: Sequence[Cache], precision: Precision) -> float:
        return self.batch * math.fsum(cache.nbytes(precision, self.context, self.quantizer) for cache in caches)


def caches_of(model: nn.Module, example: Batch) -> dict[str, list[Cache]]:
    """What one run of the example puts into each cache of keys or values, one entry a call, by name.

    Raises:
        TableError: where there is none.
    """
    caches: dict[str, list[Cache]] = {}

    def watch(name: str) -> Callable[[KVCache, tuple[Any, ...], Tensor], None]:
        def see(module: KVCache, _args: tuple[Any, ...], x: Tensor) -> None:
            if x.ndim != 4:
                raise TableError(f"cache {name!r} is given {tuple(x.shape)}, expected (batch, heads, tokens, size)")
            _, heads, _, size = x.shape
            caches.setdefault(name, []).append(Cache(heads, size, module.window, x.element_size()))

        return see

    with preserved(model), torch.no_grad():
        modules = {name: module for name, module in model.named_modules() if isinstance(module, KVCache)}
        handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
        try:
            call(model, example)
        finally:
            for handle in handles:
                handle.remove()
    if not caches:
        raise TableError(
            f"kv_cache_bytes: the example fills no cache: {type(model).__name__} has neither attention of transformers that keeps keys "
            "and values, nor modules mpsearch.KVCache that they go through"
        )
    return caches
