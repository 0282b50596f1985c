"""Plans from ModelOpt's `quant_cfg`, tables from the search state of its `auto_quantize`."""

import fnmatch
import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.packages import package
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.core.table import CostTable
from mpsearch.errors import PlanError, TableError, nearest
from mpsearch.imports.json_file import json_object
from mpsearch.models.modules.weights import canonical, kind_of

#: Bits of exponent and mantissa -> the format alone, and in blocks with a power of two each.
_FLOATS = {(4, 3): ("fp8_e4m3", "mxfp8"), (5, 2): ("fp8_e5m2", "mxfp8_e5m2"), (2, 1): ("fp4_e2m1", "mxfp4")}
_QUANTIZERS = (".weight_quantizer", ".input_quantizer")
_LEFT_ALONE = Precision("16")


def from_modelopt(path: str | os.PathLike[str], model: nn.Module | None = None) -> Plan:
    """The plan of a `quant_cfg`, such as `json.dump(get_auto_quantize_config(state), file)` writes it (ModelOpt 0.47).

    The last entry whose pattern matches a quantizer decides; layers whose weight quantizer is off are left alone.

    Args:
        path: of the JSON file.
        model: its linear layers and convolutions are matched; without it, only full names are understood.

    Raises:
        PlanError: for another file, patterns without a model, a name that the model does not have, or a format that no precision
            writes.
    """
    entries = json_object(path).get("quant_cfg")
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "quantizer_name" in e for e in entries):
        raise PlanError(f"{path}: no 'quant_cfg' of ModelOpt, a list of objects with a 'quantizer_name'")
    titles = [e["quantizer_name"] for e in entries if e["quantizer_name"] != "*"]
    pattern = next((title for title in titles if any(sign in title for sign in "*?[")), None)
    named = dict.fromkeys(title.rpartition(".")[0] for title in titles if title.endswith(_QUANTIZERS))
    if model is not None:
        kinds = {name: kind_of(module) for name, module in model.named_modules()}
        names = [name for name, kind in kinds.items() if kind not in (None, "embedding", "kv_cache")]
        for name in named:
            if not any(fnmatch.fnmatch(known, name) for known in kinds):
                raise PlanError(f"{path}: {name!r} is no module of the model{nearest(name, names)}")
    elif pattern is not None:
        raise PlanError(f"{path}: {pattern!r} matches more than one name; give the model to match it")
    else:
        names = list(named)
    layers = {name: _precision(entries, name, f"{path}: {name!r}") for name in names}
    return Plan(layers, origin={"imported": "modelopt", "file": str(path)})


def modelopt_table(path: str | os.PathLike[str], model: nn.Module | None = None) -> CostTable:
    """The scores in the search state that `auto_quantize(..., checkpoint=path)` keeps (ModelOpt 0.47).

    Layers that ModelOpt ties together are one group. Its score, and its bytes (codes without scales, as ModelOpt counts
    them), stand at its first layer.

    Args:
        path: of the search state.
        model: tells the shapes of the layers; without it they are unknown, but for their size where a layer is alone.

    Raises:
        PlanError: for a format that no precision writes.
        TableError: for another file, two formats that are one precision, or a layer that the model does not have.
        MissingPackage: without ModelOpt, whose classes the file holds.
    """
    state = _state(path)
    rows: list[Layer] = []
    cells: list[dict[Precision, tuple[float, float]]] = []
    for title, stats in state["candidate_stats"].items():
        names = stats["module_names"]
        for place, name in enumerate(names):
            group = title.removesuffix(".quant_recipe") if len(names) > 1 else ""
            shape = (int(stats["uncompressed_cost"]),) if len(names) == 1 else ()
            rows.append(_layer(name, group, shape, model))
            options: dict[Precision, tuple[float, float]] = {}
            for recipe, score, cost in zip(stats["formats"], stats["scores"], stats["costs"], strict=True):
                precision = _precision(recipe.config.quant_cfg, name, f"{path}: {recipe} of {name!r}")
                if precision in options:
                    raise TableError(f"{path}: {name!r} has two formats that are {precision}")
                options[precision] = (score, 2 * cost) if place == 0 else (0.0, 0.0)  # a cost of 1 = 16 bits
            cells.append(options)
    if not rows:
        raise TableError(f"{path}: the search has scored nothing yet")
    precisions = sorted({p for options in cells for p in options}, key=lambda p: (p.weight_bits, str(p)))
    absent = (np.nan, np.nan)
    values = np.array([[options.get(p, absent) for p in precisions] for options in cells])
    return CostTable(
        tuple(rows),
        tuple(precisions),
        values[:, :, 0],
        usage={"weight_bytes": values[:, :, 1]},
        unit="relative",
        origin={"imported": "modelopt", "file": str(path), "estimator": f"auto_quantize({state['method']})"},
    )


def _state(path: str | os.PathLike[str]) -> dict[str, Any]:
    package("modelopt.torch.quantization", "modelopt")  # registers the classes that its files may hold
    try:
        state = torch.load(io.BytesIO(Path(path).read_bytes()), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TableError(f"{path}: no search state of ModelOpt ({reason})") from None
    if not isinstance(state, dict) or not {"candidate_stats", "method"} <= state.keys():
        raise TableError(f"{path}: no search state of ModelOpt: 'candidate_stats' and 'method' are missing")
    return state


def _layer(name: str, group: str, shape: tuple[int, ...], model: nn.Module | None) -> Layer:
    if model is None:
        return Layer(name, weight_shape=shape, group=group)
    try:
        shape = tuple(canonical(model.get_submodule(name)).shape)
    except AttributeError:
        raise TableError(f"the file names {name!r}, which is no quantizable layer of the model") from None
    return Layer(name, weight_shape=shape, group=group)


def _precision(entries: Sequence[Any], layer: str, where: str) -> Precision:
    """The last entry that matches a quantizer decides."""
    formats: dict[str, Any] = {"weight": None, "input": None}
    for entry in entries:
        for part in formats:
            if entry.get("parent_class") is None and fnmatch.fnmatch(
                f"{layer}.{part}_quantizer", entry["quantizer_name"]
            ):
                formats[part] = entry.get("cfg") if entry.get("enable", True) else None
    if formats["weight"] is None:
        return _LEFT_ALONE
    weight, size = _format(formats["weight"], where)
    return Precision(weight, "16" if formats["input"] is None else _format(formats["input"], where)[0], size)


def _format(settings: Any, where: str) -> tuple[str, int | None]:
    """Number format and group size of a quantizer."""
    if isinstance(settings, list):
        raise PlanError(f"{where}: one number format after another, which no precision writes")
    blocks = {str(key): value for key, value in (settings.get("block_sizes") or {}).items()}
    bits, size, scale = settings["num_bits"], blocks.get("-1"), blocks.get("scale_bits")
    if isinstance(bits, int) and scale is None:
        return str(bits), size
    exponent = tuple(bits) if isinstance(bits, list | tuple) else ()
    if exponent in _FLOATS and size is None:
        return _FLOATS[exponent][0], None
    if exponent == (2, 1) and size == 16 and tuple(scale or ()) == (4, 3):
        return "nvfp4", None
    if exponent in _FLOATS and size == 32 and tuple(scale or ()) == (8, 0):
        return _FLOATS[exponent][1], None
    raise PlanError(f"{where}: numbers of {bits} bits, blocks of {size}, scales of {scale}: no precision writes that")
