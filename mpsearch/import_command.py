"""`mpsearch import`: the choices of another tool as a plan."""

import argparse
from typing import Any

from mpsearch.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("file", help="the other tool's file, or its checkpoint folder")
    parser.add_argument(
        "--from", required=True, dest="tool", metavar="TOOL", help="compressed-tensors, gptqmodel or gguf"
    )
    parser.add_argument(
        "--model", help="file.py:function or package.module:function returning a module: names the layers"
    )
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="plan, .json")


def run(file: str, tool: str, out: str, model: Any) -> Plan:
    """Read the file, write the plan.

    Raises:
        PlanError: where the file holds what no plan can.
    """
    from mpsearch.imports import import_plan

    plan = import_plan(file, tool, model)
    plan.save(out)
    return plan
