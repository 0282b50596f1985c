"""The parser of all commands."""

import argparse
import re
import textwrap
from typing import NoReturn

import mpsearch as mps
from mpsearch.cli.commands import COMMANDS
from mpsearch.models.loading import UsageError


class _Parser(argparse.ArgumentParser):
    """Errors are one line, as everywhere."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see '{self.prog} --help')")


class _Mpsearch(_Parser):
    """Its help lists the commands in the order of work."""

    def format_help(self) -> str:
        lines = [self.format_usage(), f"{self.description}"]
        for title, commands in COMMANDS.items():
            lines += ["", f"{title}:"]
            for command in commands:
                lines += textwrap.wrap(f"  {command.name:<12}{command.about}", 80, subsequent_indent=" " * 14)
        lines += ["", "'mpsearch COMMAND --help' tells the options of a command, with an example.", ""]
        return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    everywhere = _Parser(add_help=False)
    everywhere.add_argument("--quiet", action="store_true", help="nothing on stderr but errors")
    everywhere.add_argument("--json", action="store_true", help="results as JSON, for machines")
    everything = _Mpsearch(prog="mpsearch", description="How many bits does each layer need?")
    everything.add_argument("--version", action="version", version=f"mpsearch {mps.__version__}")
    commands = everything.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for command in (command for group in COMMANDS.values() for command in group):
        subparser = commands.add_parser(
            command.name,
            help=command.about,
            description=textwrap.fill(command.about[0].upper() + command.about[1:] + ".", 80),
            epilog=f"example:\n{_folded(f'mpsearch {command.example}')}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[everywhere],
        )
        command.add(subparser)
        subparser.set_defaults(command=command)
    return everything


def _folded(line: str) -> str:
    """A shell's line on several, so that it can be copied; options keep their values.

    >>> print(_folded("mpsearch solve table.csv --budget bitops=25% --budget 'memory_bytes = 1MB' -o plan.json"))
      mpsearch solve table.csv --budget bitops=25% --budget 'memory_bytes = 1MB' \\
        -o plan.json
    """
    whole = re.sub(r"'[^']*'", lambda quoted: quoted[0].replace(" ", "\0"), line)
    whole = re.sub(r"( -\S+) (?!-)", "\\1\0", whole)
    lines = textwrap.wrap(whole, 74, subsequent_indent="  ", break_on_hyphens=False)
    return textwrap.indent(" \\\n".join(lines).replace("\0", " "), "  ")
