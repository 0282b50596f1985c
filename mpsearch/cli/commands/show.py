"""`mpsearch show`: a plan, a table, or the layers and groups of a model before any calibration."""

import argparse
from collections.abc import Mapping
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
from mpsearch.core import amounts, printing
from mpsearch.core.printing import undecided_text
from mpsearch.core.problem import attainable, uniform, usage_of
from mpsearch.display.blocks import MOST, blocks
from mpsearch.errors import nearest
from mpsearch.models.loading import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "file", metavar="FILE|MODEL", help="plan (.json), cost table (.csv, .npz), or model: file.py:function, hf:DIR"
    )
    parser.add_argument(
        "--data",
        help="with a model: file.py:function or package.module:function returning batches; hf:DIR needs none, and no weights: config.json "
        "tells them",
    )
    parser.add_argument("--plan", metavar="FILE", help="with a model: what it uses under this plan, .json")
    parser.add_argument(
        "--precisions", default="w2 w3 w4 w8 w16", help="with a model: options of every layer (default: %(default)s)"
    )
    shared_arguments.add_resources(parser, "with a model")
    shared_arguments.add_plot(parser, "a plan or a table")
    shared_arguments.add_layers(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Show whatever the name stands for."""
    if ":" in arguments.file and not Path(arguments.file).exists():
        if arguments.plot is not None:
            raise UsageError("--plot draws a plan or a table, not a model: profile it first")
        return _model(arguments)
    if arguments.plan is not None:
        raise UsageError("--plan needs a model: file.py:function, hf:DIR")
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

    model, data = shared_arguments.model_and_example(arguments.file, arguments.data)
    decisions = shared_arguments.layers(model, data, arguments)
    plan = None if arguments.plan is None else mps.Plan.load(arguments.plan)
    options = mps.precisions(arguments.precisions)
    if plan is not None:
        decisions, options = _decided(plan, decisions), tuple(dict.fromkeys(plan.values()))
    table = unscored(
        model,
        data[0],
        options,
        decisions,
        shared_arguments.resources(arguments),
        arguments.exclude or (),
    )
    sample = _sample(data[0]) if arguments.data is None else ""
    if plan is not None:
        return _under_plan(table, plan, sample)
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
    return Answer(content, lambda screen: _model_text(table, _parameters(model), groups, sample, screen))


def _sample(example: Mapping[str, "Tensor"]) -> str:
    """What a sample is where the config tells it."""
    name, value = next(iter(example.items()))
    size = f"{value.shape[1]} tokens" if name == "input_ids" else " x ".join(map(str, value.shape[1:]))
    return f"a sample is {size}, by config.json"


def _decided(plan: mps.Plan, decisions: list[mps.Layer]) -> list[mps.Layer]:
    """The decisions that a plan names; the others are left alone.

    Raises:
        PlanError: for a layer that is no decision of the model, or a group with more than one precision.
    """
    known = {layer.name: layer for layer in decisions}
    for name in plan:
        if name not in known:
            raise mps.PlanError(f"{name!r} of the plan is no decision of the model{nearest(name, known)}")
    given: dict[str, mps.Layer] = {}
    for layer in decisions:
        other = given.setdefault(layer.group, layer) if layer.group else layer
        if plan.get(other.name) != plan.get(layer.name):
            raise mps.PlanError(
                f"{other.name!r} is {plan.get(other.name, 'left alone')} and {layer.name!r} {plan.get(layer.name, 'left alone')}: they "
                f"share one precision ({layer.group})"
            )
    return [layer for layer in decisions if layer.name in plan]


def _under_plan(table: mps.CostTable, plan: mps.Plan, sample: str) -> Answer:
    """What a model uses under a plan.

    Raises:
        PlanError: for a precision that a layer may not have.
    """
    columns = np.array([table.precisions.index(plan[layer.name]) for layer in table.layers])
    for layer, column, allowed in zip(table.layers, columns, table.allowed, strict=True):
        if not allowed[column]:
            raise mps.PlanError(f"{layer.name!r} may not be {plan[layer.name]}")
    usage = {key: value for key, value in usage_of(table, columns).items() if key != "sensitivity"}
    content = {"usage": usage, "reference": dict(table.reference_usage), "sample": sample}

    def text(screen: Screen) -> str:
        rows = []
        for name, value in usage.items():
            whole = table.reference_usage.get(name)
            share = printing.percent(value / whole) if whole else ""
            rows.append([name, amounts.text(name, value), "" if whole is None else amounts.text(name, whole), share])
        facts = "\n".join(
            filter(None, [sample, undecided_text(table.origin["undecided"]), printing.counted(table.origin)])
        )
        return "\n\n".join(
            [
                plan_text(plan, screen),
                screen.table(["resource", "under the plan", "unquantized", "share"], rows) + "\n" + screen.prose(facts),
            ]
        )

    return Answer(content, text)


def _parameters(model: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _model_text(
    table: mps.CostTable, parameters: int, groups: dict[str, list[str]], sample: str, screen: Screen
) -> str:
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
    lines += filter(None, [sample, undecided_text(table.origin["undecided"]), printing.counted(table.origin)])
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
