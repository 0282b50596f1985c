"""Which modules are quantizable, under which names, and how their weights look to a quantizer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpsearch.models.modules.kv_cache import KVCache
from mpsearch.models.modules.one_memory import memory_of
from mpsearch.models.modules.operand import Operand, Transposed

#: Attribute of a model that holds its `Operands`, as long as the search looks at it.
OPERANDS = "_mpsearch_operands"

#: Module class -> kind of layer. Subclasses count as their class.
KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
    KVCache: "kv_cache",
}


@dataclass(frozen=True)
class Operands:
    """Parameters that functions read (`mpsearch.models.modules.functional`).

    Attributes:
        decided: decisions by name: matrices of no layer, and of layers that are never called.
        reads: further reads of the weights of layers, by the name of the layer.
        within: modules whose weight lies in that of another one (`mpsearch.models.modules.one_memory`) -> the name of that.
    """

    decided: Mapping[str, Operand] = field(default_factory=dict)
    reads: Mapping[str, Operand] = field(default_factory=dict)
    within: Mapping[str, str] = field(default_factory=dict)


def operands_of(model: nn.Module) -> Operands:
    """The parameters of a model that functions read."""
    operands: Operands = vars(model).get(OPERANDS) or Operands()
    return operands


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that a decision may be about, by the name of the decision: the one place that tells.

    In the order of `named_modules`; operands (`lstm.weight_ih_l0`) follow the module that holds the parameter.

    >>> list(named_layers(nn.Sequential(nn.Linear(1, 1), nn.ReLU())))
    ['0']
    """
    decided, modules = operands_of(model).decided, dict(model.named_modules())
    within: dict[str, list[str]] = {}
    for name in (name for name in decided if name not in modules):
        within.setdefault(name.rpartition(".")[0], []).append(name)
    layers: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if name in decided:
            layers[name] = decided[name]
        elif kind_of(module) is not None:
            layers[name] = module
        for inner in within.get(name, ()):
            layers.setdefault(inner, decided[inner])
    return layers


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The module that a decision is about.

    Raises:
        AttributeError: where there is none.
    """
    return operands_of(model).decided.get(name) or model.get_submodule(name)


def holders(model: nn.Module) -> Iterator[nn.Module]:
    """Every module whose calls show how a weight is used; operands come in the place of modules whose parameters functions read."""
    operands = operands_of(model)
    stood_for = {operand.weight for operand in operands.decided.values()}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is None or weight not in stood_for:
            yield module
    yield from operands.decided.values()
    yield from operands.reads.values()


def sole_readers(model: nn.Module) -> dict[nn.Parameter, list[nn.Module]]:
    """Weights that nothing reads but the calls of the layers that hold them, with those layers.

    >>> tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> tied[1].weight = tied[0].weight
    >>> [len(readers) for readers in sole_readers(tied).values()]
    [2]
    """
    operands = operands_of(model)
    others = {operand.weight for operand in (*operands.decided.values(), *operands.reads.values())}
    readers: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        plain = type(module) in KINDS or stores_inputs_first(module)
        for name, parameter in module._parameters.items():
            if parameter is not None and plain and name == "weight":
                readers.setdefault(parameter, []).append(module)
            elif parameter is not None:
                others.add(parameter)
    return {parameter: modules for parameter, modules in readers.items() if parameter not in others}


def kind_of(module: nn.Module) -> str | None:
    """Kind of layer that a module is; None where it is none.

    >>> kind_of(nn.Linear(1, 1)), kind_of(nn.ReLU())
    ('linear', None)
    """
    if isinstance(module, Operand):
        return module.kind
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    for cls, kind in KINDS.items():
        if isinstance(module, cls):
            return kind
    return "linear" if stores_inputs_first(module) else None


def stores_inputs_first(module: nn.Module) -> bool:
    """True for a linear layer that stores (in, out), such as `Conv1D` of transformers' GPT-2."""
    return isinstance(module, Transposed) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def holds_weight(module: nn.Module) -> bool:
    """False for a cache, whose decision is about what goes into it, and where the weight lies in that of another module.

    >>> holds_weight(nn.Linear(1, 1)), holds_weight(KVCache())
    (True, False)
    """
    return not isinstance(module, KVCache) and isinstance(getattr(module, "weight", None), nn.Parameter)


def weight_of(module: nn.Module) -> nn.Parameter:
    """The weight of a quantizable module.

    Raises:
        TypeError: where it has none.
    """
    weight = module.weight
    if not isinstance(weight, nn.Parameter):
        raise TypeError(f"{type(module).__name__} has no weight")
    return weight


def storage_of(tensor: Tensor) -> tuple[torch.device, int, int]:
    """Where a tensor lies: equal for tied weights, also where each module wraps the memory in a parameter of its own."""
    if tensor.layout is not torch.strided:  # sparse ones lie in several places
        return tensor.device, id(tensor), tensor.numel()
    return tensor.device, memory_of(tensor) + int(tensor.storage_offset()) * tensor.element_size(), tensor.numel()


def channel_axis(module: nn.Module) -> int:
    """Axis of the channels in the input of a module, from the end.

    >>> channel_axis(nn.Linear(3, 2)), channel_axis(nn.Conv2d(3, 2, 1))
    (-1, -3)
    """
    if isinstance(module, Operand):
        return -int(module.kind[4]) - 1 if module.kind.startswith("conv") else -1
    return -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1


def canonical(module: nn.Module) -> Tensor:
    """The weight with output channels first, as quantizers see it: (out, in / groups, ...).

    Transposed convolutions store (in, out / groups, ...) and become (out, in / groups, ...); GPT-2's `Conv1D` stores (in, out).

    >>> canonical(nn.ConvTranspose1d(6, 4, 3, groups=2)).shape
    torch.Size([4, 3, 3])
    """
    weight = weight_of(module)
    if isinstance(module, Operand):
        return module.layout.canonical(weight)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        groups = module.groups
        inputs, outputs, *kernel = weight.shape
        parts = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
        return parts.reshape(groups * outputs, inputs // groups, *kernel)
    if stores_inputs_first(module):
        return weight.transpose(0, 1)
    return weight


def restore(module: nn.Module, weight: Tensor) -> Tensor:
    """Undo `canonical`: lay a weight out as the module stores it."""
    stored = weight_of(module)
    if isinstance(module, Operand):
        return module.layout.restored(weight, stored)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        groups = module.groups
        inputs, outputs, *kernel = stored.shape
        parts = weight.reshape(groups, outputs, inputs // groups, *kernel).transpose(1, 2)
        return parts.reshape(stored.shape).contiguous()
    if stores_inputs_first(module):
        return weight.transpose(0, 1).contiguous()
    return weight
