"""`mpsearch import`: the choices of another tool as a plan, its measurements as a table."""

import argparse
from pathlib import Path
from typing import Any

from mpsearch.loading import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("file", help="the other tool's file, or its checkpoint folder")
    parser.add_argument(
        "--from",
        required=True,
        dest="tool",
        metavar="TOOL",
        help="plans: compressed-tensors, gptqmodel, gguf, modelopt; tables: modelopt, exllamav2",
    )
    parser.add_argument(
        "--model", help="file.py:function or package.module:function returning a module: names the layers"
    )
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="plan, .json; or table, .csv or .npz")


def run(file: str, tool: str, out: str, model: Any) -> tuple[dict[str, Any], str]:
    """Read the other tool's file, write a plan or a table, as the ending of `out` says.

    Returns:
        For machines, for people.

    Raises:
        UsageError: for another ending.
        PlanError: for an unknown tool, or where the file holds what no plan can.
        TableError: the same of tables.
    """
    from mpsearch.imports import import_plan, import_table

    suffix = Path(out).suffix
    if suffix == ".json":
        plan = import_plan(file, tool, model)
        plan.save(out)
        quantized = sum(precision.quantizes_weight for precision in plan.values())
        content = {"tool": tool, "file": out, "layers": {name: str(precision) for name, precision in plan.items()}}
        return content, f"{tool}: a plan with {quantized} of {len(plan)} layers quantized"
    if suffix not in (".csv", ".npz"):
        raise UsageError(f"{out}: a plan ends in .json, a table in .csv or .npz")
    table = import_table(file, tool, model)
    table.save(out)
    precisions = [str(precision) for precision in table.precisions]
    content = {"tool": tool, "file": out, "layers": [layer.name for layer in table.layers], "precisions": precisions}
    return content, f"{tool}: a table of {len(table.layers)} layers at {', '.join(precisions)}, {table.unit}"
