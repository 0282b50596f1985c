"""Plans from the `dynamic` map of GPTQModel."""

import os
import re
from pathlib import Path
from typing import Any

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.errors import PlanError
from mpsearch.imports.json_file import json_object

_KEYS = (
    "bits",
    "group_size",
    "sym",
    "desc_act",
    "act_group_aware",
    "damp_percent",
    "mse",
    "static_groups",
    "fallback",
    "hessian",
)
_LITERAL = re.compile(r"\^((?:\\.|[^\\^$.|?*+()\[\]{}])*)\$")


def from_gptqmodel(path: str | os.PathLike[str], model: nn.Module | None = None) -> Plan:
    """The plan of a `quantize_config.json` (or its folder), or of the `quantization_config` in a `config.json`.

    The first pattern that matches from the start of a layer's name decides: `-:` leaves it alone, others override the base settings.

    Args:
        path: of the file or folder.
        model: its linear layers are matched, all but `lm_head` unless the file says so; without it, only anchored names are understood.

    Raises:
        PlanError: for patterns without a model, a pattern or key that GPTQModel would ignore, or settings that no precision writes.
    """
    content = json_object(Path(path) / "quantize_config.json" if Path(path).is_dir() else path)
    base = content.get("quantization_config", content)
    dynamic = base.get("dynamic") or {}
    if "bits" not in base or not isinstance(dynamic, dict):
        raise PlanError(f"{path}: no 'bits' and 'dynamic' of GPTQModel")
    for pattern, settings in dynamic.items():
        for key in settings:
            if key not in _KEYS:
                raise PlanError(f"{path}: unknown key {key!r} under {pattern!r}, which GPTQModel ignores")
    if model is not None:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        for pattern in dynamic:
            if not any(_matches(pattern, name) for name in linear):
                raise PlanError(f"{path}: {pattern!r} matches no linear layer of the model, which GPTQModel ignores")
        names = [name for name in linear if name.rpartition(".")[2] != "lm_head" or base.get("lm_head")]
    else:
        names = [_literal(pattern, path) for pattern in dynamic]
    layers = {name: _decided(name, base, dynamic) for name in names}
    return Plan(layers, origin={"imported": "gptqmodel", "file": str(path)})


def _decided(name: str, base: dict[str, Any], dynamic: dict[str, dict[str, Any]]) -> Precision:
    for pattern, settings in dynamic.items():
        if _matches(pattern, name):
            return Precision("16") if pattern.startswith("-:") else _precision({**base, **settings})
    return _precision(base)


def _matches(pattern: str, name: str) -> bool:
    return re.match(pattern.removeprefix("+:").removeprefix("-:"), name) is not None


def _precision(settings: dict[str, Any]) -> Precision:
    size = int(settings.get("group_size", -1))
    return Precision(str(settings["bits"]), "16", size if size > 0 else None)


def _literal(pattern: str, path: str | os.PathLike[str]) -> str:
    match = _LITERAL.fullmatch(pattern.removeprefix("+:").removeprefix("-:"))
    if match is None:
        raise PlanError(f"{path}: {pattern!r} matches more than one name; give the model to match it")
    return re.sub(r"\\(.)", r"\1", match[1])
