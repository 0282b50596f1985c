"""Parameters that lie in the memory of another one: transposes, slices, a second parameter around the same numbers."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from mpsearch.models.modules.operand import View


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
    memories: dict[int, list[tuple[str, str, nn.Module, nn.Parameter]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim > 1 and parameter.numel() and not parameter.is_meta:
                memories.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, key, module, parameter))
    views, before = Views(), list[tuple[nn.Module, dict[str, nn.Parameter | None], str]]()
    try:
        for places in memories.values():
            if len({id(parameter) for *_, parameter in places}) < 2:
                continue
            for name, key, module, parameter in places:
                owner_name, owner = next((n, p) for n, _, _, p in sorted(places, key=_size) if _inside(parameter, p))
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


def _size(place: tuple[str, str, nn.Module, nn.Parameter]) -> int:
    return -place[-1].numel()


def _inside(tensor: Tensor, whole: Tensor) -> bool:
    """True for a tensor itself, and for one that lies wholly in another without gaps."""
    (first, last), (start, end) = _span(tensor), _span(whole)
    return tensor is whole or (end - start == whole.numel() and start <= first and last <= end)


def _span(tensor: Tensor) -> tuple[int, int]:
    first = int(tensor.storage_offset())
    return first, first + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
