"""A decision: layers that share one precision."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpsearch.core.layer import Layer


@dataclass(frozen=True)
class Decision:
    """Layers that share one precision, scored as one.

    Attributes:
        name: the layer's name, or the group's.
        layers: its members.
    """

    name: str
    layers: tuple[Layer, ...]


def decisions_of(layers: Sequence[Layer]) -> list[Decision]:
    """Layers by the precision that they share, in the order of the first of each.

    >>> [decision.name for decision in decisions_of([Layer("q", group="qkv"), Layer("out"), Layer("k", group="qkv")])]
    ['qkv', 'out']
    """
    members: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        members.setdefault(layer.decision, []).append(layer)
    return [Decision(name, tuple(group)) for (_, name), group in members.items()]
