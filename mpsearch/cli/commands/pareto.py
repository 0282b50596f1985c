"""`mpsearch pareto`: the whole Pareto curve of a table."""

import argparse

import mpsearch as mps
from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.screen import Screen
from mpsearch.core import amounts, printing

#: Points that are printed; `--json` and `--out` have them all.
_SHOWN = 20


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("table", help="cost table, .csv or .npz")
    parser.add_argument("--over", default="memory_bytes", help="resource (default: %(default)s)")
    shared_arguments.add_budget(parser, required=False, about="further limit of every point")
    parser.add_argument(
        "--method",
        default="auto",
        choices=["auto", "exact", "epsilon", "hull", "sweep"],
        help="exact: every point; epsilon: every point within 0.1 %% of damage; hull: the convex part, at any size; "
        "sweep: 64 limits; auto (default): exact for small tables, else hull",
    )
    shared_arguments.add_solver(parser, "sweep this solver, by name or module:Class, instead of computing the curve")
    parser.add_argument("-o", "--out", type=shared_arguments.file, metavar="FILE", help="points, .csv")
    shared_arguments.add_plot(parser, "the curve")


def run(arguments: argparse.Namespace) -> Answer:
    """Find the curve, and write points and picture where files are given."""
    table = mps.CostTable.load(arguments.table)
    budget = mps.Budget.parse(arguments.budget) if arguments.budget else None
    front = mps.pareto(
        table, arguments.over, budget=budget, solver=shared_arguments.solver(arguments), method=arguments.method
    )
    if arguments.out:
        front.save(arguments.out)
    if arguments.plot:
        front.plot(arguments.plot)
    content = {
        "over": front.over,
        "method": front.method,
        "points": [
            {front.over: u, "sensitivity": s, "gap": g}
            for u, s, g in zip(front.usage.tolist(), front.sensitivity.tolist(), front.gap.tolist(), strict=True)
        ],
    }
    return Answer(
        content, lambda screen: _text(front, table.unit, screen), tuple(filter(None, (arguments.out, arguments.plot)))
    )


def _text(front: mps.Front, unit: str, screen: Screen) -> str:
    last = len(front) - 1
    shown = sorted({round(i * last / (_SHOWN - 1)) for i in range(_SHOWN)}) if last >= _SHOWN else range(len(front))
    rows = [
        [amounts.text(front.over, front.usage[i]), printing.damage(front.sensitivity[i]), f"{front.gap[i]:.2g}"]
        for i in shown
    ]
    head = f"{len(front)} points, method {front.method}" + (f"; {len(rows)} of them:" if len(rows) < len(front) else "")
    return f"{screen.title(head)}\n\n" + screen.table([front.over, f"damage [{unit}]", "gap"], rows)


COMMAND = Command(
    "pareto",
    "the whole Pareto curve of a table",
    "pareto table.csv --over memory_bytes -o front.csv --plot front.png",
    add,
    run,
)
