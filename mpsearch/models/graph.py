"""Which layers read the same tensor, and where their outputs meet: seen while one example runs."""

import functools
import itertools
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mpsearch.models.modules.one_memory import memory_of
from mpsearch.models.modules.weights import kind_of, operands_of
from mpsearch.models.running import Batch, call, first_tensor, preserved

#: Operations that multiply two tensors; attention of one piece has `attention` in its name.
_PRODUCTS = ("mul", "mm", "bmm", "baddbmm", "addmm")

#: Sees one call of a layer: name, module, input, output.
Observer = Callable[[str, nn.Module, Tensor, Tensor], None]


@dataclass
class DataFlow:
    """What layers read, and where their outputs meet before another layer reads them.

    Attributes:
        reads: layer -> what identifies the tensor that each of its calls read; layers that are not called are missing.
        multiplied: pairs of layers of one kind that read the same tensors and whose outputs meet in a product: queries and keys, a gate
            and what it gates; not each with each, but enough to connect all that meet.
        added: pairs of layers whose outputs meet in a sum of tensors of one shape, operands of a residual connection, in the same way.
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
    recorder = _Recorder({name: kind_of(module) for name, module in layers.items()})

    def enter(name: str) -> Callable[..., None]:
        return lambda _module, args, keywords: recorder.enter(name, first_tensor((*args, *keywords.values())))

    def leave(name: str, note: Callable[[str, Tensor], None] = recorder.leave) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
            result = first_tensor(output)  # routers return more
            note(name, result)
            observer(name, module, first_tensor((*args, *keywords.values())), result)

        return hook

    handles = []
    reads = operands_of(model).reads
    try:
        for name, module in [*layers.items(), *((name, read) for name, read in reads.items() if name in layers)]:
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name), prepend=True, with_kwargs=True))
        for name, module in caches.items():
            handles.append(module.register_forward_hook(leave(name, recorder.cached), with_kwargs=True))
        with preserved(model), torch.no_grad(), recorder:
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.finished()


class _Recorder(TorchDispatchMode):
    """Follows memory: what is in each storage is a node of a graph, with the nodes that it was made from.

    Nodes of the outputs of layers have no parents. Which layers meet is told at the end, when it is known which of them read the same
    tensors: of those alone pairs are formed, else each product along a residual connection would pair all layers before it.
    """

    def __init__(self, kinds: Mapping[str, str | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flow = DataFlow()
        self.kinds = kinds  # of the layers
        self.nodes: dict[int, int] = {}  # storage -> node
        self.parents: list[tuple[int, ...]] = []  # of each node, by number
        self.names: dict[int, str] = {}  # node -> the layer whose output it is
        self.products: dict[int, list[tuple[int, ...]]] = {}  # number of nodes by then -> nodes that meet
        self.sums: list[tuple[int, ...]] = []
        self.writes: dict[int, int] = {}  # storage -> times it was written: tells memory that is given out again
        self.allocations: Counter[int] = Counter()  # storage -> times it was given out
        self.waiting: dict[tuple[int, int, int], str] = {}  # what is of a cache and was in no product yet -> the cache
        self.depth = 0  # layers that are running: their products are their own

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # spares loading the compiler, a second at the first run

    def enter(self, name: str, x: Tensor) -> None:
        self.depth += 1
        place = memory_of(x)
        read = (place, self.writes.get(place, 0), x.storage_offset(), tuple(x.shape), x.stride())
        self.flow.reads.setdefault(name, []).append(read)

    def leave(self, name: str, output: Tensor) -> None:
        self.depth -= 1
        self.names[self._node(output, ())] = name

    def _node(self, tensor: Tensor, parents: tuple[int, ...]) -> int:
        self.parents.append(parents)
        self.nodes[memory_of(tensor)] = len(self.parents) - 1
        return len(self.parents) - 1

    def cached(self, name: str, output: Tensor) -> None:
        self.waiting[self._part(output)] = name

    def _part(self, tensor: Tensor) -> tuple[int, int, int]:
        """Keys and values may lie in one storage."""
        return memory_of(tensor), self.allocations[memory_of(tensor)], int(tensor.storage_offset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        arguments = list(_tensors((args, kwargs)))
        places = [memory_of(tensor) for tensor in arguments]
        parents = tuple({self.nodes[place]: None for place in places if place in self.nodes})
        name = func.overloadpacket.__name__
        self._meet(name, arguments, places)
        waiting = self._product(name, arguments) if self.waiting else ""
        for tensor in _tensors(result):
            place = memory_of(tensor)
            if place not in places or func._schema.is_mutable:
                self.writes[place] = self.writes.get(place, 0) + 1
                if len(parents) == 1:
                    self.nodes[place] = parents[0]
                elif parents:
                    self._node(tensor, parents)
                else:
                    self.nodes.pop(place, None)
                self.allocations[place] += place not in places
                if self.waiting:
                    self.waiting[self._part(tensor)] = waiting
        return result

    def _product(self, name: str, arguments: list[Tensor]) -> str:
        """Count a product of what goes into caches; the cache whose contents go on from here, if any."""
        caches = [self.waiting.get(self._part(tensor), "") for tensor in arguments]
        if "attention" in name:
            queries, keys, values = arguments[:3]  # (batch, heads, tokens, size)
            sizes = [0, keys.shape[-1], values.shape[-1]]
            macs = [queries.shape[:-1].numel() * keys.shape[-2] * size for size in sizes]
        elif name in ("mm", "bmm", "baddbmm") and not self.depth:
            macs = [arguments[-2].numel() * arguments[-1].shape[-1]] * len(arguments)
        else:
            return next(filter(None, caches), "")
        for cache, count in zip(caches[: len(macs)], macs, strict=True):
            if cache:
                self.flow.cached_macs[cache] += count
        return ""

    def _meet(self, name: str, arguments: list[Tensor], places: list[int]) -> None:
        """Note what an operation brings together."""
        if name.rstrip("_") in _PRODUCTS or "attention" in name:
            meetings = self.products.setdefault(len(self.parents), [])
        elif name.rstrip("_") == "add" and len({tensor.shape for tensor in arguments}) == 1:
            meetings = self.sums
        else:
            return
        nodes = tuple(self.nodes[place] for place in places if place in self.nodes)
        if len(nodes) > 1:
            meetings.append(nodes)

    def finished(self) -> DataFlow:
        """The flow, with the pairs of layers that meet."""
        self.flow.multiplied = self._multiplied()
        self.flow.added = self._added()
        return self.flow

    def _multiplied(self) -> set[frozenset[str]]:
        """Layers are bits of whole numbers: what a node is made of is one number, however many layers wrote to it."""
        readers: dict[tuple[Any, ...], list[str]] = {}
        for name, reads in self.flow.reads.items():
            readers.setdefault((self.kinds[name], *reads), []).append(name)
        bits: dict[str, int] = {}
        alike: list[_Alike] = []  # of each bit
        for names in readers.values():
            if len(names) > 1:
                bits |= {name: 1 << len(bits) + place for place, name in enumerate(names)}
                alike += [_Alike({bits[name]: name for name in names})] * len(names)
        followed = (1 << len(bits)) - 1  # those that have not all met
        made_of: list[int] = []  # of each node
        pairs: set[frozenset[str]] = set()
        for number, parents in enumerate([*self.parents, ()]):
            for nodes in self.products.get(number, ()):
                for first, second in itertools.combinations([made_of[node] & followed for node in nodes], 2):
                    rest = first if second else 0
                    while rest:
                        group = alike[rest.bit_length() - 1]
                        rest &= ~group.bits
                        if second & group.bits:
                            pairs.update(group.meet((first | second) & group.bits))
                            followed &= ~group.bits if len(group.parts) == 1 else -1
            own = bits.get(self.names.get(number, ""), 0)
            made_of.append(functools.reduce(operator.or_, (made_of[parent] for parent in parents), own) & followed)
        return pairs

    def _added(self) -> set[frozenset[str]]:
        """Each with each would be quadratic: what met before is one from then on."""
        representative: dict[int, str | None] = {}  # node -> one of its layers, where all of them have met
        pairs: set[frozenset[str]] = set()

        def layers_of(start: int) -> list[str]:
            names, open_nodes, seen = [], [start], set[int]()
            while open_nodes:
                node = open_nodes.pop()
                if node in seen:
                    continue
                seen.add(node)
                if node in representative:
                    names += [name for name in [representative[node]] if name is not None]
                elif node in self.names:
                    names.append(self.names[node])
                else:
                    open_nodes += self.parents[node]
            whole.update(seen)
            return names

        for nodes in self.sums:
            whole = set[int]()
            sides = [side for side in map(layers_of, nodes) if side]
            if len(sides) < 2:
                continue
            first = sides[0][0]
            pairs.update(frozenset((first, name)) for side in sides for name in side if name != first)
            representative.update(dict.fromkeys(whole, first))
        return pairs


class _Alike:
    """Layers that read the same, each a bit of a number, and what of them has met.

    Attributes:
        names: bit -> layer.
        bits: all of them.
        parts: the bits of those that have met, together.

    >>> alike = _Alike({1: "q", 2: "k", 4: "v"})
    >>> [sorted(pair) for pair in alike.meet(1 | 2)], alike.meet(1 | 2), alike.parts
    ([['k', 'q']], [], [4, 3])
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self.bits = sum(names)
        self.parts = list(names)

    def meet(self, bits: int) -> list[frozenset[str]]:
        """Pairs that connect what meets here and had not met yet."""
        meeting = [part for part in self.parts if part & bits]
        if len(meeting) < 2:
            return []
        self.parts = [*(part for part in self.parts if not part & bits), sum(meeting)]
        first, *others = (self.names[part & -part] for part in meeting)
        return [frozenset((first, other)) for other in others]


def _tensors(value: Any) -> Iterator[Tensor]:
    return (part for part in tree_iter(value) if isinstance(part, Tensor))
