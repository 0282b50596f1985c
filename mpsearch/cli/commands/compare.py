"""`mpsearch compare`: how far a table agrees with another one, or with measured plans."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mpsearch as mps
from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.screen import Screen
from mpsearch.core import amounts, printing


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("table", help="cost table, .csv or .npz")
    parser.add_argument("other", metavar="TABLE|PLANS", help="cost table of the same layers, or measured plans, .csv")
    shared_arguments.add_plot(parser, "one over the other")


def run(arguments: argparse.Namespace) -> Answer:
    """Compare with whatever the other file holds."""
    from mpsearch.core.measured_plans import holds_plans

    return _with_plans(arguments) if holds_plans(arguments.other) else _with_table(arguments)


def _with_table(arguments: argparse.Namespace) -> Answer:
    from mpsearch.evaluation.comparing import agreement, regrets

    a, b = (mps.CostTable.load(path) for path in (arguments.table, arguments.other))
    ranks, plans = agreement(a, b), regrets(a, b)
    if arguments.plot:
        from mpsearch.display import figures

        figures.save(
            figures.cells_figure(a, b, (Path(arguments.table).name, Path(arguments.other).name)), arguments.plot
        )
    return Answer(
        {"agreement": ranks, "plans": plans},
        lambda screen: _tables_text(ranks, plans, len(a.layers), screen),
        (arguments.plot,) if arguments.plot else (),
    )


def _tables_text(
    ranks: Sequence[Mapping[str, Any]], plans: Sequence[Mapping[str, Any]], layers: int, screen: Screen
) -> str:
    rows = [[r["cells"], str(r["count"]), f"{r['spearman']:.3f}", f"{r['kendall']:.3f}"] for r in ranks]
    ranks_text = screen.table(["rank agreement", "cells", "Spearman", "Kendall"], rows)
    if not plans:
        return ranks_text
    rows = [
        [
            amounts.text("memory_bytes", r["memory_bytes"]),
            f"{r['same_layers']}/{layers}",
            f"{r['first_by_second']:.3g}",
            f"{r['second_by_first']:.3g}",
        ]
        for r in plans
    ]
    header = ["plans at", "same layers", "1st judged by 2nd", "2nd judged by 1st"]
    note = "(damage of the other table's plan over one's own best: 1 = as good)"
    return f"{ranks_text}\n\n{screen.table(header, rows)}\n{screen.prose(note)}"


def _with_plans(arguments: argparse.Namespace) -> Answer:
    from mpsearch.core.measured_plans import MeasuredPlans
    from mpsearch.evaluation.comparing import misranked, plan_agreement

    table, measured = mps.CostTable.load(arguments.table), MeasuredPlans.load(arguments.other)
    ranks, worst = plan_agreement(table, measured), misranked(table, measured)
    columns = (f"predicted [{table.unit}]", f"measured [{measured.unit}]")
    if arguments.plot:
        from mpsearch.display import figures

        figures.save(figures.prediction_figure(table, measured), arguments.plot)
    return Answer(
        {"agreement": ranks, "misranked": worst},
        lambda screen: _plans_text(ranks, worst, columns, screen),
        (arguments.plot,) if arguments.plot else (),
    )


def _plans_text(
    ranks: Sequence[Mapping[str, Any]], worst: Sequence[Mapping[str, Any]], columns: tuple[str, str], screen: Screen
) -> str:
    rows = [
        [
            _band(r),
            str(r["count"]),
            printing.damage(r["spearman"], r["spearman_se"]),
            printing.damage(r["kendall"], r["kendall_se"]),
            printing.damage(r.get("first_pick")),
        ]
        for r in ranks
    ]
    ranks_text = screen.table(["measured against predicted", "plans", "Spearman", "Kendall", "first pick"], rows)
    rows = [
        [
            str(r["plan"]),
            printing.damage(r["predicted"]),
            printing.damage(r["measured"]),
            f"{r['predicted_rank']:g}",
            f"{r['measured_rank']:g}",
        ]
        for r in worst
    ]
    return "\n".join(
        [
            ranks_text,
            screen.prose("(first pick: damage of the plan that the table likes best over the least)"),
            "",
            screen.table(["mis-ranked plan", *columns, "rank", "true rank"], rows),
            "(rank 1 = least damage; plan 0 is the first)",
        ]
    )


def _band(row: Mapping[str, Any]) -> str:
    if "smallest" not in row:
        return f"{row['plans']} plans" if row["plans"] == "all" else "of equal size"
    return f"{amounts.text(row['plans'], row['smallest'])} to {amounts.text(row['plans'], row['largest'])}"


COMMAND = Command(
    "compare",
    "rank agreement of two tables and of the plans that they lead to, or of a table with measured plans",
    "compare hessian.csv kl.csv",
    add,
    run,
)
