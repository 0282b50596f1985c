"""Groups of layers that share one precision, each with its reason."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mpsearch.errors import TableError, nearest
from mpsearch.models.graph import DataFlow
from mpsearch.models.modules.experts import place_of
from mpsearch.models.modules.weights import kind_of, storage_of, weight_of
from mpsearch.targets.rules import FUSED, Fused, fused_groups


@dataclass(frozen=True)
class Group:
    """Layers that share one precision.

    Attributes:
        members: names, in the order of the model.
        reason: why.
        binding: True where nothing but one precision is possible: one tensor in memory, one matrix of the target.
    """

    members: tuple[str, ...]
    reason: str
    binding: bool = False


def shared_weights(layers: Mapping[str, nn.Module]) -> list[Group]:
    """Layers with one weight.

    >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> second.weight = first.weight
    >>> shared_weights({"a": first, "b": second})
    [Group(members=('a', 'b'), reason='shared weight', binding=True)]
    """
    holders: dict[tuple[torch.device, int, int], list[str]] = {}
    for name, module in layers.items():
        holders.setdefault(storage_of(weight_of(module)), []).append(name)
    return [Group(tuple(names), "shared weight", binding=True) for names in holders.values() if len(names) > 1]


def same_input(layers: Mapping[str, nn.Module], flow: DataFlow) -> list[Group]:
    """Linear layers that read the same tensor in every call and whose outputs meet in a product (q/k/v, gate/up, w1/w3).

    These are what engines compute as one matrix product. Heads and routers read the same tensor too, but go separate ways. Where
    the flow does not show the product, usual names do. An expert that the example gave no token is grouped as the others of its block.
    """
    readers: dict[tuple[object, ...], list[str]] = {}
    for name, reads in flow.reads.items():
        if kind_of(layers[name]) == "linear":
            readers.setdefault(tuple(reads), []).append(name)
    reasons: dict[tuple[str, ...], str] = {}
    done: set[tuple[str, tuple[str, ...]]] = set()
    meetings: dict[str, list[frozenset[str]]] = {}
    for pair in flow.multiplied:
        for name in pair:
            meetings.setdefault(name, []).append(pair)
    for names in readers.values():
        met = connected(names, [pair for name in names for pair in meetings.get(name, ())])
        reasons |= dict.fromkeys(met, "same input")
        for part in fused_groups(names, FUSED).values():
            if len(part) > 1 and not any(set(part) <= set(members) for members in met):
                reasons[part] = "same input, by name"
    blocks: dict[str, dict[int, dict[str, str]]] = {}  # block -> number -> part -> name
    for name in layers:
        if place := place_of(name):
            blocks.setdefault(place.block, {}).setdefault(place.number, {})[place.part] = name
    for part, reason in list(reasons.items()):
        places = [place for place in map(place_of, part) if place is not None]
        if len(places) == len(part) and len({(place.block, place.number) for place in places}) == 1:
            experts = blocks[places[0].block]
            wanted = tuple(place.part for place in places)
            if (key := (places[0].block, wanted)) not in done:
                done.add(key)
                reasons |= dict.fromkeys(_of_idle_experts(wanted, experts, flow), reason)
    return [Group(members, reason) for members, reason in reasons.items()]


def connected(names: Sequence[str], pairs: Iterable[frozenset[str]]) -> list[tuple[str, ...]]:
    """Connected components of two names and more, in the order of the names.

    >>> connected(["q", "gate", "k", "v"], [frozenset("kq"), frozenset("kv"), frozenset({"gate", "other"})])
    [('q', 'k', 'v')]
    """
    root = {name: name for name in names}

    def root_of(name: str) -> str:
        while root[name] != name:
            root[name] = name = root[root[name]]
        return name

    for pair in pairs:
        if pair <= root.keys():
            first, *others = map(root_of, pair)
            root.update(dict.fromkeys(others, first))
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(root_of(name), []).append(name)
    return [tuple(together) for together in members.values() if len(together) > 1]


def _of_idle_experts(
    parts: Sequence[str], experts: Mapping[int, Mapping[str, str]], flow: DataFlow
) -> list[tuple[str, ...]]:
    """The same parts in the experts of a block that were not called."""
    groups = []
    for _, names in sorted(experts.items()):
        if all(part in names and names[part] not in flow.reads for part in parts):
            groups.append(tuple(names[part] for part in parts))
    return groups


def residual_operands(flow: DataFlow) -> list[Group]:
    """Layers whose outputs are added, through norms and activation functions: for targets that need equal scales there."""
    return [Group(members, "outputs added") for members in connected(list(flow.reads), flow.added)]


def joined_by(target: str, fused: Fused, names: Iterable[str]) -> list[Group]:
    """What a target joins at run time, by the names that it goes by."""
    groups = fused_groups(names, fused).values()
    return [Group(members, f"one matrix in {target}", binding=True) for members in groups if len(members) > 1]


def whole_blocks(names: Iterable[str]) -> list[Group]:
    """All layers of all experts of a block."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        if place := place_of(name):
            blocks.setdefault(place.block, []).append(name)
    return [Group(tuple(members), "experts of one block") for members in blocks.values() if len(members) > 1]


def without(groups: Iterable[Group], patterns: Sequence[str], names: Iterable[str]) -> list[Group]:
    """Groups with the layers taken out that patterns match.

    Raises:
        TableError: for a pattern that matches no layer, or one that would split a group that cannot be.
    """
    cut: set[str] = set()
    for pattern in patterns:
        cut.update(matching(pattern, names, "cut"))
    remaining = []
    for group in groups:
        members = tuple(name for name in group.members if name not in cut)
        if group.binding:
            remaining.append(group)
        elif len(members) > 1:
            remaining.append(Group(members, group.reason))
    bound = [(name, group) for group in groups if group.binding for name in group.members if name in cut]
    for name, group in bound:
        if name in patterns:
            rest = ", ".join(other for other in group.members if other != name)
            raise TableError(f"{name!r} cannot be cut from {rest}: {group.reason}")
    return remaining


def matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    """Names that a pattern matches.

    Raises:
        TableError: where there is none.
    """
    names = list(names)
    matches = fnmatch.filter(names, pattern)
    if not matches:
        raise TableError(f"{what}={pattern!r} matches no layer{nearest(pattern, names)}")
    return matches


def named(groups: Sequence[Group], own: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, str]:
    """Name of the group of each layer, with its reasons; empty for a layer of its own.

    Args:
        groups: found; those that overlap become one.
        own: title -> names or patterns, the user's.
        names: all layers.

    Raises:
        TableError: for a name that is no layer, a layer in two groups, or a part of a group that was found.

    >>> named([Group(("a", "b"), "shared weight"), Group(("b", "c"), "same input")], {}, ["a", "b", "c", "d"])
    {'a': 'a (shared weight, same input)', 'b': 'a (shared weight, same input)', 'c': 'a (shared weight, same input)', 'd': ''}
    """
    title = dict.fromkeys(names, "")
    links = [frozenset((group.members[0], other)) for group in groups for other in group.members]
    part_of = {name: members for members in connected(names, links) for name in members}
    reasons: dict[str, dict[str, None]] = {}  # first of the part -> why
    for group in groups:
        parts = {part_of.get(name, (name,))[0] for name in group.members}
        if len(parts) == 1:
            reasons.setdefault(parts.pop(), {})[group.reason] = None
    title |= {name: f"{part[0]} ({', '.join(reasons.get(part[0], ()))})" for name, part in part_of.items()}
    own_titles: dict[str, str] = {}
    groups_of: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        for name in group.members:
            groups_of.setdefault(name, []).append(number)
    for own_title, patterns in own.items():
        members_of = [name for pattern in patterns for name in fnmatch.filter(names, pattern) or [pattern]]
        for name in members_of:
            if name not in title:
                raise TableError(f"group {own_title!r} names {name!r}, which is no layer{nearest(name, names)}")
            if own_titles.setdefault(name, own_title) != own_title:
                raise TableError(f"{name!r} is in two groups, {own_titles[name]!r} and {own_title!r}")
        for group in [groups[number] for number in sorted({n for name in members_of for n in groups_of.get(name, ())})]:
            inside = set(group.members) & set(members_of)
            if not set(group.members) <= inside:
                raise TableError(
                    f"group {own_title!r} splits the layers {', '.join(group.members)} ({group.reason})"
                    + ("" if group.binding else f"; cut={sorted(inside)} takes them out of that group")
                )
    return title | own_titles
