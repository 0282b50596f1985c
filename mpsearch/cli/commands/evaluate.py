"""`mpsearch evaluate`: a plan measured on held-out data."""

import argparse
import dataclasses
from typing import TYPE_CHECKING

import mpsearch as mps
from mpsearch.cli import arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.screen import Screen

if TYPE_CHECKING:
    from mpsearch.core.evaluation import Evaluation


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    arguments.add_model_and_data(parser)
    parser.add_argument("--plan", required=True, metavar="FILE", help="plan, .json")
    arguments.add_quantizer(parser)
    parser.add_argument(
        "--calibration",
        help="data for the ranges of quantized inputs and for a quantizer that looks at inputs, as --data (default: that of --data)",
    )
    arguments.add_metric(parser)
    arguments.add_plot(parser, "the plan with what was measured")


def run(options: argparse.Namespace) -> Answer:
    """Measure the plan."""
    plan = mps.Plan.load(options.plan)
    quantizer = arguments.quantizer(options)
    model = arguments.model(options.model)
    data = arguments.data(options.data, model)
    calibration = None if options.calibration is None else arguments.data(options.calibration, model)
    found = mps.evaluate(
        model, data, plan, metric=arguments.metric(options.metric), quantizer=quantizer, calibration=calibration
    )
    if options.plot:
        from mpsearch.models.running import collect

        name, title, text = found.kinds[0]
        value = text(getattr(found, name), getattr(found, f"{name}_se"))
        measured = f"measured: {title} {value}, {found.num_samples} samples"
        plan.plot(options.plot, layers=mps.layers(model, collect(data, model)[0]), title=measured)
    return Answer(
        dataclasses.asdict(found), lambda screen: _text(found, screen), (options.plot,) if options.plot else ()
    )


def _text(found: "Evaluation", screen: Screen) -> str:
    before = found.reference
    assert before is not None
    rows = [
        [
            "KL to the original [nats]" if name == "kl" else title,
            text(getattr(before, name), getattr(before, f"{name}_se") or None),
            text(getattr(found, name), getattr(found, f"{name}_se")),
        ]
        for name, title, text in found.kinds
    ]
    header = [f"{found.num_samples} samples", "unquantized", "plan"]
    return f"{screen.table(header, rows)}\n\n{screen.prose(found.measured)}"


COMMAND = Command(
    "evaluate",
    "measure a plan on held-out data",
    "evaluate nets.py:net --data nets.py:held_out --plan plan.json",
    add,
    run,
)
