"""The command line: `mpsearch COMMAND ...`."""

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import mpsearch as mps
from mpsearch.commands.command import Command
from mpsearch.commands.parser import parser
from mpsearch.commands.screen import Screen
from mpsearch.files import json_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 2 usage or bad input, 3 infeasible, 1 anything else.
    """
    warnings.showwarning = _remark
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # bars and names on a terminal that lacks their characters
    try:
        options = parser().parse_args(arguments)
        with _quiet() if options.quiet else contextlib.nullcontext():
            _run(options)
        sys.stdout.flush()
    except mps.InfeasibleError as error:
        return _fail(error, 3)
    except mps.SolverError as error:
        return _fail(error, 1)
    except mps.MpsearchError as error:
        return _fail(error, 2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not error.filename:  # nobody reads the answer any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    return 0


def _run(options: argparse.Namespace) -> None:
    command: Command = options.command
    answer = command.run(options)
    print(json_text(answer.content) if options.json else answer.text(Screen.of(sys.stdout, os.environ)))
    for path in answer.written:
        print(f"wrote {path}", file=sys.stderr)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on stderr."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(action="ignore"),
    ):
        yield


def _fail(error: object, status: int) -> int:
    word = Screen.of(sys.stderr, os.environ).error("error:")
    print(f"mpsearch: {word} {' '.join(str(error).split())}", file=sys.stderr)
    return status


def _remark(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mpsearch: {' '.join(str(message).split())}", file=sys.stderr)
