"""Mixture of experts: which layers belong to an expert, which route, and the scores of an expert without tokens."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.errors import warn
from mpsearch.models.modules.operand import Operand
from mpsearch.models.modules.weights import canonical, layer_of
from mpsearch.models.running import Batch, call

_NAME = re.compile(r"(?P<block>(?:.+\.)?[^.]*experts)\.(?:[a-z]*_)?(?P<number>\d+)\.(?P<part>.+)")
_ROUTER = re.compile(r"router|gat(e|ing)|switch")


@dataclass(frozen=True)
class Place:
    """Where a layer stands among experts.

    Attributes:
        block: name of the module that holds the experts.
        number: of the expert.
        part: name of the layer within the expert.
    """

    block: str
    number: int
    part: str


def place_of(name: str) -> Place | None:
    """Where a layer stands among experts, by its name; None for a layer of no expert.

    >>> place_of("model.layers.0.mlp.experts.3.down_proj")
    Place(block='model.layers.0.mlp.experts', number=3, part='down_proj')
    >>> place_of("model.layers.0.mlp.shared_expert.down_proj")
    """
    match = _NAME.fullmatch(name)
    return None if match is None else Place(match["block"], int(match["number"]), match["part"])


def without_number(name: str) -> str:
    """The name of a layer of an expert without the number of the expert; any other name as it is.

    >>> without_number("mlp.local_experts.3.w1"), without_number("mlp.experts.expert_3.wi"), without_number("mlp.gate")
    ('mlp.local_experts.w1', 'mlp.experts.wi', 'mlp.gate')
    """
    place = place_of(name)
    return name if place is None else f"{place.block}.{place.part}"


def routers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Layers that choose experts: beside n experts, with n outputs; a gate with one output is such a layer too.

    The experts may lie in tensors of their own, stacked or behind each other. A router may be one module deeper than they (`router.layer`).

    >>> block = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), "router": nn.Sequential(nn.Linear(4, 3))})
    >>> routers(block, {"experts.0": block["experts"][0], "router.0": block["router"][0]})
    ['router.0']
    """
    counts: dict[str, set[int]] = {}  # block -> numbers of experts
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last.endswith("experts"):
            stacked = [len(tensor) for tensor in module._parameters.values() if tensor is not None and tensor.ndim == 3]
            numbered = [key for key in module._modules if key.rpartition("_")[2].isdigit()]
            counts.setdefault(parent, set()).update([*stacked[:1], *([len(numbered)] if numbered else [])])
    for name, module in layers.items():
        if (
            isinstance(module, Operand)
            and module.layout.matrices > 1
            and (module.weight.ndim == 3 or "experts" in name)
        ):
            holder = name.rpartition(".")[0]
            for block in {holder, _beside_experts(holder)}:
                counts.setdefault(block, set()).add(module.layout.matrices)
    names: list[str] = []
    for name, module in layers.items():
        parent, _, last = name.rpartition(".")
        above, _, within = parent.rpartition(".")
        outputs = canonical(module).shape[0]
        beside = counts.get(parent, ())
        deeper = counts.get(above, ()) if _ROUTER.search(within) else ()
        if outputs in beside or outputs in deeper or (outputs == 1 and "gate" in last and beside):
            names.append(name)
    return names


def _beside_experts(name: str) -> str:
    """The block that a module named `...experts`, or one in it, stands in; the name itself where there is none."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.endswith("experts")]
    return ".".join(parts[: places[-1]]) if places else name


def without_tokens(model: nn.Module, layers: Sequence[Layer], batches: Iterable[Batch]) -> set[str]:
    """Names of layers of experts that no batch gives a token; batches are run only where the first has left some out."""
    idle = {layer.name for layer in layers if layer.macs == 0 and place_of(layer.name)}
    if not idle:
        return idle

    def seen(name: str) -> Any:
        return lambda *_: idle.discard(name)

    handles = [layer_of(model, name).register_forward_pre_hook(seen(name)) for name in idle]
    try:
        with torch.no_grad():
            for batch in batches:
                if idle:
                    call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return idle


def filled(scores: NDArray[np.float64], layers: Sequence[Layer], unseen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Scores with those of layers that saw no token replaced by the mean of the same part of the block's other experts.

    Args:
        scores: (L, P).
        layers: L.
        unseen: (L,) whether its whole decision saw no token.

    Returns:
        (L, P); nan = not allowed where no other expert saw a token either.

    >>> layers = [Layer(f"experts.{number}.w1") for number in range(3)]
    >>> filled(np.array([[4.0], [0.0], [2.0]]), layers, np.array([False, True, False])).ravel().tolist()
    [4.0, 3.0, 2.0]
    """
    places = [place_of(layer.name) for layer in layers]
    complete = scores.copy()
    seen: dict[tuple[str, str], list[int]] = {}
    for row, place in enumerate(places):
        if place is not None and not unseen[row]:
            seen.setdefault((place.block, place.part), []).append(row)
    for row, place in enumerate(places):
        if place is not None and unseen[row]:
            others = seen.get((place.block, place.part))
            complete[row] = scores[others].mean(axis=0) if others else np.nan
    return complete


def report(unseen: Iterable[str]) -> None:
    """Warn of layers whose score is the mean of other experts'."""
    names = sorted(unseen)
    shown = ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
    warn(f"no calibration data reached the experts' layers {shown}: scored by the mean of the other experts")
