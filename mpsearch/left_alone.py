"""What a model holds beside the weights that are decided on."""

from collections.abc import Container, Iterator

import torch
from torch import Tensor, nn

from mpsearch.export.storage import Storage
from mpsearch.modules import holds_weight, kind_of, storage_of, weight_of

#: Where a tensor lies; see `modules.storage_of`.
Place = tuple[torch.device, int, int]


def every_tensor(model: nn.Module, *, persistent: bool = False) -> dict[Place, Tensor]:
    """Parameters and buffers, what shares memory once.

    Args:
        model: any module.
        persistent: leave out buffers that a state does not hold.
    """
    return {storage_of(tensor): tensor for tensor in _tensors(model, persistent) if tensor.numel()}


def _tensors(model: nn.Module, persistent: bool) -> Iterator[Tensor]:
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not (persistent and name in module._non_persistent_buffers_set):
                yield buffer


def left_alone_bytes(model: nn.Module, decided: Container[Place], storage: Storage | None) -> int:
    """Bytes of all but some weights.

    Args:
        model: any module.
        decided: where these weights lie.
        storage: of the target, which keeps what a state holds, each tensor in its own way; None: everything as the model has it.

    A bias of 8 numbers takes 32 bytes; in a GGUF file it is float32 even in a model of bfloat16.

    >>> from mpsearch.export.targets import TARGETS
    >>> model = nn.Linear(4, 8).to(torch.bfloat16)
    >>> decided = {storage_of(model.weight)}
    >>> left_alone_bytes(model, decided, None), left_alone_bytes(model, decided, TARGETS["gguf"].storage)
    (16, 32)
    """
    tensors = every_tensor(model, persistent=storage is not None)
    rest = {place: tensor for place, tensor in tensors.items() if place not in decided}
    if storage is None:
        return sum(tensor.numel() * tensor.element_size() for tensor in rest.values())
    of_layers = {storage_of(weight_of(m)) for m in model.modules() if kind_of(m) is not None and holds_weight(m)}
    return sum(
        storage.kept_bytes(tensor.numel(), tensor.element_size(), of_layer=place in of_layers)
        for place, tensor in rest.items()
    )
