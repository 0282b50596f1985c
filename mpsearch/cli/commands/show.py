"""`mpsearch show`: a plan, a table, or the layers and groups of a model before any calibration."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import mpsearch as mps
from mpsearch.allocation.ties import ties_text
from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.plan_text import plan_text, usage_text
from mpsearch.cli.screen import Screen
from mpsearch.cli.table_text import groups_text, range_text, table_text
from mpsearch.core import printing
from mpsearch.core.printing import undecided_text
from mpsearch.core.problem import attainable, uniform
from mpsearch.display.blocks import MOST, blocks
from mpsearch.models.loading import UsageError

if TYPE_CHECKING:
    from torch import nn


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "file", metavar="FILE|MODEL", help="plan (.json), cost table (.csv, .npz), or model: file.py:function, hf:DIR"
    )
    parser.add_argument("--data", help="with a model: file.py:function or package.module:function returning batches")
    parser.add_argument(
        "--precisions", default="w2 w3 w4 w8 w16", help="with a model: options of every layer (default: %(default)s)"
    )
    shared_arguments.add_resources(parser, "with a model")
    shared_arguments.add_plot(parser, "a plan or a table")
    shared_arguments.add_layers(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Show whatever the name stands for."""
    if ":" in arguments.file and not Path(arguments.file).exists():
        if arguments.data is None:
            raise UsageError("a model is shown by running it: give --data")
        if arguments.plot is not None:
            raise UsageError("--plot draws a plan or a table, not a model: profile it first")
        return _model(arguments)
    if arguments.file.endswith(".json"):
        return _plan(mps.Plan.load(arguments.file), arguments.plot)
    return _table(mps.CostTable.load(arguments.file), arguments.plot)


def _plan(plan: mps.Plan, picture: str | None) -> Answer:
    content = {
        "layers": {name: str(precision) for name, precision in plan.items()},
        **{key: dict(getattr(plan, key)) for key in ("budget", "predicted", "usage", "origin")},
    }
    if picture:
        plan.plot(picture)
    return Answer(content, lambda screen: _plan_text(plan, screen), (picture,) if picture else ())


def _plan_text(plan: mps.Plan, screen: Screen) -> str:
    parts = [plan_text(plan, screen)]
    if plan.usage:
        parts.append(usage_text(plan, screen))
    table = plan.origin.get("table")
    if isinstance(table, dict) and (counted := printing.counted(table)):
        parts.append(screen.prose(counted))
    if "sensitivity" in plan.predicted:
        damage = f"{printing.damage(plan.predicted['sensitivity'])} {plan.predicted.get('unit', '')}"
        parts.append(screen.title(f"predicted damage {damage}, {plan.predicted.get('status', 'status unknown')}"))
    if ties := ties_text(plan.predicted):
        parts.append(screen.prose(ties))
    return "\n\n".join(parts)


def _table(table: mps.CostTable, picture: str | None) -> Answer:
    content = {
        "unit": table.unit,
        "layers": [layer.name for layer in table.layers],
        "precisions": [str(p) for p in table.precisions],
        "uniform": dict(uniform(table)),
        "range": attainable(table),
        "origin": dict(table.origin),
    }
    if picture:
        table.plot(picture)
    return Answer(content, lambda screen: table_text(table, screen), (picture,) if picture else ())


def _model(arguments: argparse.Namespace) -> Answer:
    from mpsearch.calibration.deciding import unscored

    model = shared_arguments.model(arguments.file)
    data = shared_arguments.data(arguments.data, model)
    decisions = shared_arguments.layers(model, data, arguments)
    table = unscored(
        model,
        data[0],
        mps.precisions(arguments.precisions),
        decisions,
        shared_arguments.resources(arguments),
        arguments.exclude or (),
    )
    groups: dict[str, list[str]] = {}
    for layer in table.layers:
        if layer.group:
            groups.setdefault(layer.group, []).append(layer.name)
    content = {
        "parameters": _parameters(model),
        "layers": [
            {"name": x.name, "kind": x.kind, "shape": list(x.weight_shape), "macs": x.macs, "group": x.group}
            for x in table.layers
        ],
        "groups": groups,
        "range": attainable(table),
        "reference": dict(table.reference_usage),
        "undecided": dict(table.origin["undecided"]),
        "refused": {
            layer.name: [str(table.precisions[p]) for p in np.flatnonzero(~row)]
            for layer, row in zip(table.layers, table.allowed, strict=True)
            if not row.all()
        },
    }
    return Answer(content, lambda screen: _model_text(table, _parameters(model), groups, screen))


def _parameters(model: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _model_text(table: mps.CostTable, parameters: int, groups: dict[str, list[str]], screen: Screen) -> str:
    layers = table.layers
    if len(layers) <= MOST:
        header = ["layer", "kind", "weight", "parameters", "MACs"]
        rows = [[x.name, x.kind, " x ".join(map(str, x.weight_shape)), f"{x.numel:,}", f"{x.macs:,}"] for x in layers]
    else:
        header, rows = ["block", "layers", "parameters", "MACs"], []
        for block in blocks([layer.name for layer in layers]):
            members = layers[block.start : block.stop]
            numel, macs = (sum(getattr(layer, key) for layer in members) for key in ("numel", "macs"))
            rows.append([block.label, str(len(members)), f"{numel:,}", f"{macs:,}"])
    decided = len({layer.decision for layer in layers})
    lines = [
        f"{len(layers)} layers, {decided} decisions, {parameters:,} parameters, "
        f"{sum(layer.macs for layer in layers):,} MACs a sample"
    ]
    for precision, refused in zip(table.precisions, (~table.allowed).sum(0).tolist(), strict=True):
        if refused:
            lines.append(f"{precision} is not allowed in {refused} of {len(layers)} layers")
    lines += filter(None, [undecided_text(table.origin["undecided"]), printing.counted(table.origin)])
    parts = [screen.table(header, rows) + "\n" + screen.prose("\n".join(lines))]
    if groups:
        parts.append(groups_text(groups, screen))
    return "\n\n".join([*parts, range_text(table, screen)])


COMMAND = Command(
    "show",
    "print a plan, a table, or the layers and groups of a model",
    "show nets.py:net --data nets.py:batches",
    add,
    run,
)
