"""`mpsearch demo`: train, search, report, on handwritten digits."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.plan_text import plan_text
from mpsearch.cli.screen import Screen
from mpsearch.core import printing

if TYPE_CHECKING:
    from mpsearch.cli.digits import Result


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "-o",
        "--out",
        default="mpsearch-demo",
        metavar="DIR",
        type=shared_arguments.folder,
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=shared_arguments.seed, default=0, help="of training and probes (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> Answer:
    """Run the digits."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch loads: spinning threads starve each other
    from mpsearch.cli import digits

    result = digits.run(Path(arguments.out), seed=arguments.seed)
    content = {
        "verdicts": {str(limit): search.verdict for limit, search in result.searches.items()},
        "passes": {str(limit): search.passes for limit, search in result.searches.items()},
        "comparison": result.middle.summary()["comparison"],
        "layers": {name: str(precision) for name, precision in result.middle.plan.items()},
        "folder": arguments.out,
    }
    written = f"{arguments.out}/: plan.json, tables/, plans.csv, front.csv, front.png, summary.json, passes.db"
    return Answer(content, lambda screen: _text(result, screen), (written,))


def _text(result: "Result", screen: Screen) -> str:
    from mpsearch.cli.digits import MIDDLE

    reference = result.middle.measured.reference
    assert reference is not None
    network = (
        f"A network of {result.parameters:,} parameters on handwritten digits, {printing.percent(reference.accuracy)} right "
        f"on {reference.num_samples} held-out images. Damage is the KL divergence from the unquantized network in nats; "
        "± is one standard error."
    )
    verdicts = [
        f"{screen.title(f'at {limit:g} bits')} ({search.passes:.0f} passes)\n{screen.verdict(search.verdict, search.wins)}"
        for limit, search in result.searches.items()
    ]
    heading = screen.prose(f"At {MIDDLE:g} bits, measured on images that the search never saw:")
    measured = screen.prose(result.middle.text(screen.width).removeprefix(result.middle.verdict).strip())
    return "\n\n".join([screen.prose(network), *verdicts, heading, measured, plan_text(result.middle.plan, screen)])


COMMAND = Command("demo", "train a small network on handwritten digits, search, report", "demo", add, run)
