"""`mpsearch show`: a plan, a table, or the layers and groups of a model before any calibration."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import mpsearch as mps
from mpsearch.allocation.ties import ties_text
from mpsearch.cli import arguments
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
    arguments.add_resources(parser, "with a model")
    arguments.add_plot(parser, "a plan or a table")
    arguments.add_layers(parser)


def run(options: argparse.Namespace) -> Answer:
    """Show whatever the name stands for."""
    if ":" in options.file and not Path(options.file).exists():
        if options.data is None:
            raise UsageError("a model is shown by running it: give --data")
        if options.plot is not None:
            raise UsageError("--plot draws a plan or a table, not a model: profile it first")
        return _model(options)
    if options.file.endswith(".json"):
        return _plan(mps.Plan.load(options.file), options.plot)
    return _table(mps.CostTable.load(options.file), options.plot)


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


def _model(options: argparse.Namespace) -> Answer:
    from mpsearch.calibration.deciding import unscored

    model = arguments.model(options.file)
    data = arguments.data(options.data, model)
    decisions = arguments.layers(model, data, options)
    table = unscored(
        model,
        data[0],
        mps.precisions(options.precisions),
        decisions,
        arguments.resources(options),
        options.exclude or (),
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
    told = [
        f"{len(layers)} layers, {decided} decisions, {parameters:,} parameters, "
        f"{sum(layer.macs for layer in layers):,} MACs a sample"
    ]
    for precision, lost in zip(table.precisions, (~table.allowed).sum(0).tolist(), strict=True):
        if lost:
            told.append(f"{precision} is not allowed in {lost} of {len(layers)} layers")
    told += filter(None, [undecided_text(table.origin["undecided"]), printing.counted(table.origin)])
    parts = [screen.table(header, rows) + "\n" + screen.prose("\n".join(told))]
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
