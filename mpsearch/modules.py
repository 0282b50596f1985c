"""Which modules are quantizable, and how their weights look to a quantizer."""

import torch
from torch import Tensor, nn

from mpsearch.kv_cache import KVCache

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


def kind_of(module: nn.Module) -> str | None:
    """Kind of layer that a module is; None where it is none.

    >>> kind_of(nn.Linear(1, 1)), kind_of(nn.ReLU())
    ('linear', None)
    """
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        return None
    for cls, kind in KINDS.items():
        if isinstance(module, cls):
            return kind
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers' GPT-2: a transposed linear layer
        return "linear"
    return None


def holds_weight(module: nn.Module) -> bool:
    """False for a cache, whose decision is about what goes into it.

    >>> holds_weight(nn.Linear(1, 1)), holds_weight(KVCache())
    (True, False)
    """
    return not isinstance(module, KVCache)


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
    strided = tensor.layout is torch.strided  # sparse ones lie in several places
    return tensor.device, tensor.data_ptr() if strided else id(tensor), tensor.numel()


def channel_axis(module: nn.Module) -> int:
    """Axis of the channels in the input of a module, from the end.

    >>> channel_axis(nn.Linear(3, 2)), channel_axis(nn.Conv2d(3, 2, 1))
    (-1, -3)
    """
    return -1 - len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else -1


def canonical(module: nn.Module) -> Tensor:
    """The weight with output channels first, as quantizers see it: (out, in / groups, ...).

    Transposed convolutions store (in, out / groups, ...) and become (out, in / groups, ...); GPT-2's `Conv1D` stores (in, out).

    >>> canonical(nn.ConvTranspose1d(6, 4, 3, groups=2)).shape
    torch.Size([4, 3, 3])
    """
    weight = weight_of(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        groups = module.groups
        inputs, outputs, *kernel = weight.shape
        parts = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
        return parts.reshape(groups * outputs, inputs // groups, *kernel)
    if type(module).__name__ == "Conv1D":
        return weight.transpose(0, 1)
    return weight


def restore(module: nn.Module, weight: Tensor) -> Tensor:
    """Undo `canonical`: lay a weight out as the module stores it."""
    stored = weight_of(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        groups = module.groups
        inputs, outputs, *kernel = stored.shape
        parts = weight.reshape(groups, outputs, inputs // groups, *kernel).transpose(1, 2)
        return parts.reshape(stored.shape).contiguous()
    if type(module).__name__ == "Conv1D":
        return weight.transpose(0, 1).contiguous()
    return weight
