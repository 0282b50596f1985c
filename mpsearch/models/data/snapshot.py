"""The state of a model and of the random generators, taken before a run and put back after it."""

import contextlib
import functools
import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Restore = Callable[[], object]


def snapshot(model: nn.Module) -> Restore:
    """Note the attributes of all modules and their contents, except parameters, which nobody writes to.

    Contents of lists, dicts, sets, queues, tensors (buffers and plain ones), arrays and random generators are noted, one in another at
    any depth, and those of the attributes of other objects, one object deep.

    Returns:
        Puts back all that has changed, in the very objects that hold it.

    >>> model = nn.Identity()
    >>> model.calls, model.seen = [1], {"sum": torch.zeros(2)}
    >>> restore = snapshot(model)
    >>> model.calls.append(2); model.seen["sum"] += 1; model.new = 3
    >>> restore()
    >>> model.calls, model.seen, hasattr(model, "new")
    ([1], {'sum': tensor([0., 0.])}, False)
    """
    state = _Snapshot()
    for module in model.modules():
        state.add(vars(module), inside=False)
    return state.restore


@contextlib.contextmanager
def random_states() -> Iterator[None]:
    """Python's, numpy's and torch's global random generators are afterwards as they were before."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())  # noqa: NPY002 the user's global state
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


#: Values that nobody can change.
_FIXED = frozenset({str, bytes, int, float, bool, type(None), type, torch.dtype, torch.device, types.FunctionType})


class _Snapshot:
    def __init__(self) -> None:
        self._empty: list[dict[Any, Any]] = []  # a module has a dozen: of hooks, buffers, submodules
        self._mappings: list[tuple[dict[Any, Any], tuple[tuple[Any, Any], ...]]] = []
        self._restores: list[Restore] = []
        self._seen: dict[int, Any] = {}  # values stay alive, so that no address is given out twice

    def add(self, value: Any, *, inside: bool) -> None:
        """Note a value; of an object `inside` another one, attributes are not looked at."""
        if type(value) in _FIXED:
            return
        if type(value) in (dict, OrderedDict) and not value:
            self._empty.append(value)
            return
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, dict):
            self._mappings.append((value, tuple(value.items())))
            for part in value.values():
                self.add(part, inside=inside)
        elif isinstance(value, Tensor):
            if value.layout is torch.strided and not (value.is_meta or isinstance(value, nn.Parameter)):
                self._restores.append(_tensor(value))
        elif isinstance(value, nn.Module | type):
            return
        elif isinstance(value, np.ndarray):
            self._restores.append(_array(value))
        elif isinstance(value, list | deque | tuple):
            if not isinstance(value, tuple):
                self._restores.append(_sequence(value))
            for part in value:
                self.add(part, inside=inside)
        elif isinstance(value, set):
            self._restores.append(_set(value))
        elif isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            self._restores.append(_generator(value))
        elif not inside and hasattr(value, "__dict__") and not _is_of_python(value):
            self._mappings.append((vars(value), tuple(vars(value).items())))
            for part in vars(value).values():
                self.add(part, inside=True)

    def restore(self) -> None:
        for mapping in self._empty:
            mapping.clear()
        for mapping, items in self._mappings:
            now = tuple(mapping.items())
            if len(now) != len(items) or any(
                a is not c or b is not d for (a, b), (c, d) in zip(now, items, strict=True)
            ):
                mapping.clear()
                mapping.update(items)
        for restore in self._restores:
            restore()


def _is_of_python(value: Any) -> bool:
    """True for locks, loggers, functions, partial functions, hooks of accelerate: parts of the process, not of the model."""
    package = type(value).__module__.partition(".")[0]
    return package in sys.stdlib_module_names or package == "accelerate"  # whose hooks hold all weights of a model


def _tensor(value: Tensor) -> Restore:
    copy = value.detach().clone()

    def restore() -> None:
        if value.shape == copy.shape and torch.equal(value, copy):
            return
        with torch.inference_mode(value.is_inference()), torch.no_grad():
            if value.shape != copy.shape:
                value.resize_(copy.shape)
            value.copy_(copy)

    return restore


def _array(value: Any) -> Restore:
    copy = value.copy()

    def restore() -> None:
        if value.flags.writeable and value.shape == copy.shape:
            value[...] = copy

    return restore


def _sequence(value: Any) -> Restore:
    items = list(value)

    def restore() -> None:
        if len(value) != len(items) or any(a is not b for a, b in zip(value, items, strict=True)):
            value.clear()
            value.extend(items)

    return restore


def _set(value: set[Any]) -> Restore:
    items = set(value)

    def restore() -> None:
        if value != items:
            value.clear()
            value.update(items)

    return restore


def _generator(value: Any) -> Restore:
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
