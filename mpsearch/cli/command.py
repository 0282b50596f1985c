"""What a command is, and what it answers."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mpsearch.cli.screen import Screen


@dataclass(frozen=True)
class Answer:
    """What a command answers; `main` prints it.

    Attributes:
        content: for machines, under `--json`; numbers that are not finite become null.
        text: for a person, made for a screen.
        written: files and folders that were written.
    """

    content: Mapping[str, Any]
    text: Callable[[Screen], str]
    written: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """One command of `mpsearch`.

    Attributes:
        name: as it is typed.
        about: what it does, for the list of commands.
        example: a line that works, without `mpsearch`.
        add: adds its arguments to a parser.
        run: does it.
    """

    name: str
    about: str
    example: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Answer]
