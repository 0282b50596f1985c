"""`mpsearch profile`: a cost table from a model and data."""

import argparse
from typing import TYPE_CHECKING

import mpsearch as mps
from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.screen import Screen
from mpsearch.cli.table_text import table_text
from mpsearch.core import amounts, printing
from mpsearch.models.loading import load, part

if TYPE_CHECKING:
    from torch import nn

    from mpsearch.quantizers.quantizer import Quantizer


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    shared_arguments.add_model_and_data(parser)
    parser.add_argument("--estimator", default="output-damage", help="by name, or module:Class (default: %(default)s)")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="setting of --estimator; may be repeated"
    )
    parser.add_argument("--precisions", required=True, help="options of every layer, such as 'w2 w4 w8a8'")
    shared_arguments.add_quantizer(parser)
    shared_arguments.add_metric(parser, " or loss")
    parser.add_argument("--loss", help="kl, cross-entropy, or file.py:function(model, batch), in place of --metric")
    shared_arguments.add_layers(parser)
    parser.add_argument(
        "--checkpoint", type=shared_arguments.file, metavar="FILE", help="keep finished work here, and go on from it"
    )
    shared_arguments.add_resources(parser, "columns")
    shared_arguments.add_memory(parser)
    parser.add_argument(
        "-o", "--out", required=True, type=shared_arguments.file, metavar="FILE", help="table, .csv or .npz"
    )
    shared_arguments.add_plot(parser, "the table")


def run(arguments: argparse.Namespace) -> Answer:
    """Profile, and write the table."""
    quantizer = shared_arguments.quantizer(arguments)  # refused before the model is opened
    return shared_arguments.on_model(
        arguments.model, arguments.memory, lambda model: _profiled(arguments, model, quantizer)
    )


def _profiled(arguments: argparse.Namespace, model: "nn.Module", quantizer: "Quantizer") -> Answer:
    from mpsearch.sensitivity import ESTIMATORS

    estimator = part(arguments.estimator, ESTIMATORS, "estimator", arguments.option)
    loss = arguments.loss if arguments.loss in (None, "kl", "cross-entropy") else load(arguments.loss, "loss")
    data = shared_arguments.data(arguments.data, model)
    precisions = mps.precisions(arguments.precisions)
    layers = shared_arguments.layers(model, data, arguments)
    table = mps.profile(
        model,
        data,
        estimator,
        precisions,
        metric=shared_arguments.metric(arguments.metric),
        loss=loss,
        layers=layers,
        quantizer=quantizer,
        resources=shared_arguments.resources(arguments, quantizer),
        checkpoint=arguments.checkpoint,
        memory_bytes=arguments.memory,
    )
    table.save(arguments.out)
    if arguments.plot:
        table.plot(arguments.plot)
    used, now, peak = (table.origin[name] for name in ("passes", "passes_in_this_run", "peak_memory_bytes"))
    content = {
        "table": arguments.out,
        "layers": len(table.layers),
        "precisions": [str(p) for p in table.precisions],
        "passes": used,
        "passes_in_this_run": now,
        "seconds": table.origin["seconds"],
        "peak_memory_bytes": peak,
        "unit": table.unit,
    }

    def text(screen: Screen) -> str:
        again = "" if now == used else f" (of which in this run {printing.passes(**now)})"
        spent = f"{table.origin['estimator']}: {printing.passes(**used)}{again}, {table.origin['seconds']:.1f} s"
        if peak is not None:
            spent += f", at most {amounts.text('memory_bytes', peak)} above the model and data"
        return f"{table_text(table, screen)}\n\n{screen.prose(spent)}\n{screen.prose(table.origin['measured'])}"

    return Answer(content, text, tuple(filter(None, (arguments.out, arguments.plot))))


COMMAND = Command(
    "profile",
    "fill a cost table from a model and data",
    "profile nets.py:net --data nets.py:batches --estimator output-damage --precisions 'w2 w4 w8' -o table.csv",
    add,
    run,
)
