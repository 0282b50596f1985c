"""Plans from the `quantization_config` of compressed-tensors."""

import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import PlanError, nearest
from mpsearch.imports.json_file import json_object

#: Classes of modules are written so, names of layers hardly ever.
_CLASS = re.compile(r"[A-Z]\w*")
_FLOATS = {8: "fp8_e4m3", 4: "fp4_e2m1"}


def from_compressed_tensors(path: str | os.PathLike[str], model: nn.Module | None = None) -> Plan:
    """The plan of a checkpoint's `config.json` (or its folder), or of a file with `config_groups` alone.

    A layer takes the group that names it, else the first in alphabetical order whose `re:` pattern matches from the start of its
    name, else the one that names its class; linear layers without a group, and ignored ones, are left alone.

    Args:
        path: of the file or folder.
        model: its linear layers are matched; without it, only full names are understood.

    Raises:
        PlanError: for patterns without a model, a target that matches no layer of it, or a scheme that no precision writes.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    content = json_object(file)
    config = content.get("quantization_config", content)
    groups = config.get("config_groups") if isinstance(config, dict) else None
    if not isinstance(groups, dict) or not groups:
        raise PlanError(f"{file}: no 'config_groups' of compressed-tensors")
    chosen = _chosen(groups, file)
    ignored = _targets(config.get("ignore") or [], f"{file}: 'ignore'")
    if model is None:
        for target in (*chosen, *ignored):
            if target.startswith("re:") or _CLASS.fullmatch(target):
                what = "a pattern" if target.startswith("re:") else "the name of a class"
                raise PlanError(f"{file}: the target {target!r} is {what}; give the model to match it")
        return Plan({**chosen, **dict.fromkeys(ignored, Precision("16"))}, origin=_origin(file))
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in chosen:
        if not any(_match(name, kind, [target]) for name, kind in kinds.items()):
            raise PlanError(
                f"{file}: the target {target!r} matches no linear layer of the model{nearest(target, kinds)}"
            )
    layers = {}
    for name, kind in kinds.items():
        match = None if _match(name, kind, ignored) else _match(name, kind, list(chosen))
        layers[name] = Precision("16") if match is None else chosen[match]
    return Plan(layers, origin=_origin(file))


def _chosen(groups: dict[str, Any], file: Path) -> dict[str, Precision]:
    """Target -> precision."""
    chosen: dict[str, Precision] = {}
    places: dict[str, str] = {}
    for title, group in groups.items():
        where = f"{file}: {title}"
        if not isinstance(group, dict):
            raise PlanError(f"{where}: expected an object, got {group!r}")
        for target in _targets(group.get("targets"), f"{where}: 'targets'"):
            if target in places:
                raise PlanError(f"{file}: the target {target!r} is in {places[target]!r} and in {title!r}")
            chosen[target], places[target] = _precision(group, where), title
    return chosen


def _targets(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(target, str) for target in value):
        raise PlanError(f"{where} is {value!r}, expected a list of names of layers or classes, or of 're:' patterns")
    if len(set(value)) < len(value):
        raise PlanError(f"{where} names {next(t for t in value if value.count(t) > 1)!r} twice")
    return value


def _origin(file: Path) -> dict[str, Any]:
    return {"imported": "compressed-tensors", "file": str(file)}


def _match(name: str, kind: str, targets: list[str]) -> str | None:
    if name in targets:
        return name
    patterns = (t for t in sorted(targets) if t.startswith("re:") and re.match(t.removeprefix("re:"), name))
    return next(patterns, kind if kind in targets else None)


def _precision(group: dict[str, Any], where: str) -> Precision:
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    strategy = weights.get("strategy")
    if strategy not in ("channel", "group"):
        raise PlanError(f"{where}: scales by {strategy!r}, a plan has one an output channel or group")
    return Precision(
        _format(weights, where),
        "16" if inputs is None else _format(inputs, where),
        weights.get("group_size") if strategy == "group" else None,
    )


def _format(settings: dict[str, Any], where: str) -> str:
    bits, kind = settings.get("num_bits"), settings.get("type", "int")
    if kind == "int" and isinstance(bits, int):
        return str(bits)
    if kind == "float" and bits in _FLOATS:
        return _FLOATS[bits]
    raise PlanError(f"{where}: numbers of {bits!r} bits and type {kind!r}, expected int, or float of 8 or 4 bits")
