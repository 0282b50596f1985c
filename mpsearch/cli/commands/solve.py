"""`mpsearch solve`: the best plan of a table within budgets."""

import argparse
import math
import sys
from collections.abc import Mapping
from dataclasses import replace

import mpsearch as mps
from mpsearch.allocation.ties import as_json, ties_text
from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.plan_text import plan_text, usage_text
from mpsearch.cli.screen import Screen
from mpsearch.core import printing
from mpsearch.core.problem import uniform


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("table", help="cost table, .csv or .npz")
    shared_arguments.add_budget(parser, required=True, about="upper limit, or lower..upper; may be repeated")
    parser.add_argument(
        "--minimize", default="sensitivity", help="a resource instead of the damage, within --budget sensitivity=DAMAGE"
    )
    shared_arguments.add_solver(
        parser,
        "exact (default), ilp, greedy, dynamic-programming, annealing, evolutionary, bisection, brute-force, or module:Class",
    )
    parser.add_argument("-o", "--out", type=shared_arguments.file, metavar="FILE", help="plan, .json")
    shared_arguments.add_plot(parser, "the plan")
    parser.add_argument(
        "--model",
        help="count what the options cost in this model, for a table without costs: hf:DIR (its config.json suffices), or as in show",
    )
    parser.add_argument("--data", help="with --model: as in show")
    shared_arguments.add_resources(parser, "with --model")
    shared_arguments.add_layers(parser)


def run(arguments: argparse.Namespace) -> Answer:
    """Solve, and write the plan where a file is given."""
    table = mps.CostTable.load(arguments.table)
    if arguments.model is not None:
        from mpsearch.calibration.deciding import with_costs

        model, data = shared_arguments.model_and_example(arguments.model, arguments.data)
        decisions = shared_arguments.layers(model, data, arguments)
        table = with_costs(table, model, data[0], decisions, shared_arguments.resources(arguments))
    budget = mps.Budget.parse(arguments.budget)
    if not table.reference_usage and any("%" in str(value) for value in budget.values()):
        print(
            "mpsearch: the table does not tell the unquantized model's usage; 100 % = every layer at its largest",
            file=sys.stderr,
        )
    solution = mps.solve(table, budget, shared_arguments.solver(arguments), minimize=arguments.minimize)
    assert solution.plan is not None
    ties = as_json(mps.tie_prices(table, budget, minimize=arguments.minimize))
    plan = replace(solution.plan, predicted={**solution.plan.predicted, "ties": ties})
    solution = replace(solution, plan=plan)
    if arguments.out:
        plan.save(arguments.out)
    if arguments.plot:
        plan.plot(arguments.plot, layers=table.layers)
    content = {
        "status": str(solution.status),
        "sensitivity": solution.sensitivity,
        "unit": table.unit,
        "bound": solution.bound,
        "gap": solution.gap,
        "usage": dict(solution.usage),
        "layers": {name: str(precision) for name, precision in plan.items()},
        "ties": ties,
        "seconds": solution.stats["seconds"],
    }
    written = tuple(filter(None, (arguments.out, arguments.plot)))
    return Answer(content, lambda screen: _text(table, solution, budget.bounds(table), screen), written)


def _text(
    table: mps.CostTable, solution: mps.Solution, limits: Mapping[str, tuple[float, float]], screen: Screen
) -> str:
    assert solution.plan is not None
    proof = (
        "proven optimal"
        if solution.status is mps.Status.OPTIMAL
        else (f"within {100 * solution.gap:.2g} % of the optimum" if math.isfinite(solution.gap) else "no bound known")
    )
    return "\n\n".join(
        [
            screen.title(f"predicted damage {printing.damage(solution.sensitivity)} {table.unit}, {proof}"),
            usage_text(solution.plan, screen),
            *map(screen.prose, filter(None, [printing.counted(table.origin)])),
            plan_text(solution.plan, screen),
            screen.prose(_uniform(table, limits)),
            *filter(None, [screen.prose(ties_text(solution.plan.predicted))]),
        ]
    )


def _uniform(table: mps.CostTable, limits: Mapping[str, tuple[float, float]]) -> str:
    """What the best uniform precision within the same budget would do, by the table."""
    fitting = [
        (totals["sensitivity"], name)
        for name, totals in uniform(table)
        if all(low <= totals[key] <= high for key, (low, high) in limits.items())
    ]
    if not fitting:
        return "no uniform precision fits"
    value, name = min(fitting)
    return f"best uniform precision that fits: {name}, predicted damage {printing.damage(value)} {table.unit}"


COMMAND = Command(
    "solve",
    "find the best plan within budgets",
    "solve table.csv --budget memory_bytes=1MB -o plan.json",
    add,
    run,
)
