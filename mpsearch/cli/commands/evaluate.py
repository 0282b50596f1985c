"""`mpsearch evaluate`: a plan measured on held-out data."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

import mpsearch as mps
from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.screen import Screen

if TYPE_CHECKING:
    from torch import nn

    from mpsearch.core.evaluation import Evaluation
    from mpsearch.quantizers.quantizer import Quantizer


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    shared_arguments.add_model_and_data(parser)
    parser.add_argument("--plan", required=True, metavar="FILE", help="plan, .json")
    shared_arguments.add_quantizer(parser)
    parser.add_argument(
        "--calibration",
        help="data for the ranges of quantized inputs and for a quantizer that looks at inputs, as --data (default: that of --data)",
    )
    shared_arguments.add_metric(parser)
    shared_arguments.add_memory(parser)
    shared_arguments.add_plot(parser, "the plan with what was measured")


def run(arguments: argparse.Namespace) -> Answer:
    """Measure the plan."""
    quantizer = shared_arguments.quantizer(arguments)  # refused before the model is opened
    return shared_arguments.on_model(
        arguments.model, arguments.memory, lambda model: _measured(arguments, model, quantizer)
    )


def _measured(arguments: argparse.Namespace, model: "nn.Module", quantizer: "Quantizer") -> Answer:
    plan = mps.Plan.load(arguments.plan)
    data = shared_arguments.data(arguments.data, model)
    calibration = None if arguments.calibration is None else shared_arguments.data(arguments.calibration, model)
    evaluation = mps.evaluate(
        model,
        data,
        plan,
        metric=shared_arguments.metric(arguments.metric),
        quantizer=quantizer,
        calibration=calibration,
        memory_bytes=arguments.memory,
    )
    if arguments.plot:
        from mpsearch.models.running import collect

        name, title, text = evaluation.kinds[0]
        value = text(getattr(evaluation, name), getattr(evaluation, f"{name}_se"))
        measured = f"measured: {title} {value}, {evaluation.num_samples} samples"
        plan.plot(arguments.plot, layers=mps.layers(model, collect(data, model)[0]), title=measured)
    return Answer(
        dataclasses.asdict(evaluation),
        lambda screen: _text(evaluation, screen),
        (arguments.plot,) if arguments.plot else (),
    )


def _text(evaluation: "Evaluation", screen: Screen) -> str:
    before = evaluation.reference
    assert before is not None
    rows = [
        [
            "KL to the original [nats]" if name == "kl" else title,
            text(getattr(before, name), getattr(before, f"{name}_se") or None),
            text(getattr(evaluation, name), getattr(evaluation, f"{name}_se")),
        ]
        for name, title, text in evaluation.kinds
    ]
    header = [f"{evaluation.num_samples} samples", "unquantized", "plan"]
    return f"{screen.table(header, rows)}\n\n{screen.prose(evaluation.measured)}"


COMMAND = Command(
    "evaluate",
    "measure a plan on held-out data",
    "evaluate nets.py:net --data nets.py:held_out --plan plan.json",
    add,
    run,
)
