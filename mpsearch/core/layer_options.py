"""Options of single layers: which precisions a layer may have, by name or pattern, or as a plan that is decided already."""

import fnmatch
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from mpsearch.core.layer import Layer
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision, precisions
from mpsearch.core.settings import check_kind
from mpsearch.core.wrapped_names import by_names_of
from mpsearch.errors import TableError, nearest

#: Precisions as text (`w2 w4`), one, or several.
Options = str | Precision | Sequence[Precision]
#: Layers that share a precision, as `mps.layers` takes them.
Groups = Literal["auto", "fused", "none"] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class LayerOptions:
    """Which layers are decided on, and what each may have: all that `mps.layers` is asked, in one object.

    `profile`, `search` and `Calibration` take it in place of a list of layers, and then find the layers themselves.

    Attributes:
        exclude: names or patterns (`encoder.*`) of layers to leave alone.
        groups: layers that share a precision: `auto`, `fused`, `none`, or name -> layers or patterns.
        cut: names or patterns of layers to take out of the groups that are found.
        target: a name in `mpsearch.export.TARGETS`: what it joins is grouped, what it cannot express is not allowed.
        experts: decide on `each` expert, or on a whole `block` of them at once.
        decide_routers: routers of experts are decisions too.
        tie_residuals: layers whose outputs are added share a precision.
        kv_cache: keys and values of each attention layer are decisions too.
        allow: name or pattern -> precisions that those layers may have; of several that match a layer the last one counts.
        fixed: what is decided already: a plan, the file of one, or name or pattern -> one precision.

    >>> LayerOptions(exclude=["lm_head"], target="hqq").finding["target"]
    'hqq'
    """

    exclude: Sequence[str] = ()
    groups: Groups = "auto"
    cut: Sequence[str] = ()
    target: str | None = None
    experts: Literal["each", "block"] = "each"
    decide_routers: bool = False
    tie_residuals: bool = False
    kv_cache: bool = False
    allow: Mapping[str, Options] | None = None
    fixed: Mapping[str, str | Precision] | str | os.PathLike[str] | None = None

    @property
    def finding(self) -> dict[str, Any]:
        """Keywords of `mps.layers` that say which layers there are; `allow` and `fixed` say what they may have (`with_options`)."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in ("allow", "fixed")}


def layers_and_options(
    layers: "Sequence[Layer] | LayerOptions | None",
    *,
    exclude: Sequence[str] = (),
    groups: Groups = "auto",
    allow: Mapping[str, Options] | None = None,
    fixed: Mapping[str, str | Precision] | str | os.PathLike[str] | None = None,
) -> tuple[Sequence[Layer] | None, LayerOptions]:
    """The layers that a door was given, None where it has to find them, and the options, from one object or from single keywords.

    Raises:
        TableError: for options in both places.

    >>> layers_and_options(LayerOptions(exclude=["head"]))[1].exclude
    ['head']
    >>> layers_and_options(LayerOptions(), exclude=["head"])
    Traceback (most recent call last):
    mpsearch.errors.TableError: layers=LayerOptions(...) and exclude= at once: put exclude into the LayerOptions
    """
    single = LayerOptions(exclude=tuple(exclude), groups=groups, allow=allow, fixed=fixed)
    if not isinstance(layers, LayerOptions):
        return layers, single
    default = vars(LayerOptions())
    twice = [name for name, value in vars(single).items() if value != default[name]]
    if twice:
        raise TableError(
            f"layers=LayerOptions(...) and {twice[0]}= at once: put {', '.join(twice)} into the LayerOptions"
        )
    return None, layers


def with_options(
    layers: Sequence[Layer],
    allow: Mapping[str, Options] | None = None,
    fixed: Mapping[str, str | Precision] | str | os.PathLike[str] | None = None,
) -> list[Layer]:
    """Layers with their own options.

    Args:
        layers: the decisions.
        allow: name or pattern -> precisions; of several that match a layer the last one counts.
        fixed: what is decided already: a plan, the file of one, or name or pattern -> one precision; it counts before `allow`.

    Raises:
        TableError: for a pattern that matches no layer, no precision, several in `fixed`, or a group without an option in common.

    >>> decisions = with_options([Layer("fc1"), Layer("fc2"), Layer("head")], {"fc*": "w2 w4", "fc2": "w4"}, {"head": "w8"})
    >>> [(layer.name, " ".join(map(str, layer.allowed))) for layer in decisions]
    [('fc1', 'w2 w4'), ('fc2', 'w4'), ('head', 'w8')]
    """
    decided = Plan.load(fixed) if isinstance(fixed, str | os.PathLike) else fixed or {}
    check_kind(layers, list | tuple, "layers, of mps.layers(model, batch)", TableError)
    for layer in layers:
        check_kind(layer, Layer, "layers, of mps.layers(model, batch)", TableError)
    names = [layer.name for layer in layers]
    if isinstance(decided, Plan):
        decided = by_names_of(decided, names)
    own: dict[str, tuple[Precision, ...]] = {}
    for what, choices in (("allow", allow or {}), ("fixed", decided)):
        if not isinstance(choices, Mapping):
            raise TableError(f"{what}={choices!r}: expected a mapping from names or patterns of layers to precisions")
        for pattern, value in choices.items():
            options = _options(what, pattern, value)
            if what == "fixed" and len(options) != 1:
                raise TableError(
                    f"fixed: {pattern!r} has {len(options)} precisions, expected one; give several in allow"
                )
            matching = [pattern] if pattern in names else fnmatch.filter(names, pattern)
            if not matching:
                raise TableError(f"{what}: {pattern!r} matches no layer{nearest(pattern, names)}")
            own |= dict.fromkeys(matching, options)
    decisions = [replace(layer, allowed=own.get(layer.name, layer.allowed)) for layer in layers]
    _check_groups(decisions)
    return decisions


def columns(layers: Sequence[Layer], options: Sequence[Precision]) -> tuple[list[Layer], tuple[Precision, ...]]:
    """Layers and columns of a table: options that are named for single layers alone come last, and are not allowed in others.

    >>> layers, options = columns([Layer("a"), Layer("b", allowed=precisions("w8"))], precisions("w2 w4"))
    >>> [str(option) for option in options], [str(option) for option in layers[0].allowed]
    (['w2', 'w4', 'w8'], ['w2', 'w4'])
    """
    added = dict.fromkeys(option for layer in layers for option in layer.allowed if option not in options)
    if not added:
        return list(layers), tuple(options)
    every = [layer if layer.allowed else replace(layer, allowed=tuple(options)) for layer in layers]
    return every, (*options, *added)


def _options(what: str, pattern: str, value: Options) -> tuple[Precision, ...]:
    options = (
        precisions(value) if isinstance(value, str) else (value,) if isinstance(value, Precision) else tuple(value)
    )
    wrong = next((option for option in options if not isinstance(option, Precision)), None)
    if wrong is not None or not options:
        raise TableError(f"{what}: {pattern!r} has {value!r}, expected precisions such as 'w2 w4'")
    return options


def _check_groups(layers: Sequence[Layer]) -> None:
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.group and layer.allowed:
            groups.setdefault(layer.group, []).append(layer)
    for members in groups.values():
        if not set.intersection(*(set(layer.allowed) for layer in members)):
            each = "; ".join(f"{layer.name} {' '.join(map(str, layer.allowed))}" for layer in members)
            raise TableError(
                f"layers of the group {members[0].group!r} share one precision, but have no option in common: {each}; give all of them the "
                "same, or take one out of the group (cut)"
            )
