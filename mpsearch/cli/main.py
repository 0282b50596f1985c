"""The command line: `mpsearch COMMAND ...`."""

import argparse
import contextlib
import ctypes
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import mpsearch as mps
from mpsearch.cli.command import Command
from mpsearch.cli.parser import parser
from mpsearch.cli.screen import Screen
from mpsearch.errors import one_line
from mpsearch.files.writing import json_text


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        words: what is typed after `mpsearch`; None: what this process was started with.

    Returns:
        0 done, 2 usage or bad input, 3 infeasible, 1 anything else.
    """
    with _brief_warnings():
        return _status(words)


@contextlib.contextmanager
def _brief_warnings() -> Iterator[None]:
    """A warning is one line on stderr; afterwards warnings are shown as before."""
    with warnings.catch_warnings():
        warnings.showwarning = _remark
        yield


def _status(words: Sequence[str] | None) -> int:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # bars and names on a terminal that lacks their characters
    try:
        try:
            arguments = parser().parse_args(words)
            with _quiet() if arguments.quiet else contextlib.nullcontext():
                _run(arguments)
        finally:
            sys.stdout.flush()  # of the help too
    except mps.InfeasibleError as error:
        return _fail(error, 3)
    except (mps.SolverError, mps.VerificationError) as error:
        return _fail(error, 1)
    except mps.MpsearchError as error:
        return _fail(error, 2)
    except OSError as error:
        if error.filename is None:  # stdout itself: its last flush, at the end of the process, must not fail again
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError) and error.filename is None:  # nobody reads the answer any more
            return 0
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else error, 2)
    except MemoryError:
        return _fail("out of memory", 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    return 0


def _run(arguments: argparse.Namespace) -> None:
    command: Command = arguments.command
    with _answer_alone() if arguments.json else contextlib.nullcontext():
        answer = command.run(arguments)
    screen = Screen.of(sys.stdout, os.environ)
    print(json_text(answer.content) if arguments.json else screen.printable(answer.text(screen)))
    for path in answer.written:
        print(f"wrote {one_line(path)}", file=sys.stderr)


@contextlib.contextmanager
def _answer_alone() -> Iterator[None]:
    """What the user's module, a library or C code prints goes to stderr, so that stdout holds the answer alone."""
    stdout, stderr = sys.stdout, sys.stderr
    with contextlib.redirect_stdout(stderr):
        try:
            numbers = (stdout.fileno(), stderr.fileno())
        except OSError:  # no files, as in a notebook
            yield
            return
        stdout.flush()
        copy = os.dup(numbers[0])
        os.dup2(numbers[1], numbers[0])
        try:
            yield
        finally:
            stdout.flush()
            with contextlib.suppress(OSError, AttributeError, TypeError):
                ctypes.CDLL(None).fflush(None)  # what C holds back
            os.dup2(copy, numbers[0])
            os.close(copy)


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
    print(f"mpsearch: {word} {one_line(error)}", file=sys.stderr)
    return status


def _remark(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"mpsearch: {one_line(message)}", file=sys.stderr)
