"""`mpsearch import`: the choices of another tool as a plan, its measurements as a table."""

import argparse
from pathlib import Path
from typing import Any

from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.models.loading import UsageError


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("file", help="the other tool's file, or its checkpoint folder")
    parser.add_argument(
        "--from",
        required=True,
        dest="tool",
        metavar="TOOL",
        help="plans: compressed-tensors, gptqmodel, gguf, modelopt, nncf; tables: modelopt, exllamav2",
    )
    parser.add_argument(
        "--model", help="file.py:function or package.module:function returning a module: names the layers"
    )
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        type=shared_arguments.file,
        metavar="FILE",
        help="plan, .json; or table, .csv or .npz",
    )


def run(arguments: argparse.Namespace) -> Answer:
    """Read the other tool's file, write a plan or a table, as the ending of `--out` says.

    Raises:
        UsageError: for another ending.
        PlanError: for an unknown tool, or where the file holds what no plan can.
        TableError: the same of tables.
    """
    from mpsearch.imports import import_plan, import_table

    tool, out = arguments.tool, arguments.out
    model = arguments.model and shared_arguments.model(arguments.model)
    content: dict[str, Any] = {"tool": tool, "file": out}
    suffix = Path(out).suffix
    if suffix == ".json":
        plan = import_plan(arguments.file, tool, model)
        plan.save(out)
        quantized = sum(precision.quantizes_weight for precision in plan.values())
        content["layers"] = {name: str(precision) for name, precision in plan.items()}
        text = f"{tool}: a plan with {quantized} of {len(plan)} layers quantized"
    elif suffix in (".csv", ".npz"):
        table = import_table(arguments.file, tool, model)
        table.save(out)
        precisions = [str(precision) for precision in table.precisions]
        content |= {"layers": [layer.name for layer in table.layers], "precisions": precisions}
        text = f"{tool}: a table of {len(table.layers)} layers at {', '.join(precisions)}, {table.unit}"
    else:
        raise UsageError(f"{out}: a plan ends in .json, a table in .csv or .npz")
    return Answer(content, lambda screen: screen.prose(text), (out,))


COMMAND = Command(
    "import",
    "read another tool's choices as a plan, or its measurements as a table",
    "import quantize_config.json --from gptqmodel --model nets.py:net -o theirs.json",
    add,
    run,
)
