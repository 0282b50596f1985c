"""Bytes of a whole model: of the weights that are decided on, and of what is left alone."""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.models.modules.decomposing import decomposed
from mpsearch.models.modules.weights import canonical, holds_weight, kind_of, layer_of, storage_of, weight_of
from mpsearch.targets.rules import Target
from mpsearch.targets.storage import Storage

#: Where a tensor lies; see `modules.storage_of`.
Place = tuple[torch.device, int, int]


@dataclass(frozen=True)
class Holder:
    """A layer and the memory that holds its weight.

    Attributes:
        layer: with shape and dtype of the weight.
        place: of the weight.
        repeated: a layer before it has the same memory.
    """

    layer: Layer
    place: Place
    repeated: bool

    def counts(self, precision: Precision, storage: Storage | None) -> bool:
        """True where bytes of the layer add to those of the layers before it.

        Args:
            precision: of the layer.
            storage: of the target; None: what shares memory stays one.
        """
        return not self.repeated or (storage is not None and storage.unties and precision.quantizes_weight)


def holders(model: nn.Module, layers: Sequence[Layer]) -> list[Holder]:
    """The layers that hold a weight, in their order; caches hold none.

    Args:
        model: taken apart as for the search, see `decomposed`.
        layers: their names are those of modules in it.
    """
    seen: set[Place] = set()
    rows = []
    for layer in layers:
        module = layer_of(model, layer.name)
        if not holds_weight(module):
            continue
        weight = weight_of(module)
        place = storage_of(weight)
        shape = layer.weight_shape or tuple(canonical(module).shape)
        whole = replace(layer, weight_shape=shape, dtype=str(weight.dtype).removeprefix("torch."))
        rows.append(Holder(whole, place, place in seen))
        seen.add(place)
    return rows


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

    A bias of 8 numbers takes 16 bytes in bfloat16; in a GGUF file it is float32.

    >>> from mpsearch.targets.rules import TARGETS
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


@dataclass(frozen=True)
class PlanBytes:
    """Bytes of a model under a plan, as a target stores them.

    Attributes:
        layers: of each layer of the plan; 0 where it has the codes of one before it.
        left_alone: of all else.
    """

    layers: Mapping[str, int]
    left_alone: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.layers.values()) + self.left_alone


def plan_bytes(plan: Mapping[str, Precision], model: nn.Module, target: Target, *, symmetric: bool = True) -> PlanBytes:
    """Bytes of a model under a plan, as a target stores them.

    Args:
        plan: precisions that the target has.
        model: it stays as it is.
        target: its `storage` tells.
        symmetric: the quantizer has no zero-points; for the targets that leave that open.

    Raises:
        EstimatorError: where a format cannot hold the rows of a layer.

    >>> from mpsearch.targets.rules import TARGETS
    >>> plan_bytes({"0": Precision("4")}, nn.Sequential(nn.Linear(4, 8)), TARGETS["torchao"])
    PlanBytes(layers={'0': 72}, left_alone=32)
    """
    with decomposed(model):
        held = holders(model, [Layer(name) for name in plan])
        layers = {
            one.layer.name: target.stored_bytes(one.layer, plan[one.layer.name], symmetric=symmetric)
            if one.counts(plan[one.layer.name], target.storage)
            else 0
            for one in held
        }
        return PlanBytes(layers, left_alone_bytes(model, {one.place for one in held}, target.storage))
