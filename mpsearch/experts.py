"""Mixture of experts: which layers belong to an expert, which route, and what an expert without tokens is given."""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpsearch.layer import Layer
from mpsearch.model import Batch, call
from mpsearch.modules import canonical

_NAME = re.compile(r"(?P<block>(?:.+\.)?[^.]*experts)\.(?P<number>\d+)\.(?P<part>.+)")


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


def routers(model: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Layers that choose experts: beside a list of n experts, with n outputs; a gate with one output is such a layer too.

    The experts may lie in tensors of their own shape (n, ...) that are no layers.
    """
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last.endswith("experts"):
            stacked = [len(tensor) for tensor in module._parameters.values() if tensor is not None and tensor.ndim == 3]
            counts[parent] = len(module._modules) if "0" in module._modules else max(stacked, default=-1)
    found = []
    for name, module in layers.items():
        parent, _, last = name.rpartition(".")
        outputs = canonical(module).shape[0]
        if parent in counts and (outputs == counts[parent] or (outputs == 1 and "gate" in last)):
            found.append(name)
    return found


def without_tokens(model: nn.Module, layers: Sequence[Layer], batches: Iterable[Batch]) -> set[str]:
    """Names of layers of experts that no batch gives a token; batches are run only where the first has left some out."""
    idle = {layer.name for layer in layers if layer.macs == 0 and place_of(layer.name)}
    if not idle:
        return idle

    def seen(name: str) -> Any:
        return lambda *_: idle.discard(name)

    handles = [model.get_submodule(name).register_forward_pre_hook(seen(name)) for name in idle]
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
    found = scores.copy()
    for row, place in enumerate(places):
        if unseen[row] and place is not None:
            others = [
                i
                for i, other in enumerate(places)
                if not unseen[i] and other is not None and (other.block, other.part) == (place.block, place.part)
            ]
            found[row] = scores[others].mean(axis=0) if others else np.nan
    return found


def report(unseen: Iterable[str]) -> None:
    """Say which layers were given the mean of others."""
    names = sorted(unseen)
    shown = ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")
    warnings.warn(
        f"no calibration data reached the experts' layers {shown}: scored by the mean of the other experts",
        stacklevel=3,
    )
