"""The command line: `mpsearch COMMAND ...`."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import mpsearch as mps
from mpsearch import export_command, import_command, report, show_command
from mpsearch.loading import UsageError, call, load, part
from mpsearch.problem import attainable, uniform

if TYPE_CHECKING:
    from mpsearch.evaluation import Evaluation


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 2 usage or bad input, 3 infeasible, 1 anything else.
    """
    warnings.showwarning = _remark
    try:
        options = _parser().parse_args(arguments)
        if options.quiet:
            warnings.simplefilter("ignore")
        run: Callable[[argparse.Namespace], None] = options.run
        run(options)
        sys.stdout.flush()
    except mps.InfeasibleError as error:
        return _fail(error, 3)
    except mps.SolverError as error:
        return _fail(error, 1)
    except mps.MpsearchError as error:
        return _fail(error, 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    return 0


def _fail(error: object, status: int) -> int:
    print(f"mpsearch: error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _remark(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mpsearch: {' '.join(str(message).split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    common.add_argument("--json", action="store_true", help="results as JSON, for machines")
    parser = _Parser(prog="mpsearch", description="How many bits does each layer need?")
    parser.add_argument("--version", action="version", version=f"mpsearch {mps.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(
        name: str, run: Callable[[argparse.Namespace], None], about: str, example: str
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=f"example: mpsearch {example}",
            parents=[common],
        )
        made.set_defaults(run=run)
        return made

    demo = command("demo", _demo, "train a small network on handwritten digits, search, report", "demo")
    demo.add_argument(
        "-o",
        "--out",
        default="mpsearch-demo",
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    demo.add_argument("--seed", type=int, default=0, help="of training and probes (default: %(default)s)")

    profile = command(
        "profile",
        _profile,
        "fill a cost table from a model and data",
        "profile nets.py:resnet --data nets.py:batches --estimator kl-divergence --precisions 'w2 w4 w8' -o table.csv",
    )
    _model_and_data(profile)
    profile.add_argument("--estimator", default="kl-divergence", help="by name, or module:Class (default: %(default)s)")
    profile.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="setting of the estimator")
    profile.add_argument("--precisions", required=True, help="options of every layer, such as 'w2 w4 w8a8'")
    profile.add_argument("--loss", help="kl (default), cross-entropy, or file.py:function(model, batch)")
    show_command.add_layer_arguments(profile)
    profile.add_argument("--checkpoint", metavar="FILE", help="keep finished work here, and go on from it")
    profile.add_argument("--resources", default="memory_bytes,bitops", help="columns (default: %(default)s)")
    profile.add_argument("-o", "--out", required=True, metavar="FILE", help="table, .csv or .npz")

    search = command(
        "search",
        _search,
        "find the best plan, measured, and say whether mixed precision is worth it",
        "search nets.py:resnet --data nets.py:batches --budget average_bits=4 --precisions 'w2 w4 w8' -o out/",
    )
    _model_and_data(search)
    search.add_argument("--precisions", required=True, help="options of every layer, such as 'w2 w4 w8a8'")
    search.add_argument(
        "--budget", action="append", default=[], metavar="RESOURCE=VALUE", help="upper limit; may be repeated"
    )
    search.add_argument("--effort", default="default", choices=["fast", "default", "thorough"], help="passes to spend")
    search.add_argument("--max-passes", type=float, metavar="N", help="passes over the data, instead of --effort")
    search.add_argument(
        "--metric", default="kl", help="kl (default), loss, accuracy, or file.py:function(model, batch)"
    )
    search.add_argument("--higher-is-better", action="store_true", help="direction of a metric of your own")
    search.add_argument(
        "--tolerance", type=float, metavar="DAMAGE", help="find the least --minimize with at most this damage"
    )
    search.add_argument("--minimize", default="memory_bytes", help="resource, with --tolerance (default: %(default)s)")
    search.add_argument("--front", action="store_true", help="measure a whole Pareto curve")
    search.add_argument("--select", metavar="DATA", help="data to select plans on (default: a part of --data)")
    search.add_argument("--report", metavar="DATA", help="data to report on (default: a part of --data)")
    show_command.add_layer_arguments(search)
    search.add_argument("--resources", default="memory_bytes,bitops", help="to count (default: %(default)s)")
    search.add_argument("--checkpoint", metavar="FILE", help="keep finished work here, and go on from it")
    search.add_argument("--previous", metavar="DIR", help="result of a search whose passes are used again")
    search.add_argument("--seed", type=int, default=0, help="of the split and all draws (default: %(default)s)")
    search.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="DIR",
        help="folder for plan.json, tables, plans.csv, front.csv, front.png, summary.json",
    )

    solve = command(
        "solve",
        _solve,
        "find the best plan within budgets",
        "solve table.csv --budget memory_bytes=1MB -o plan.json",
    )
    solve.add_argument("table", help="cost table, .csv or .npz")
    solve.add_argument(
        "--budget",
        action="append",
        required=True,
        metavar="RESOURCE=VALUE",
        help="upper limit; may be repeated",
    )
    solve.add_argument("--minimize", default="sensitivity", help="a resource instead of the damage")
    solve.add_argument("--solver", help="by name, or module:Class")
    solve.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="setting of the solver")
    solve.add_argument("-o", "--out", metavar="FILE", help="plan, .json")

    pareto = command(
        "pareto",
        _pareto,
        "the whole Pareto curve of a table",
        "pareto table.csv --over memory_bytes -o front.csv --plot front.png",
    )
    pareto.add_argument("table", help="cost table, .csv or .npz")
    pareto.add_argument("--over", default="memory_bytes", help="resource (default: %(default)s)")
    pareto.add_argument(
        "--budget", action="append", default=[], metavar="RESOURCE=VALUE", help="further limit of every point"
    )
    pareto.add_argument("--method", default="auto", choices=["auto", "exact", "epsilon", "hull", "sweep"])
    pareto.add_argument("--solver", help="sweep this solver")
    pareto.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="setting of the solver")
    pareto.add_argument("-o", "--out", metavar="FILE", help="points, .csv")
    pareto.add_argument("--plot", metavar="FILE", help="picture, .png, .svg or .pdf")

    evaluate = command(
        "evaluate",
        _evaluate,
        "measure a plan on held-out data",
        "evaluate nets.py:resnet --data nets.py:test --plan plan.json",
    )
    _model_and_data(evaluate)
    evaluate.add_argument("--plan", required=True, metavar="FILE", help="plan, .json")

    export = command(
        "export",
        _export,
        "write a plan for another quantizer, and read back what it does",
        "export plan.json --to torchao --model nets.py:resnet --verify -o torchao.json",
    )
    export_command.add_arguments(export)

    imported = command(
        "import",
        _import,
        "read another tool's choices as a plan, or its measurements as a table",
        "import config.json --from compressed-tensors --model nets.py:decoder -o plan.json",
    )
    import_command.add_arguments(imported)

    show = command(
        "show",
        _show,
        "print a plan, a table, or the layers and groups of a model",
        "show nets.py:resnet --data nets.py:batches",
    )
    show.add_argument("file", metavar="FILE|MODEL", help="plan (.json), cost table (.csv, .npz), or file.py:function")
    show_command.add_arguments(show)

    compare = command(
        "compare",
        _compare,
        "rank agreement of two tables and of the plans that they lead to, or of a table with measured plans",
        "compare hessian.csv kl.csv",
    )
    compare.add_argument("table", help="cost table, .csv or .npz")
    compare.add_argument("other", metavar="TABLE|PLANS", help="cost table of the same layers, or measured plans, .csv")
    return parser


def _model_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="file.py:function or package.module:function returning a module")
    parser.add_argument("--data", required=True, help="file.py:function or package.module:function returning batches")


def _emit(options: argparse.Namespace, content: dict[str, Any], text: Callable[[], str]) -> None:
    print(json.dumps(_plain(content), indent=1) if options.json else text())


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _wrote(options: argparse.Namespace, path: str | Path) -> None:
    if not options.quiet:
        print(f"wrote {path}", file=sys.stderr)


def _model(spec: str) -> Any:
    from torch import nn

    model = call(spec, "model")
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {spec!r} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _solver(options: argparse.Namespace) -> mps.Solver | None:
    if options.solver is None:
        if options.option:
            raise UsageError("--option needs --solver")
        return None
    from mpsearch.solvers import SOLVERS

    made: mps.Solver = part(options.solver, SOLVERS, "solver", options.option)
    return made


def _profile(options: argparse.Namespace) -> None:
    from mpsearch.sensitivity import ESTIMATORS

    estimator = part(options.estimator, ESTIMATORS, "estimator", options.option)
    loss = options.loss if options.loss in (None, "kl", "cross-entropy") else load(options.loss, "loss")
    model, data = _model(options.model), list(call(options.data, "data"))
    precisions = mps.precisions(options.precisions)
    layers = show_command.layers(model, data, options)
    if sys.stderr.isatty() and not options.quiet:  # beside the progress bar
        passes = mps.forecast(model, data, estimator, precisions, layers=layers)
        if passes is not None:
            print(
                f"mpsearch: {estimator!r}: at most {report.passes(passes.forward, passes.backward)} over the data",
                file=sys.stderr,
            )
    table = mps.profile(
        model,
        data,
        estimator,
        precisions,
        loss=loss,
        layers=layers,
        resources=[name.strip() for name in options.resources.split(",") if name.strip()],
        checkpoint=options.checkpoint,
        progress=not options.quiet,
    )
    table.save(options.out)
    used, peak = table.origin["passes"], table.origin["peak_memory_bytes"]
    content = {
        "table": options.out,
        "layers": len(table.layers),
        "precisions": [str(p) for p in table.precisions],
    }
    content |= {"passes": used, "seconds": table.origin["seconds"], "peak_memory_bytes": peak, "unit": table.unit}

    def text() -> str:
        return _table_text(table) + (
            f"\n\n{table.origin['estimator']}: {report.passes(**used)}, {table.origin['seconds']:.1f} s"
            + ("" if peak is None else f", at most {report.amount('memory_bytes', peak)} above the model and data")
        )

    _emit(options, content, text)
    _wrote(options, options.out)


def _search(options: argparse.Namespace) -> None:
    metric = options.metric if options.metric in ("kl", "loss", "accuracy") else load(options.metric, "metric")
    if options.max_passes is not None and options.effort != "default":
        raise UsageError("--effort and --max-passes at once; give one of them")
    model, data = _model(options.model), list(call(options.data, "data"))
    further: dict[str, Any] = {
        name: None if spec is None else list(call(spec, "data"))
        for name, spec in (("select", options.select), ("report", options.report))
    }
    result = mps.search(
        model,
        data,
        mps.Budget.parse(options.budget) if options.budget else None,
        mps.precisions(options.precisions),
        **further,
        effort=options.effort,
        max_passes=options.max_passes,
        metric=metric,
        higher_is_better=options.higher_is_better,
        tolerance=options.tolerance,
        minimize=options.minimize,
        front=options.front,
        layers=show_command.layers(model, data, options),
        resources=[name.strip() for name in options.resources.split(",") if name.strip()],
        checkpoint=options.checkpoint,
        previous=options.previous,
        seed=options.seed,
        progress=not options.quiet,
    )
    out = Path(options.out)
    result.save(out)
    result.front.plot(out / "front.png", mark=result.plan)
    content = {**result.summary(), "layers": {name: str(precision) for name, precision in result.plan.items()}}
    _emit(options, content, lambda: f"{result}\n\n{_plan_text(result.plan)}")
    _wrote(options, f"{out}/: plan.json, tables/, plans.csv, front.csv, front.png, summary.json, passes.db")


def _solve(options: argparse.Namespace) -> None:
    table = mps.CostTable.load(options.table)
    budget = mps.Budget.parse(options.budget)
    if not table.reference_usage and any("%" in str(value) for value in budget.values()) and not options.quiet:
        print(
            "mpsearch: the table does not tell the unquantized model's usage; 100 % = every layer at its largest",
            file=sys.stderr,
        )
    solution = mps.solve(table, budget, _solver(options), minimize=options.minimize)
    assert solution.plan is not None
    if options.out:
        solution.plan.save(options.out)
    content = {
        "status": str(solution.status),
        "sensitivity": solution.sensitivity,
        "unit": table.unit,
        "bound": solution.bound,
        "gap": solution.gap,
        "usage": dict(solution.usage),
        "layers": {name: str(precision) for name, precision in solution.plan.items()},
        "seconds": solution.stats["seconds"],
    }
    _emit(options, content, lambda: _solution_text(table, solution))
    if options.out:
        _wrote(options, options.out)


def _solution_text(table: mps.CostTable, solution: mps.Solution) -> str:
    assert solution.plan is not None
    proof = (
        "proven optimal"
        if solution.status is mps.Status.OPTIMAL
        else (f"within {100 * solution.gap:.2g} % of the optimum" if math.isfinite(solution.gap) else "no bound known")
    )
    lines = [f"predicted damage {report.damage(solution.sensitivity)} {table.unit}, {proof}"]
    lines += [f"{name} {report.amount(name, value)}" for name, value in solution.usage.items()]
    lines += ["", _plan_text(solution.plan)]
    baseline = _uniform_text(table, solution)
    return "\n".join([*lines, *(["", baseline] if baseline else [])])


def _uniform_text(table: mps.CostTable, solution: mps.Solution) -> str:
    """What the best uniform precision within the same budget would do, by the table."""
    assert solution.plan is not None
    fitting = [
        (totals["sensitivity"], name)
        for name, totals in uniform(table)
        if all(totals[key] <= limit for key, limit in solution.plan.budget.items() if isinstance(limit, float))
    ]
    if not fitting:
        return "no uniform precision fits"
    value, name = min(fitting)
    return f"best uniform precision that fits: {name}, predicted damage {report.damage(value)} {table.unit}"


def _plan_text(plan: mps.Plan) -> str:
    most = max(max(precision.weight_bits for precision in plan.values()), 8)
    rows = [
        [report.short(name), str(precision), report.bar(precision.weight_bits, most).ljust(24)]
        for name, precision in plan.items()
    ]
    return report.table(["layer", "precision", "weight bits".ljust(24)], rows)


def _pareto(options: argparse.Namespace) -> None:
    table = mps.CostTable.load(options.table)
    budget = mps.Budget.parse(options.budget) if options.budget else None
    front = mps.pareto(table, options.over, budget=budget, solver=_solver(options), method=options.method)
    if options.out:
        front.save(options.out)
    if options.plot:
        front.plot(options.plot)
    content = {
        "over": front.over,
        "method": front.method,
        "points": [
            {front.over: u, "sensitivity": s, "gap": g}
            for u, s, g in zip(front.usage.tolist(), front.sensitivity.tolist(), front.gap.tolist(), strict=True)
        ],
    }

    def text() -> str:
        shown = sorted({round(i * (len(front) - 1) / 19) for i in range(20)}) if len(front) > 20 else range(len(front))
        rows = [
            [
                report.amount(front.over, front.usage[i]),
                report.damage(front.sensitivity[i]),
                f"{front.gap[i]:.2g}",
            ]
            for i in shown
        ]
        head = f"{len(front)} points, method {front.method}" + (
            f"; {len(rows)} of them:" if len(rows) < len(front) else ""
        )
        return f"{head}\n\n" + report.table([front.over, f"damage [{table.unit}]", "gap"], rows)

    _emit(options, content, text)
    for path in (options.out, options.plot):
        if path:
            _wrote(options, path)


def _evaluate(options: argparse.Namespace) -> None:
    plan = mps.Plan.load(options.plan)
    found = mps.evaluate(_model(options.model), call(options.data, "data"), plan, progress=not options.quiet)
    _emit(options, dataclasses.asdict(found), lambda: _evaluation_text(found))


def _evaluation_text(found: "Evaluation") -> str:
    assert found.reference is not None
    rows = [["KL to the original [nats]", "0", report.damage(found.kl, found.kl_se)]]
    if found.loss is not None:
        rows.append(
            [
                "loss",
                report.damage(found.reference.loss, found.reference.loss_se),
                report.damage(found.loss, found.loss_se),
            ]
        )
    if found.accuracy is not None:
        before = report.percent(found.reference.accuracy, found.reference.accuracy_se)
        rows.append(["accuracy", before, report.percent(found.accuracy, found.accuracy_se)])
    return report.table([f"{found.num_samples} samples", "unquantized", "plan"], rows)


def _export(options: argparse.Namespace) -> None:
    plan = mps.Plan.load(options.plan)
    model = options.model and _model(options.model)
    batches = options.data and call(options.data, "data")
    with _quiet(options.quiet):
        content, text = export_command.run(
            plan,
            options.to,
            options.out,
            model,
            batches,
            options=options.option,
            snap=options.snap,
            verify=options.verify,
        )
    _emit(options, content, lambda: text)
    _wrote(options, options.out)


def _import(options: argparse.Namespace) -> None:
    content, text = import_command.run(options.file, options.tool, options.out, options.model and _model(options.model))
    _emit(options, content, lambda: text)
    _wrote(options, options.out)


def _show(options: argparse.Namespace) -> None:
    if ":" in options.file and not Path(options.file).exists():
        if options.data is None:
            raise UsageError("a model is shown by running it: give --data")
        content, text = show_command.run(_model(options.file), list(call(options.data, "data")), options)
        _emit(options, content, lambda: text)
        return
    if options.file.endswith(".json"):
        plan = mps.Plan.load(options.file)
        content = {
            "layers": {name: str(precision) for name, precision in plan.items()},
            **{key: dict(getattr(plan, key)) for key in ("budget", "predicted", "usage", "origin")},
        }
        _emit(options, content, lambda: _show_plan(plan))
        return
    table = mps.CostTable.load(options.file)
    content = {
        "unit": table.unit,
        "layers": [layer.name for layer in table.layers],
        "precisions": [str(p) for p in table.precisions],
        "uniform": dict(uniform(table)),
        "range": attainable(table),
        "origin": dict(table.origin),
    }
    _emit(options, content, lambda: _table_text(table))


def _show_plan(plan: mps.Plan) -> str:
    lines = [_plan_text(plan), ""]
    lines += [
        f"budget: {name} <= {report.amount(name, value) if isinstance(value, int | float) else value}"
        for name, value in plan.budget.items()
    ]
    lines += [f"{name} {report.amount(name, value)}" for name, value in plan.usage.items()]
    if "sensitivity" in plan.predicted:
        lines.append(
            f"predicted damage {report.damage(plan.predicted['sensitivity'])} {plan.predicted.get('unit', '')}, "
            f"{plan.predicted.get('status', 'status unknown')}"
        )
    return "\n".join(lines)


def _table_text(table: mps.CostTable) -> str:
    names = [str(precision) for precision in table.precisions]
    shown = names[:5]
    rows = [
        [
            report.short(layer.name, 28),
            *(report.damage(v) if not math.isnan(v) else "." for v in table.sensitivity[i, : len(shown)]),
        ]
        for i, layer in enumerate(table.layers[:60])
    ]
    lines = [report.table([f"damage [{table.unit}]", *shown], rows)]
    if len(table.layers) > 60 or len(names) > 5:
        lines.append(f"({len(table.layers)} layers x {len(names)} precisions in all: {' '.join(names)})")
    groups = sorted({layer.group for layer in table.layers if layer.group})
    lines += [
        "",
        *(
            f"{name}: {report.amount(name, low)} to {report.amount(name, high)}"
            for name, (low, high) in attainable(table).items()
        ),
    ]
    lines += [f"group {group}: {', '.join(x.name for x in table.layers if x.group == group)}" for group in groups]
    return "\n".join(lines)


def _compare(options: argparse.Namespace) -> None:
    from mpsearch.measured_plans import holds_plans

    if holds_plans(options.other):
        _compare_with_plans(options)
    else:
        _compare_tables(options)


def _compare_tables(options: argparse.Namespace) -> None:
    from mpsearch.compare import agreement, regrets

    a, b = (mps.CostTable.load(path) for path in (options.table, options.other))
    ranks, plans = agreement(a, b), regrets(a, b)

    def text() -> str:
        rows = [[r["cells"], str(r["count"]), f"{r['spearman']:.3f}", f"{r['kendall']:.3f}"] for r in ranks]
        found = report.table(["rank agreement", "cells", "Spearman", "Kendall"], rows)
        if not plans:
            return found
        rows = [
            [
                report.amount("memory_bytes", r["memory_bytes"]),
                f"{r['same_layers']}/{len(a.layers)}",
                f"{r['first_by_second']:.3g}",
                f"{r['second_by_first']:.3g}",
            ]
            for r in plans
        ]
        header = ["plans at", "same layers", "1st judged by 2nd", "2nd judged by 1st"]
        note = "(damage of the other table's plan over one's own best: 1 = as good)"
        return f"{found}\n\n{report.table(header, rows)}\n{note}"

    _emit(options, {"agreement": ranks, "plans": plans}, text)


def _compare_with_plans(options: argparse.Namespace) -> None:
    from mpsearch.compare import misranked, plan_agreement
    from mpsearch.measured_plans import MeasuredPlans

    table, measured = mps.CostTable.load(options.table), MeasuredPlans.load(options.other)
    ranks, worst = plan_agreement(table, measured), misranked(table, measured)

    def text() -> str:
        rows = [
            [
                _band_text(r),
                str(r["count"]),
                report.damage(r["spearman"], r["spearman_se"]),
                report.damage(r["kendall"], r["kendall_se"]),
                report.damage(r.get("first_pick")),
            ]
            for r in ranks
        ]
        found = report.table(["measured against predicted", "plans", "Spearman", "Kendall", "first pick"], rows)
        note = "(first pick: damage of the plan that the table likes best over the least)"
        rows = [
            [
                str(r["plan"]),
                report.damage(r["predicted"]),
                report.damage(r["measured"]),
                f"{r['predicted_rank']:g}",
                f"{r['measured_rank']:g}",
            ]
            for r in worst
        ]
        header = ["mis-ranked plan", f"predicted [{table.unit}]", f"measured [{measured.unit}]"]
        return f"{found}\n{note}\n\n{report.table([*header, 'rank', 'true rank'], rows)}\n(rank 1 = least damage; plan 0 is the first)"

    _emit(options, {"agreement": ranks, "misranked": worst}, text)


def _band_text(row: dict[str, Any]) -> str:
    if "smallest" not in row:
        return f"{row['plans']} plans" if row["plans"] == "all" else "of equal size"
    return f"{report.amount(row['plans'], row['smallest'])} to {report.amount(row['plans'], row['largest'])}"


def _demo(options: argparse.Namespace) -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads starve each other
    from mpsearch.demo import run

    with _quiet(options.quiet):
        result = run(Path(options.out), seed=options.seed)
    _emit(options, result.content, lambda: result.text)


@contextlib.contextmanager
def _quiet(on: bool) -> Iterator[None]:
    with (
        open(os.devnull, "w") if on else contextlib.nullcontext(sys.stderr) as stream,
        contextlib.redirect_stderr(stream),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
