"""Which layers read the same tensor, and where their outputs meet: seen while one example runs."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mpsearch.model import Batch, call, first_tensor, preserved

#: Operations that multiply two tensors; attention of one piece has `attention` in its name.
_PRODUCTS = ("mul", "mm", "bmm", "baddbmm", "addmm")

#: Sees one call of a layer: name, module, input, output.
Observer = Callable[[str, nn.Module, Tensor, Tensor], None]


@dataclass
class DataFlow:
    """What layers read, and where their outputs meet before another layer reads them.

    Attributes:
        reads: layer -> what identifies the tensor that each of its calls read; layers that are not called are missing.
        multiplied: pairs of layers whose outputs meet in a product: queries and keys, a gate and what it gates.
        added: pairs of layers whose outputs meet in a sum of tensors of one shape: operands of a residual connection.
        cached_macs: cache -> multiply-accumulates of the products that read what goes into it.
    """

    reads: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    multiplied: set[frozenset[str]] = field(default_factory=set)
    added: set[frozenset[str]] = field(default_factory=set)
    cached_macs: Counter[str] = field(default_factory=Counter)


def trace(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    example: Batch,
    observer: Observer,
    caches: Mapping[str, nn.Module] = MappingProxyType({}),
) -> DataFlow:
    """Run the example once and follow the outputs of layers.

    Args:
        model: comes back as it was.
        layers: modules by name; what they return counts as made by them alone.
        example: one batch.
        observer: called with each call of a layer or cache.
        caches: modules that keys and values go through.

    >>> class Gated(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate, self.up = nn.Linear(2, 2), nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return self.gate(x).sigmoid() * self.up(x)
    >>> flow = trace(model := Gated(), dict(model.named_children()), torch.ones(1, 2), lambda *_: None)
    >>> flow.reads["gate"] == flow.reads["up"], sorted(*flow.multiplied), flow.added
    (True, ['gate', 'up'], set())
    """
    recorder = _Recorder()

    def enter(name: str) -> Callable[..., None]:
        return lambda _module, args, keywords: recorder.enter(name, first_tensor((*args, *keywords.values())))

    def leave(name: str, left: Callable[[str, Tensor], None] = recorder.leave) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
            made = first_tensor(output)  # routers return more
            left(name, made)
            observer(name, module, first_tensor((*args, *keywords.values())), made)

        return see

    handles = []
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name), prepend=True, with_kwargs=True))
        for name, module in caches.items():
            handles.append(module.register_forward_hook(leave(name, recorder.cached), with_kwargs=True))
        with preserved(model), torch.no_grad(), recorder:
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.flow


class _Recorder(TorchDispatchMode):
    """Follows memory: each storage carries the layers whose outputs have gone into it since they were made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = DataFlow()
        self.makers: dict[int, frozenset[str]] = {}
        self.writes: dict[int, int] = {}  # storage -> times it was written: tells memory that is given out again
        self.made: Counter[int] = Counter()  # storage -> times it was given out
        self.waiting: dict[tuple[int, int, int], str] = {}  # what is of a cache and was in no product yet -> the cache
        self.depth = 0  # layers that are running: their products are their own

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # spares loading the compiler, a second at the first run

    def enter(self, name: str, x: Tensor) -> None:
        self.depth += 1
        place = _storage(x)
        read = (place, self.writes.get(place, 0), x.storage_offset(), tuple(x.shape), x.stride())
        self.flow.reads.setdefault(name, []).append(read)

    def leave(self, name: str, output: Tensor) -> None:
        self.depth -= 1
        self.makers[_storage(output)] = frozenset([name])

    def cached(self, name: str, output: Tensor) -> None:
        self.waiting[self._part(output)] = name

    def _part(self, tensor: Tensor) -> tuple[int, int, int]:
        """Keys and values may lie in one storage."""
        return _storage(tensor), self.made[_storage(tensor)], int(tensor.storage_offset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = list(_tensors((args, kwargs)))
        read = {_storage(tensor) for tensor in given}
        makers = frozenset[str]().union(*(self.makers.get(place, frozenset()) for place in read))
        name = func.overloadpacket.__name__
        self._meet(name, given)
        waiting = self._product(name, given, [self.waiting.get(self._part(tensor), "") for tensor in given])
        for tensor in _tensors(result):
            place = _storage(tensor)
            if place not in read or func._schema.is_mutable:
                self.writes[place] = self.writes.get(place, 0) + 1
                self.makers[place] = makers
                self.made[place] += place not in read
                self.waiting[self._part(tensor)] = waiting
        return result

    def _product(self, name: str, given: list[Tensor], caches: list[str]) -> str:
        """Count a product of what goes into caches; the cache whose contents go on from here, if any."""
        if "attention" in name:
            queries, keys, values = given[:3]  # (batch, heads, tokens, size)
            sizes = [0, keys.shape[-1], values.shape[-1]]
            macs = [queries.shape[:-1].numel() * keys.shape[-2] * size for size in sizes]
        elif name in ("mm", "bmm", "baddbmm") and not self.depth:
            macs = [given[-2].numel() * given[-1].shape[-1]] * len(given)
        else:
            return next(filter(None, caches), "")
        for cache, count in zip(caches, macs, strict=False):
            if cache:
                self.flow.cached_macs[cache] += count
        return ""

    def _meet(self, name: str, given: list[Tensor]) -> None:
        """Note the layers whose outputs an operation brings together."""
        if name.rstrip("_") in _PRODUCTS or "attention" in name:
            found = self.flow.multiplied
        elif name.rstrip("_") == "add" and len({tensor.shape for tensor in given}) == 1:
            found = self.flow.added
        else:
            return
        sides = [self.makers.get(_storage(tensor), frozenset()) for tensor in given]
        for one, other in itertools.combinations(sides, 2):
            found.update(frozenset(pair) for pair in itertools.product(one, other) if pair[0] != pair[1])


def _tensors(value: Any) -> Iterator[Tensor]:
    return (part for part in tree_iter(value) if isinstance(part, Tensor))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
