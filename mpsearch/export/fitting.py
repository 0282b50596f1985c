"""The door of every exporter: a plan checked against a model and a target, and moved to what the target has."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.core.wrapped_names import by_names_of
from mpsearch.decisions.coverage import tell_unnamed
from mpsearch.decisions.model_bytes import plan_bytes
from mpsearch.errors import EstimatorError, ExportError, nearest, warn
from mpsearch.models.modules.decomposing import decomposed
from mpsearch.models.modules.experts import place_of
from mpsearch.models.modules.weights import canonical, holds_weight, kind_of, storage_of, weight_of
from mpsearch.quantizers import ggml
from mpsearch.quantizers.packing import packed_bytes
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.targets.rules import TARGETS, Fused, Target, fused_groups, rules

#: Share by which bytes that are told and bytes that are stored may differ: constants of a graph, a header.
_SAME_BYTES = 0.01


@dataclass(frozen=True)
class Snapped:
    """A plan moved to what a target can express.

    Attributes:
        plan: the new plan; its usage holds what can be recomputed, `memory_bytes` as the target stores it, where the old plan told it.
        changes: layer -> precision before, precision after, why.
        target: the target.
    """

    plan: Plan
    changes: Mapping[str, tuple[Precision, Precision, str]]
    target: str

    def __str__(self) -> str:
        if not self.changes:
            return f"{self.target} expresses the plan as it is"
        lines = [f"{name}: {before} -> {after}" for name, (before, after, _) in self.changes.items()]
        used = self.plan.usage.get("memory_bytes")
        tail = "" if used is None else f"; memory_bytes is now {used:.0f}, as {self.target} stores it"
        return f"{len(lines)} of {len(self.plan)} layers moved to what {self.target} has: {', '.join(lines)}{tail}"


def fitted(
    plan: Plan,
    model: nn.Module | None,
    target: str,
    *,
    snap: bool = False,
    vllm: bool | None = None,
    symmetric: bool = True,
) -> Plan:
    """The plan, once it is certain that the target carries it out as it stands.

    A warning tells where the plan's `memory_bytes` is not what the target stores.

    Args:
        plan: any plan.
        model: the model; without it, only what the plan alone tells is checked.
        target: a name in `TARGETS`.
        snap: move what the target cannot express instead of refusing it, and say so in a warning.
        vllm: the exporter's option, as for `rules`.
        symmetric: the exporter's quantizer has no zero-points.

    Raises:
        ExportError: with layer, precision and what the target can.
    """
    plan = named_in(plan, model)
    if snap:
        moved = snapped(plan, model, target, vllm=vllm, symmetric=symmetric)
        if moved.changes:
            warn(str(moved))
            return moved.plan
    known, layers = rules(target, vllm), described(plan, model, target)
    if model is not None:
        with decomposed(model):
            named = [model.get_submodule(layer.name) for layer in layers.values()]
            tell_unnamed(model, [weight_of(module) for module in named if holds_weight(module)], len(plan))
    for layer in layers.values():
        reason = known.refusal(layer, plan[layer.name])
        if reason:
            raise ExportError(f"{reason}; snap=True (--snap) moves it to the nearest")
    plan = _reached(plan, layers)
    for title, names in joined(plan, model, known.fused):
        if len({_effect(plan, name) for name in names}) > 1:
            choices = ", ".join(f"{name} {plan.get(name, 'left alone')}" for name in names)
            raise ExportError(f"{target} needs one precision for layers that {title}: {choices}")
    if model is not None and "memory_bytes" in plan.usage:
        difference = differing(plan.usage["memory_bytes"], plan_bytes(plan, model, known, symmetric=symmetric).total)
        if difference:
            warn(f"{difference} as {target} stores it; {counted_for(target)}")
    return plan


def differing(told: float, stored: int) -> str | None:
    """Both numbers of bytes where they differ by more than 1 %; else None.

    >>> differing(1000.0, 1009), differing(31488.0, 43008)
    (None, 'memory_bytes of the plan is 31488, but 43008 (+37 %)')
    """
    if abs(stored - told) <= _SAME_BYTES * told:
        return None
    change = f" ({stored / told - 1:+.0%})".replace("%", " %") if told > 0 else ""
    return f"memory_bytes of the plan is {told:.0f}, but {stored}{change}"


def counted_for(target: str) -> str:
    """What to do about it."""
    return f"search and solve with layers(..., target={target!r}) (--target {target}), which counts that"


def snapped(
    plan: Plan, model: nn.Module | None, target: str, *, vllm: bool | None = None, symmetric: bool = True
) -> Snapped:
    """The nearest plan that the target can express, every layer (or group of joined layers) at no more bytes.

    Nearest in weight bits, then in the weight's format, then in activation bits, then in group size. What is compared are the bytes of the
    reference quantizer, packed codes and scales; the new plan tells those that the target stores.

    Args:
        plan: any plan.
        model: its layers' shapes tell the bytes.
        target: a name in `TARGETS`.
        vllm: the exporter's option, as for `rules`: layers that are fused at run time move together.
        symmetric: the exporter's quantizer has no zero-points.

    Raises:
        ExportError: without a model, or where nothing that the target has is small enough.
    """
    if model is None:
        raise ExportError("snap=True (--snap) needs the model: bytes depend on the shapes of its layers")
    plan = named_in(plan, model)
    known, layers = rules(target, vllm), described(plan, model, target)
    plan = _reached(plan, layers)
    groups = joined(plan, model, known.fused)
    grouped = {name for _, names in groups for name in names}
    units = [tuple(n for n in names if n in plan) for _, names in groups] + [(n,) for n in plan if n not in grouped]
    partial = {name for _, names in groups for name in names if name not in plan}
    moved: dict[str, Precision] = {}
    for unit in units:
        moved.update(dict.fromkeys(unit, _nearest([layers[name] for name in unit], plan, known)))
    for title, names in groups:
        stray = [name for name in names if name in partial]
        if stray and any(_effect(Plan(moved), name) for name in names):
            raise ExportError(
                f"{target} needs one precision for layers that {title}; the plan leaves {stray[0]!r} alone"
            )
    changes = {
        name: (plan[name], moved[name], known.refusal(layers[name], plan[name]) or "joined layers agree")
        for name in plan
        if moved[name] != plan[name]
    }
    if not changes:
        return Snapped(plan, {}, target)
    usage = {}
    if "memory_bytes" in plan.usage:
        usage["memory_bytes"] = float(plan_bytes(moved, model, known, symmetric=symmetric).total)
    origin = {
        **plan.origin,
        "snapped": {"target": target, "from": {name: str(b) for name, (b, _, _) in changes.items()}},
    }
    return Snapped(
        replace(plan, layers={n: moved[n] for n in plan}, predicted={}, usage=usage, origin=origin), changes, target
    )


def named_in(plan: Plan, model: nn.Module | None) -> Plan:
    """The plan by the names of a model, of which one may be wrapped and the other not; without a model, as torch.compile found it."""
    if model is None:
        names = [name.replace("_orig_mod.", "") for name in plan]
    else:
        with decomposed(model):
            names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return by_names_of(plan, names)


def described(plan: Plan, model: nn.Module | None, target: str | None = None) -> dict[str, Layer]:
    """Kind and weight shape of the layers of a plan, from the model.

    Args:
        plan: the plan.
        model: the model.
        target: that carries it out, on modules as they are: what it cannot reach must be left alone, and is left out. None: nobody,
            so that the parts that `decomposed` makes are layers too.

    Raises:
        ExportError: for a name that is no quantizable layer of the model, or none that the target can reach.
    """
    if model is None:
        return {name: Layer(name) for name in plan}
    own = dict(model.named_modules(remove_duplicate=False))
    with decomposed(model):
        modules = dict(model.named_modules(remove_duplicate=False))
    known = [name for name, module in modules.items() if kind_of(module) is not None]
    layers = {}
    for name in plan:
        kind = kind_of(modules[name]) if name in modules else None
        if kind is None and _is_matrix(name, model):  # functions read it, and no layer holds it
            if _effect(plan, name):
                raise ExportError(
                    f"{target or 'the exporter'} cannot express {plan[name]} for {name!r}: a parameter that functions read, of no layer "
                    "that other tools know; plan w16, or leave it out, as layers(..., target=...) (--target) does"
                )
            continue
        if kind is None:
            raise ExportError(
                f"the plan names {name!r}, which is no quantizable layer of the model{nearest(name, known)}"
            )
        stacked = target is not None and TARGETS[target].stacked and name not in own and place_of(name) is not None
        reason = None if target is None or stacked else _out_of_reach(name, kind, own)
        if reason is not None:
            if _effect(plan, name):
                raise ExportError(f"{target} cannot express {plan[name]} for {name!r}: {reason}")
            continue
        weight = canonical(modules[name])
        if kind == "linear" and not isinstance(modules[name], nn.Linear):
            kind = "transposed linear"  # GPT-2's Conv1D, which other tools do not know
        dtype = str(weight.dtype).removeprefix("torch.")
        layers[name] = Layer(name, kind, tuple(weight.shape), dtype=dtype)
    return layers


def _is_matrix(name: str, model: nn.Module) -> bool:
    """True for the name of a parameter of two dimensions and more of no layer, or of a module that holds one as its `weight`."""
    own = dict(model.named_parameters())
    matrices = [key for key in (name, f"{name}.weight") if key in own and own[key].ndim > 1]
    return any(kind_of(model.get_submodule(key.rpartition(".")[0])) is None for key in matrices)


def _out_of_reach(name: str, kind: str, own: Mapping[str, nn.Module]) -> str | None:
    """Why another tool would pass a layer over, or put its codes where nobody reads them; None where it would not.

    Args:
        name: of a layer inside `decomposed`.
        kind: of the layer.
        own: the modules of the model outside.
    """
    if kind == "kv_cache":
        return "it quantizes weights, and this is a cache of keys or values; plan w16, or leave it out"
    whole = name.rpartition(".")[0]
    while whole not in own:
        whole = whole.rpartition(".")[0]
    if name not in own or isinstance(
        own[whole], nn.MultiheadAttention
    ):  # which reads the weight of its out_proj itself
        takers = ", ".join(target for target, rule in TARGETS.items() if rule.stacked)
        return (
            f"it is a part of {whole!r}, a {type(own[whole]).__name__}, which is one module to other tools; leave it out, as "
            f"layers(..., target=...) (--target) does{f', or take one of {takers}' if place_of(name) else ''}"
        )
    if kind_of(own[name]) is None:
        return (
            "its weight is computed from other tensors; torch.nn.utils.parametrize.remove_parametrizations (or "
            "torch.nn.utils.remove_weight_norm) makes it one of its own"
        )
    return None


def _reached(plan: Plan, layers: Mapping[str, Layer]) -> Plan:
    """The plan without the layers that were left out; itself where none was."""
    return plan if len(layers) == len(plan) else replace(plan, layers={name: plan[name] for name in layers})


def joined(plan: Plan, model: nn.Module | None, fused: Fused) -> list[tuple[str, tuple[str, ...]]]:
    """Layers that must share a precision: why, and their names, whether the plan names them or not.

    Args:
        plan: some of their names.
        model: finds shared weights, and members that the plan does not name.
        fused: what is joined at run time.
    """
    names = list(plan)
    groups: list[tuple[str, tuple[str, ...]]] = []
    if model is not None:
        with decomposed(model):
            every = dict(model.named_modules(remove_duplicate=False))
        modules = {n: m for n, m in every.items() if kind_of(m) is not None and holds_weight(m)}
        names = list(modules)
        holders: dict[tuple[torch.device, int, int], list[str]] = {}
        for name, module in modules.items():
            holders.setdefault(storage_of(weight_of(module)), []).append(name)
        groups += [("share a weight", tuple(tied)) for tied in holders.values() if len(tied) > 1]
    groups += [
        ("are fused at run time", members) for members in fused_groups(names, fused).values() if len(members) > 1
    ]
    return [(title, group) for title, group in groups if any(name in plan for name in group)]


def group_size(size: int, columns: int, planned: Precision) -> int | None:
    """A group as wide as the weight and a scale an output channel are the same thing: as the plan writes it."""
    return planned.group_size if size == columns and planned.group_size in (None, columns) else size


def _effect(plan: Plan, name: str) -> Precision | None:
    """The precision; None where the layer is left alone, by name or by not being named."""
    precision = plan[name] if name in plan else Precision("16")
    return precision if precision.quantizes_weight or precision.quantizes_activation else None


def _bytes(layer: Layer, precision: Precision) -> int:
    outputs = layer.weight_shape[0] if len(layer.weight_shape) > 1 else 1
    try:
        return packed_bytes(layer.numel, outputs, layer.dtype_bytes, precision, RoundToNearest())
    except EstimatorError:  # a block type on rows that it cannot hold: what as many whole blocks take
        block = ggml.TYPES[precision.weight]
        return -(-layer.numel * block.nbytes // block.size)


def _nearest(layers: Sequence[Layer], plan: Plan, target: Target) -> Precision:
    """The precision that all of the layers can have, nearest to theirs at no more bytes in all."""
    wanted = [plan[layer.name] for layer in layers]
    if len(set(wanted)) == 1 and not any(target.refusal(layer, p) for layer, p in zip(layers, wanted, strict=True)):
        return wanted[0]
    sizes = {precision.group_size for precision in wanted}
    offers = set.intersection(*(target.offers(layer, sizes) for layer in layers))
    limit = sum(_bytes(layer, p) for layer, p in zip(layers, wanted, strict=True))
    fitting = [p for p in offers if sum(_bytes(layer, p) for layer in layers) <= limit]
    if not fitting:
        names = ", ".join(repr(layer.name) for layer in layers)
        raise ExportError(f"nothing that {target.name} has for {names} takes at most the {limit} bytes of {wanted[0]}")

    def distance(precision: Precision) -> tuple[float, ...]:
        own = list(zip(layers, wanted, strict=True))
        return (
            sum(abs(precision.weight_bits - p.weight_bits) for p in wanted),
            sum(precision.weight != p.weight for p in wanted),
            sum(abs(precision.activation_bits - p.activation_bits) for p in wanted),
            sum(precision.activation != p.activation for p in wanted),
            sum(abs(_log_size(layer, precision) - _log_size(layer, p)) for layer, p in own),
            sum(precision.group_size != p.group_size for p in wanted),
        )

    return min(fitting, key=lambda precision: (distance(precision), str(precision)))


def _log_size(layer: Layer, precision: Precision) -> float:
    return math.log2(precision.group_size or max(1, layer.numel // layer.weight_shape[0]))
