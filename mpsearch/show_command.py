"""`mpsearch show MODEL`: layers, groups with their reasons, and what any plan can cost, before any calibration."""

import argparse
from typing import Any

import numpy as np

import mpsearch as mps
from mpsearch import report
from mpsearch.problem import attainable

#: Layers that are printed one by one; `--json` has them all.
_SHOWN = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that a model takes."""
    parser.add_argument("--data", help="with a model: file.py:function or package.module:function returning batches")
    parser.add_argument(
        "--precisions", default="w2 w3 w4 w8 w16", help="with a model: options of every layer (default: %(default)s)"
    )
    parser.add_argument("--resources", default="memory_bytes,bitops", help="with a model (default: %(default)s)")
    add_layer_arguments(parser)


def add_layer_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that say which layers are decided on, and how they are grouped."""
    parser.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="layers to leave alone")
    parser.add_argument("--cut", action="append", default=[], metavar="PATTERN", help="layers to take out of groups")
    parser.add_argument("--target", help="tool that will carry the plan out: groups and options that it has")
    parser.add_argument("--experts", default="each", choices=["each", "block"], help="decide on each expert or block")


def layers(model: Any, data: list[Any], options: argparse.Namespace) -> list[mps.Layer]:
    """The decisions that the arguments ask for."""
    from mpsearch.model import collect

    return mps.layers(
        model,
        collect(data)[0],
        exclude=options.exclude,
        cut=options.cut,
        target=options.target,
        experts=options.experts,
    )


def run(model: Any, data: list[Any], options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Find the layers and count what their options cost.

    Returns:
        For machines, for people.
    """
    from mpsearch._profile import unscored

    resources = [name.strip() for name in options.resources.split(",") if name.strip()]
    decisions = layers(model, data, options)
    table = unscored(model, data[0], mps.precisions(options.precisions), decisions, resources)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    groups: dict[str, list[str]] = {}
    for layer in table.layers:
        if layer.group:
            groups.setdefault(layer.group, []).append(layer.name)
    content = {
        "parameters": parameters,
        "layers": [
            {"name": x.name, "kind": x.kind, "shape": list(x.weight_shape), "macs": x.macs, "group": x.group}
            for x in table.layers
        ],
        "groups": groups,
        "range": attainable(table),
        "reference": dict(table.reference_usage),
        "refused": {
            layer.name: [str(table.precisions[p]) for p in np.flatnonzero(~row)]
            for layer, row in zip(table.layers, table.allowed, strict=True)
            if not row.all()
        },
    }
    return content, _text(table, parameters, groups)


def _text(table: mps.CostTable, parameters: int, groups: dict[str, list[str]]) -> str:
    rows = [
        [report.short(x.name, 44), x.kind, " x ".join(map(str, x.weight_shape)), f"{x.numel:,}", f"{x.macs:,}"]
        for x in table.layers[:_SHOWN]
    ]
    decided = len(groups) + sum(not layer.group for layer in table.layers)
    lines = [report.table(["layer", "kind", "weight", "parameters", "MACs"], rows)]
    if len(table.layers) > _SHOWN:
        lines.append(f"(the first {_SHOWN} of {len(table.layers)} layers; --json tells all)")
    lines += [
        f"{len(table.layers)} layers, {decided} decisions, {parameters:,} parameters, "
        f"{sum(layer.macs for layer in table.layers):,} MACs a sample",
        *(f"group {title}: {', '.join(members)}" for title, members in groups.items()),
    ]
    allowed = table.allowed
    for column, precision in enumerate(table.precisions):
        lost = int((~allowed[:, column]).sum())
        if lost:
            lines.append(f"{precision} is not allowed in {lost} of {len(table.layers)} layers")
    lines.append("")
    for name, (low, high) in attainable(table).items():
        whole = table.reference_usage.get(name)
        tail = "" if whole is None else f" (unquantized {report.amount(name, whole)})"
        lines.append(f"{name}: {report.amount(name, low)} to {report.amount(name, high)}{tail}")
    return "\n".join(lines)
