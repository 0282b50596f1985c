"""`mpsearch completion`: what Tab completes, for a shell."""

import argparse
from collections.abc import Iterable, Mapping

from mpsearch.cli.command import Answer, Command

#: Arguments that name a file.
_FILES = ("table", "other", "plan", "file", "--plan", "--checkpoint", "--plot", "--out", "model", "--data", "--model")
_FOLDERS = ("result", "--previous")


def add(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def run(arguments: argparse.Namespace) -> Answer:
    """Make the script: commands, options, and the names of estimators, solvers and tools."""
    import shtab

    from mpsearch.cli.parser import parser

    whole = parser()
    names = _names()
    for action in _actions(whole):
        name = action.option_strings[-1] if action.option_strings else action.dest
        if name in names:
            action.choices = sorted(names[name])
        elif name in _FILES or name in _FOLDERS:
            action.complete = shtab.FILE if name in _FILES else shtab.DIRECTORY  # type: ignore[attr-defined]
    script = shtab.complete(whole, arguments.shell)
    return Answer({"shell": arguments.shell, "script": script}, lambda _: script)


def _names() -> Mapping[str, Iterable[str]]:
    from mpsearch.export import EXPORTERS, TARGETS
    from mpsearch.imports import IMPORTERS, TABLE_IMPORTERS
    from mpsearch.sensitivity import ESTIMATORS
    from mpsearch.solvers import SOLVERS

    return {
        "--estimator": ESTIMATORS,
        "--solver": SOLVERS,
        "--to": EXPORTERS,
        "--target": TARGETS,
        "--from": IMPORTERS.keys() | TABLE_IMPORTERS.keys(),
    }


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those of the parser and of its commands."""
    actions = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                actions += _actions(command)
        else:
            actions.append(action)
    return actions


COMMAND = Command(
    "completion",
    "print what makes Tab complete commands, options and names in bash, zsh or fish",
    "completion bash",
    add,
    run,
)
