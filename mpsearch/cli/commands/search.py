"""`mpsearch search`: from a model and data to a measured plan."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mpsearch as mps
from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.plan_text import plan_text
from mpsearch.cli.screen import Screen
from mpsearch.models.loading import UsageError, load, part

if TYPE_CHECKING:
    from torch import nn

    from mpsearch.plan_search.proposers import Proposer
    from mpsearch.quantizers.quantizer import Quantizer


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    shared_arguments.add_model_and_data(parser)
    parser.add_argument("--precisions", required=True, help="options of every layer, such as 'w2 w4 w8a8'")
    shared_arguments.add_quantizer(parser)
    shared_arguments.add_budget(parser, required=False, about="upper limit, or lower..upper; may be repeated")
    parser.add_argument(
        "--effort",
        default="default",
        choices=["fast", "default", "thorough"],
        help="passes to spend: 8, 40 + one a layer and precision but 120 at most (default), or four times that",
    )
    parser.add_argument("--max-passes", type=float, metavar="N", help="passes over the data, instead of --effort")
    shared_arguments.add_metric(parser)
    parser.add_argument("--loss", help="file.py:function(model, batch), with --metric loss")
    parser.add_argument("--higher-is-better", action="store_true", help="direction of a metric of your own")
    parser.add_argument(
        "--tolerance", type=float, metavar="DAMAGE", help="find the least --minimize with at most this damage"
    )
    parser.add_argument(
        "--minimize", default="memory_bytes", help="resource, with --tolerance or --front (default: %(default)s)"
    )
    parser.add_argument(
        "--front", action="store_true", help="measure a whole Pareto curve, over the first --budget or --minimize"
    )
    parser.add_argument(
        "--proposer",
        action="append",
        default=[],
        metavar="NAME",
        help="who names the plans to measure, in place of the default ones: a proposer, or file.py:Class; may be repeated",
    )
    parser.add_argument("--select", metavar="DATA", help="data to select plans on (default: a part of --data)")
    parser.add_argument("--report", metavar="DATA", help="data to report on (default: a part of --data)")
    shared_arguments.add_layers(parser)
    shared_arguments.add_resources(parser, "to count")
    shared_arguments.add_memory(parser)
    parser.add_argument(
        "--checkpoint", type=shared_arguments.file, metavar="FILE", help="keep finished work here, and go on from it"
    )
    parser.add_argument("--previous", metavar="DIR", help="result of a search whose passes are used again")
    parser.add_argument(
        "--seed", type=shared_arguments.seed, default=0, help="of the split and all draws (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="DIR",
        type=shared_arguments.folder,
        help="folder for plan.json, tables/, plans.csv, front.csv, front.png, summary.json and passes.db",
    )
    shared_arguments.add_plot(parser, "the measured front, besides the one in the folder")


def run(arguments: argparse.Namespace) -> Answer:
    """Search, and write the result into a folder."""
    if arguments.max_passes is not None and arguments.effort != "default":
        raise UsageError("--effort and --max-passes at once; give one of them")
    quantizer = shared_arguments.quantizer(arguments)  # refused before the model is opened
    return shared_arguments.on_model(
        arguments.model, arguments.memory, lambda model: _searched(arguments, model, quantizer)
    )


def _searched(arguments: argparse.Namespace, model: "nn.Module", quantizer: "Quantizer") -> Answer:
    metric = shared_arguments.metric(arguments.metric)
    loss = None if arguments.loss is None else load(arguments.loss, "loss")
    data = shared_arguments.data(arguments.data, model)
    further: dict[str, Any] = {
        name: None if spec is None else shared_arguments.data(spec, model)
        for name, spec in (("select", arguments.select), ("report", arguments.report))
    }
    result = mps.search(
        model,
        data,
        mps.Budget.parse(arguments.budget) if arguments.budget else None,
        mps.precisions(arguments.precisions),
        **further,
        effort=arguments.effort,
        max_passes=arguments.max_passes,
        metric=metric,
        loss=loss,
        quantizer=quantizer,
        higher_is_better=arguments.higher_is_better,
        tolerance=arguments.tolerance,
        minimize=arguments.minimize,
        front=arguments.front,
        proposers=_proposers(arguments.proposer),
        layers=shared_arguments.layers(model, data, arguments),
        exclude=arguments.exclude or (),
        resources=shared_arguments.resources(arguments, quantizer),
        checkpoint=arguments.checkpoint,
        previous=arguments.previous,
        seed=arguments.seed,
        memory_bytes=arguments.memory,
    )
    out = Path(arguments.out)
    result.save(out)
    for picture in filter(None, (out / "front.png", arguments.plot)):
        result.plot(picture)
    content = {**result.summary(), "layers": {name: str(precision) for name, precision in result.plan.items()}}
    return Answer(
        content,
        lambda screen: _text(result, screen),
        (
            f"{out}/: plan.json, tables/, plans.csv, front.csv, front.png, summary.json, passes.db",
            *filter(None, (arguments.plot,)),
        ),
    )


def _proposers(names: list[str]) -> "list[str | Proposer] | None":
    """The proposers that are named, or None for the default ones."""
    from mpsearch.plan_search.proposers import PROPOSERS

    return [part(name, PROPOSERS, "proposer", []) for name in names] or None


def _text(result: mps.SearchResult, screen: Screen) -> str:
    measured = screen.prose(result.text(screen.width).removeprefix(result.verdict).strip())
    return "\n\n".join([screen.verdict(result.verdict, result.wins), measured, plan_text(result.plan, screen)])


COMMAND = Command(
    "search",
    "find the best plan, measured, and say whether mixed precision is worth it",
    "search nets.py:net --data nets.py:batches --budget average_bits=4 --precisions 'w2 w4 w8' -o out/",
    add,
    run,
)
