"""Parameters that lie in the memory of another one: transposes, slices, a second parameter around the same numbers."""

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from mpsearch.models.modules.operand import View

#: Name of a module, of its parameter, the module, the parameter.
_Place = tuple[str, str, nn.Module, nn.Parameter]


def memory_of(tensor: Tensor) -> int:
    """Which memory a tensor lies in: equal for a tensor and its views, on the meta device too, which has no addresses."""
    storage = tensor.untyped_storage()
    return int(storage._cdata if tensor.is_meta else storage.data_ptr())


def span_of(tensor: Tensor) -> tuple[int, int]:
    """First element and one behind the last, in the memory.

    >>> import torch
    >>> span_of(torch.zeros(3, 4)[1:, :2])
    (4, 10)
    """
    first = int(tensor.storage_offset())
    return first, first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1


@dataclass(eq=False)
class Views:
    """Tensors that stand for a part of a parameter.

    Attributes:
        of: id of a tensor -> the parameter, and which part of it the tensor is.
        within: name of a module -> name of the module whose weight has its own inside.
    """

    of: dict[int, tuple[nn.Parameter, View]] = field(default_factory=dict)
    within: dict[str, str] = field(default_factory=dict)

    def live(self, tensor: Tensor) -> Tensor:
        """What the tensor stands for as it is now, in the graph; any other tensor itself."""
        part = self.of.get(id(tensor))
        return tensor if part is None else part[1](part[0])


@contextlib.contextmanager
def one_memory(model: nn.Module) -> Iterator[Views]:
    """Inside, each memory is one parameter of the model: that of the largest, in the order of the model.

    A parameter of the same shape and strides gives way to that one; a transpose or slice becomes a tensor that `Views.live` tells of. Only
    parameters that others lie in wholly, and that have no gaps, hold others.

    >>> model = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(3, 2, bias=False)})
    >>> model["b"].weight = nn.Parameter(model["a"].weight.T)
    >>> with one_memory(model) as views:
    ...     [name for name, _ in model.named_parameters()], views.within
    (['a.weight'], {'b': 'a'})
    >>> len(list(model.parameters()))
    2
    """
    memories: dict[int, list[_Place]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim > 1 and parameter.numel():
                memories.setdefault(memory_of(parameter), []).append((name, key, module, parameter))
    views, before = Views(), list[tuple[nn.Module, dict[str, nn.Parameter | None], str]]()
    try:
        for places in memories.values():
            if len({id(parameter) for *_, parameter in places}) < 2:
                continue
            for (name, key, module, parameter), (owner_name, _, _, owner) in zip(places, _owners(places), strict=True):
                if owner is parameter:
                    continue
                before.append((module, dict(module._parameters), key))
                if (owner.shape, owner.stride()) == (parameter.shape, parameter.stride()):
                    module._parameters[key] = owner
                    continue
                stand_in = parameter.detach()
                for tensor in (parameter, stand_in):
                    views.of[id(tensor)] = owner, View.of(parameter, owner)
                del module._parameters[key]
                vars(module)[key] = stand_in
                views.within[name] = owner_name
        yield views
    finally:
        for module, parameters, key in reversed(before):
            vars(module).pop(key, None)
            module._parameters.clear()
            module._parameters.update(parameters)


def _owners(places: Sequence[_Place]) -> list[_Place]:
    """Of each parameter in one memory the largest, in their order, that it lies in wholly and that has no gaps; else itself.

    Those lie in no other of them, so that they end in the order in which they start, and each is found by bisection.
    """
    owner = list(places)
    starts, ends, numbers = list[int](), list[int](), list[int]()  # of parameters that hold others
    for number in sorted(range(len(places)), key=lambda number: -places[number][-1].numel()):
        parameter = places[number][-1]
        start, end = span_of(parameter)
        around = numbers[bisect.bisect_left(ends, end) : bisect.bisect_right(starts, start)]
        if around:
            owner[number] = places[min(around, key=lambda other: (-places[other][-1].numel(), other))]
        elif end - start == parameter.numel():
            place = bisect.bisect_left(starts, start)
            for column, value in ((starts, start), (ends, end), (numbers, number)):
                column.insert(place, value)
    return owner
