"""Tables from the `measurement.json` of ExLlamaV2."""

import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.core.table import CostTable
from mpsearch.errors import TableError
from mpsearch.imports.json_file import json_object
from mpsearch.models.modules.weights import canonical

_BLOCK = re.compile(r".*\.\d+(?=\.)")  # `model.layers.0` of `model.layers.0.self_attn`


def exllamav2_table(path: str | os.PathLike[str], model: nn.Module | None = None) -> CostTable:
    """What ExLlamaV2 measured: the relative error of each attention and MLP block at some twenty mixtures of widths.

    The layers of a block are a group. A mixture stands at the width nearest to its mean bits a weight (without scales); of several at
    one width, the most accurate. Its error, 1 - accuracy, and its bytes, scales and permutation included, are shared out by size.

    Args:
        path: of the file.
        model: names the layers and tells their shapes.

    Returns:
        A table in `relative` units, with `memory_bytes`; `origin` tells what was left out.

    Raises:
        TableError: without a model, for another file, or a block that the model does not have.
    """
    if model is None:
        raise TableError(f"{path}: the file measures blocks, not layers; give the model, whose layers they are")
    measured = json_object(path).get("measurement")
    if not isinstance(measured, dict):
        raise TableError(f"{path}: no 'measurement' of ExLlamaV2")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    rows: list[Layer] = []
    cells: list[dict[int, tuple[float, float]]] = []
    left_out = 0
    for block, options in _blocks(measured):
        try:
            parts = {key: _members(linear, block, key) for key in options[0] if key not in ("accuracy", "total_bits")}
            sizes = {name: linear[name].weight.numel() for names in parts.values() for name in names}
            best = _best(options, {key: sum(sizes[name] for name in names) for key, names in parts.items()})
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise TableError(
                f"{path}: the options of {block!r} are not ExLlamaV2's ({type(error).__name__}: {error})"
            ) from None
        left_out += len(options) - len(best)
        total = sum(sizes.values())
        for name, size in sizes.items():
            rows.append(Layer(name, "linear", tuple(canonical(linear[name]).shape), group=block))
            cells.append({w: (error * size / total, bits / 8 * size / total) for w, (error, bits) in best.items()})
    if not rows:
        raise TableError(f"{path}: the measurement holds no attention or MLP block")
    widths = sorted({width for options in cells for width in options})
    values = np.array([[options.get(width, (np.nan, np.nan)) for width in widths] for options in cells])
    return CostTable(
        tuple(rows),
        tuple(Precision(str(width)) for width in widths),
        values[:, :, 0],
        usage={"memory_bytes": values[:, :, 1]},
        unit="relative",
        origin={"imported": "exllamav2", "file": str(path), "options_at_a_width_already_there": left_out},
    )


def _blocks(measured: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Name and options of each measured block; norms, head and embedding have none."""
    blocks: list[tuple[str, list[dict[str, Any]]]] = []
    for name, options in measured.items():
        if isinstance(options, dict):  # attention and MLP side by side
            blocks += [(f"{name}.{part}", inner) for part, inner in options.items() if inner]
        elif options:
            blocks.append((name, options))
    return blocks


def _members(linear: Mapping[str, nn.Module], block: str, key: str) -> list[str]:
    """Layers of a block that one entry of its options speaks of: all experts at once."""
    match = _BLOCK.match(block)
    names = [n for n in linear if match and n.startswith(f"{match[0]}.") and n.rpartition(".")[2] == key]
    if not names:
        raise TableError(f"the measurement names {key!r} in {block!r}, which the model does not have")
    return names


def _best(options: list[dict[str, Any]], sizes: dict[str, int]) -> dict[int, tuple[float, float]]:
    """Width -> least error of an option there, and its bits."""
    best: dict[int, tuple[float, float]] = {}
    for option in options:
        means = {
            key: sum(b * p for b, p in zip(option[key]["bits"], option[key]["bits_prop"], strict=True)) for key in sizes
        }
        width = round(sum(means[key] * size for key, size in sizes.items()) / sum(sizes.values()))
        measured = (1 - float(option["accuracy"]), float(option["total_bits"]))
        best[width] = min(best.get(width, measured), measured)
    return best
