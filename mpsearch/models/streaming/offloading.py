"""Models whose parameters lie on the meta device and their values elsewhere: which they are, and values put in where they are used."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.models.streaming.stored import InFile, InMemory, Stored, tensors_in

#: Attributes for as long as the search looks at a model: of a module its `Shelf`, of a parameter that of its module, of the model
#: the device that it runs on, and of a module whose calls take nothing in that they do not.
_SHELF, _DEVICE, _RESTING = "_mpsearch_shelf", "_mpsearch_device", "_mpsearch_resting"

#: What accelerate puts into a module beside the hook's own state.
_OF_ACCELERATE = ("forward", "_hf_hook", "_old_forward")

Value = Tensor | Callable[[], Tensor]


@dataclass(eq=False)
class Shelf:
    """The tensors of one module that lie elsewhere: they are in the module for as long as anybody uses them.

    Parameters stay the same objects: what is read is put into them (`torch.utils.swap_tensors`), and taken out again.

    Attributes:
        device: that the module runs on.
        parameters: parameter -> what it holds in use.
        buffers: (buffers of the module, name) -> the same.
        replacements: parameter -> value in its place, as `replaced` puts them in.
        users: how many use the tensors now.
        calls: how many of them are calls of modules.
    """

    device: torch.device
    parameters: dict[nn.Parameter, Callable[[], Tensor]] = field(default_factory=dict)
    buffers: list[tuple[dict[str, Tensor | None], str, Stored]] = field(default_factory=list)
    replacements: dict[nn.Parameter, list[Value]] = field(default_factory=dict)
    users: int = 0
    calls: int = 0
    _away: list[tuple[nn.Parameter, nn.Parameter]] = field(default_factory=list)
    _empty: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = field(default_factory=list)
    _aside: dict[nn.Parameter, list[Tensor]] = field(default_factory=dict)  # values under those put in while in use

    def enter(self) -> None:
        """One user more."""
        self.users += 1
        if self.users > 1:
            return
        try:
            for parameter, read in self.parameters.items():
                full = nn.Parameter(read().to(self.device), requires_grad=parameter.requires_grad)
                _swap(parameter, full)
                self._away.append((parameter, full))
            for holder, name, stored in self.buffers:
                self._empty.append((holder, name, holder[name]))
                holder[name] = stored.values().to(self.device)
            for parameter, values in self.replacements.items():
                for value in values:  # what makes it may look at the parameter
                    self._put_over(parameter, value)
        except BaseException:
            self.users = 0
            self._clear()
            raise

    def leave(self) -> None:
        """One user less."""
        self.users -= 1
        if self.users == 0:
            self._clear()

    def break_off(self) -> None:
        """Forget calls that have ended without a word."""
        while self.calls:
            self.calls -= 1
            self.leave()

    def replace(self, parameter: nn.Parameter, value: Value) -> None:
        """Hold another value from now on, also when it is put in again."""
        if self.users:
            self._put_over(parameter, value)
        self.replacements.setdefault(parameter, []).append(value)

    def restore(self, parameter: nn.Parameter) -> None:
        """Hold what was held before the last `replace`."""
        self.replacements[parameter].pop()
        if self.users:
            parameter.data = self._aside[parameter].pop()

    def _put_over(self, parameter: nn.Parameter, value: Value) -> None:
        made = _made(value).to(self.device)
        self._aside.setdefault(parameter, []).append(parameter.data)
        parameter.data = made

    def _clear(self) -> None:
        for parameter, full in self._away:
            requires_grad = parameter.requires_grad
            _swap(parameter, full)
            parameter.requires_grad_(requires_grad)
        for holder, name, empty in self._empty:
            holder[name] = empty
        self._away, self._empty, self._aside = [], [], {}


def _made(value: Value) -> Tensor:
    return value if isinstance(value, Tensor) else value()


def _swap(parameter: nn.Parameter, other: nn.Parameter) -> None:
    """Exchange what two parameters hold; their attributes stay."""
    attributes, grad = dict(vars(parameter)), parameter.grad
    parameter.grad = None
    try:
        torch.utils.swap_tensors(parameter, other)
    except RuntimeError as error:
        raise EstimatorError(
            f"a weight of shape {tuple(parameter.shape)} of an offloaded model cannot be taken out of it: the graph of a gradient of the "
            "whole model holds all weights; take an estimator that runs block by block, such as FisherProjection or GaussNewtonTrace "
            f"({error})"
        ) from error
    vars(parameter).clear()
    vars(parameter).update(attributes)
    if grad is not None:
        parameter.grad = grad


def shelf_of(holder: nn.Module | nn.Parameter) -> Shelf | None:
    """Where a module or a parameter gets its values from; None for one that has them."""
    shelf: Shelf | None = vars(holder).get(_SHELF)
    return shelf


def _shelves(*modules: nn.Module) -> list[Shelf]:
    """Those of modules, of all modules in them, and of their parameters, which may be those of others."""
    shelves: dict[Shelf, None] = {}
    for module in modules:
        for part in module.modules():
            own = [shelf_of(parameter) for parameter in part._parameters.values() if parameter is not None]
            shelves |= dict.fromkeys(shelf for shelf in (shelf_of(part), *own) if shelf is not None)
    return list(shelves)


@contextlib.contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """Inside, the parameters and buffers of modules, and of all modules in them, hold their values.

    Each is read once, however often it is asked for inside. A model that has its values is left alone.
    """
    with contextlib.ExitStack() as stack:
        for shelf in _shelves(*modules):
            shelf.enter()
            stack.callback(shelf.leave)
        yield


@contextlib.contextmanager
def replaced(values: Mapping[nn.Parameter, Value]) -> Iterator[None]:
    """Values in the place of parameters; the originals are set aside, not copied, and put back.

    Args:
        values: parameter -> its value, or what makes it. A parameter whose own values lie elsewhere takes its value whenever it is put
            into the model, and only then is it made.
    """
    with contextlib.ExitStack() as stack:
        for parameter, value in values.items():
            shelf = shelf_of(parameter)
            if shelf is None:
                stack.callback(setattr, parameter, "data", parameter.data)
                parameter.data = _made(value)
            else:
                shelf.replace(parameter, value)
                stack.callback(shelf.restore, parameter)
        yield


@dataclass(frozen=True, eq=False)
class _Offloaded:
    """A tensor of a module that lies elsewhere."""

    module: nn.Module
    name: str
    stored: Stored
    device: torch.device
    parameter: bool


def _offload_hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that put tensors into a module for a call."""
    hook: Any = vars(module).get("_hf_hook")
    hooks = [] if hook is None else list(vars(hook).get("hooks", [hook]))
    return [hook for hook in hooks if vars(hook).get("offload") and vars(hook).get("weights_map") is not None]


def _offloaded(model: nn.Module) -> Iterator[_Offloaded]:
    for module in model.modules():
        for hook in _offload_hooks(module):
            execution = hook.execution_device
            device = torch.device("cpu" if execution is None else execution)
            inner = hook.place_submodules
            parameters = dict(module.named_parameters(recurse=inner, remove_duplicate=False))
            buffers = dict(module.named_buffers(recurse=inner, remove_duplicate=False)) if hook.offload_buffers else {}
            for name, tensor in {**parameters, **buffers}.items():
                if tensor.is_meta:
                    owner, _, last = name.rpartition(".")
                    stored = _stored(hook.weights_map, name, tensor)
                    yield _Offloaded(module.get_submodule(owner), last, stored, device, name in parameters)


def _stored(weights: Any, name: str, tensor: Tensor) -> Stored:
    """Where a map of accelerate has a tensor.

    Raises:
        EstimatorError: where it has none.
    """
    facts: Mapping[str, Any] = getattr(weights, "__dict__", {})
    while {"prefix", "dataset"} <= facts.keys():  # accelerate's PrefixedDataset
        name, weights = f"{facts['prefix']}{name}", facts["dataset"]
        facts = getattr(weights, "__dict__", {})
    state, index = facts.get("state_dict"), facts.get("index")
    if index is None or (state and name in state):
        if name not in weights:
            raise EstimatorError(f"{name!r} is on the meta device, and accelerate's map has no values for it")
        return InMemory(weights[name])
    if name not in index:
        raise EstimatorError(f"{name!r} is on the meta device, and accelerate's index has no place for it")
    entry = index[name]
    path = entry.get("safetensors_file")
    if path is None:
        kind = getattr(torch, entry["dtype"])
        return InFile(str(Path(weights.save_folder) / f"{name}.dat"), 0, tuple(entry["shape"]), kind, kind)
    tensors, key = tensors_in(path), entry.get("weight_name", name)
    if key not in tensors:
        raise EstimatorError(f"{path} has no tensor {key!r}")
    found = tensors[key]
    if tuple(tensor.shape) != found.shape:
        raise EstimatorError(
            f"{path}: {key} has shape {found.shape}, expected {tuple(tensor.shape)} as the model's {name}"
        )
    return InFile(found.path, found.offset_bytes, found.shape, found.dtype, tensor.dtype)


def is_offloaded(model: nn.Module) -> bool:
    """True for a model with tensors that accelerate puts in for a call, and takes out again.

    >>> is_offloaded(nn.Linear(1, 1))
    False
    """
    return _DEVICE in vars(model) or any(_offload_hooks(module) for module in model.modules())


def running_device(model: nn.Module) -> torch.device | None:
    """Where an offloaded model that is being looked at runs; None for any other model."""
    device: torch.device | None = vars(model).get(_DEVICE)
    return device


def offloaded_tensors(model: nn.Module) -> dict[int, Stored]:
    """What lies elsewhere, by the `id` of the empty parameter or buffer."""
    return {
        id((part.module._parameters if part.parameter else part.module._buffers)[part.name]): part.stored
        for part in _offloaded(model)
    }


@contextlib.contextmanager
def on_demand(model: nn.Module) -> Iterator[None]:
    """Inside, `resident` puts the values of an offloaded model in, and each module does so for its own call.

    A block, a module in an `nn.ModuleList`, does so for all that is in it, since its code may read the weights of a layer without a call.
    Weights that are tied are one parameter inside, as they are in a model that has its values. Accelerate's own hooks rest meanwhile.
    A model that has its values is left alone.
    """
    parts = list(_offloaded(model))
    if not parts or _DEVICE in vars(model):
        yield
        return
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if vars(module).keys() >= {*_OF_ACCELERATE}:
                stack.callback(vars(module).update, {name: vars(module)[name] for name in _OF_ACCELERATE})
                module.forward = vars(module)["_old_forward"]
                for name in _OF_ACCELERATE[1:]:  # models call a hook that they see
                    del vars(module)[name]
        shelves: dict[nn.Module, Shelf] = {}
        first: dict[tuple[Any, ...], nn.Parameter] = {}
        for part in parts:
            shelf = shelves.setdefault(part.module, Shelf(part.device))
            if not part.parameter:
                shelf.buffers.append((part.module._buffers, part.name, part.stored))
                continue
            own = part.module._parameters[part.name]
            assert own is not None
            stack.callback(own.requires_grad_, own.requires_grad)
            own.requires_grad_(False)  # a graph would hold what is taken out again
            one = first.setdefault((part.stored.place, own.dtype), own)
            if one is not own:
                stack.callback(part.module._parameters.__setitem__, part.name, own)
                part.module._parameters[part.name] = one
            tied = shelf_of(one)
            if tied is None:
                shelf.parameters[one] = _reading(part.stored)
                stack.enter_context(attached(one, shelf))
            elif tied is not shelf:  # one shelf for all modules that hold it
                shelves[part.module] = _joined(shelf, tied)
        for module, shelf in shelves.items():
            stack.enter_context(attached(module, shelf))
            stack.enter_context(around_calls(module))
        for block in _outermost_blocks(model):
            stack.enter_context(around_calls(block, below=True))
        vars(model)[_DEVICE] = parts[0].device
        stack.callback(vars(model).pop, _DEVICE, None)
        yield


def _outermost_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules in the lists of a model that lie in no other list."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    inner = {part for blocks in lists for block in blocks for part in block.modules()}
    return [block for blocks in lists if blocks not in inner for block in blocks]


def _joined(shelf: Shelf, tied: Shelf) -> Shelf:
    """One shelf in place of two, those of modules that share a parameter."""
    tied.parameters |= shelf.parameters
    tied.buffers += shelf.buffers
    for parameter in shelf.parameters:
        vars(parameter)[_SHELF] = tied
    return tied


def _reading(stored: Stored) -> Callable[[], Tensor]:
    return stored.values


@contextlib.contextmanager
def attached(holder: Any, shelf: Shelf) -> Iterator[None]:
    """A module or a parameter knows its shelf inside."""
    vars(holder)[_SHELF] = shelf
    try:
        yield
    finally:
        vars(holder).pop(_SHELF, None)


@contextlib.contextmanager
def around_calls(module: nn.Module, *, below: bool = False) -> Iterator[None]:
    """Values are in a module while it is called.

    Args:
        module: with a shelf.
        below: they are in all modules inside it too, for one that reads their parameters itself.
    """
    calls: list[list[Shelf]] = []

    def enter(*_: Any) -> None:
        own = shelf_of(module)
        shelves = [] if _RESTING in vars(module) else _shelves(module) if below else [own] if own is not None else []
        for shelf in shelves:
            shelf.enter()
            shelf.calls += 1
        calls.append(shelves)

    def leave(*_: Any) -> None:
        for shelf in calls.pop() if calls else ():
            if shelf.calls:
                shelf.calls -= 1
                shelf.leave()

    handles = [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for shelf in _shelves(module):
            shelf.break_off()


def broken_off(model: nn.Module) -> None:
    """Take out what calls have put in that were broken off by something that no hook hears of; none may be running."""
    for shelf in _shelves(model):
        shelf.break_off()


@contextlib.contextmanager
def at_rest(*modules: nn.Module) -> Iterator[None]:
    """Calls of modules take nothing in inside, since something else is run in their place."""
    resting = [module for module in modules if _RESTING not in vars(module)]
    try:
        for module in resting:
            vars(module)[_RESTING] = True
        yield
    finally:
        for module in resting:
            vars(module).pop(_RESTING, None)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that lie in memory, also of those that are offloaded there; what shares memory counts once."""
    outside = [stored.values() for stored in offloaded_tensors(model).values() if isinstance(stored, InMemory)]
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers(), *outside) if not tensor.is_meta]
    plain = [tensor for tensor in tensors if tensor.layout is torch.strided]
    others = [tensor for tensor in tensors if tensor.layout is not torch.strided]  # sparse ones have several memories
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in plain}
    return sum(sizes.values()) + sum(tensor._nnz() * tensor.element_size() for tensor in others)
