"""`mpsearch report`: the result of a search as one HTML page."""

import argparse

from mpsearch.cli import shared_arguments
from mpsearch.cli.command import Answer, Command
from mpsearch.cli.screen import Screen
from mpsearch.models.loading import UsageError


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("result", metavar="RESULT_DIR", help="folder that a search wrote")
    parser.add_argument("-o", "--out", required=True, type=shared_arguments.file, metavar="FILE", help="page, .html")


def run(arguments: argparse.Namespace) -> Answer:
    """Write the page."""
    from mpsearch.plan_search.results.result import SearchResult

    if not arguments.out.lower().endswith((".html", ".htm")):
        raise UsageError(f"{arguments.out}: expected a name that ends with .html")
    result = SearchResult.load(arguments.result)
    result.report(arguments.out)

    def text(screen: Screen) -> str:
        return screen.verdict(result.verdict, result.wins)

    return Answer({"report": arguments.out, "verdict": result.verdict, "wins": result.wins}, text, (arguments.out,))


COMMAND = Command(
    "report",
    "write the result of a search as one HTML page that needs no network",
    "report out/ -o report.html",
    add,
    run,
)
