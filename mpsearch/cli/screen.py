"""Where a text goes: how wide it may be, and whether it has colours."""

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from mpsearch.core import printing

_BOLD, _RED, _GREEN, _YELLOW, _BAR = "1", "1;31", "1;32", "1;33", "36"
_OWN_CODES = re.compile(f"(\x1b\\[(?:0|{'|'.join((_BOLD, _RED, _GREEN, _YELLOW, _BAR))})m)")


@dataclass(frozen=True)
class Screen:
    """A terminal, a pipe or a file. Colours only repeat what the words say.

    Attributes:
        width: columns.
        colour: it shows colours.
    """

    width: int = 80
    colour: bool = False

    @classmethod
    def of(cls, stream: TextIO, environ: Mapping[str, str]) -> "Screen":
        """What a stream is: a terminal of some width, with colours unless `NO_COLOR` is set; or 80 columns without.

        Args:
            stream: where the text goes.
            environ: `NO_COLOR` (https://no-color.org) wins over `FORCE_COLOR` (https://force-color.org), both over the rest.
        """
        terminal = stream.isatty()
        colour = terminal and environ.get("TERM") != "dumb"
        if environ.get("FORCE_COLOR"):
            colour = True
        if environ.get("NO_COLOR"):
            colour = False
        return cls(shutil.get_terminal_size().columns if terminal else 80, colour)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        """A table that fits, its header bold and its bars coloured."""
        head, rule, *lines = printing.table(header, rows, self.width).split("\n")
        bars = [re.sub("█+", lambda bar: self._painted(bar[0], _BAR), line) for line in lines]
        return "\n".join([self._painted(head, _BOLD), rule, *bars])

    def prose(self, text: str) -> str:
        """Lines folded to the width.

        >>> print(Screen(width=20).prose("one line of more than twenty columns"))
        one line of more
          than twenty
          columns
        """
        return "\n".join(
            line
            if len(line) <= self.width
            else textwrap.fill(line, self.width, subsequent_indent="  ", break_on_hyphens=False)
            for line in text.split("\n")
        )

    def title(self, text: str) -> str:
        """The sentence that matters most."""
        return self._lines(text, _BOLD)

    def verdict(self, text: str, wins: bool | None) -> str:
        """Whether mixed precision is worth it."""
        return self._lines(f"verdict: {text}", _GREEN if wins else _YELLOW)

    def error(self, text: str) -> str:
        """The first word of an error."""
        return self._painted(text, _RED)

    def printable(self, text: str) -> str:
        """Text without characters that steer a terminal, but for the colours of this screen: names may come from anywhere.

        >>> Screen().printable("layer\\x1b[2J\\n")
        'layer�[2J\\n'
        """
        pieces = _OWN_CODES.split(text) if self.colour else [text]
        return "".join(
            piece if place % 2 else "".join(c if c.isprintable() or c in "\n\t" else "�" for c in piece)
            for place, piece in enumerate(pieces)
        )

    def _lines(self, text: str, code: str) -> str:
        return "\n".join(self._painted(line, code) for line in self.prose(text).split("\n"))

    def _painted(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour else text
