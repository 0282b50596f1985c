"""Where a text goes: how wide it may be, and whether it has colours."""

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

from mpsearch.core import printing

#: What the styles below, and headers, rules and bars of tables, are on a terminal; names may come from anywhere.
_OWN_CODES = re.compile("(\x1b\\[(?:0|1|2|36|1;31|1;32|1;33)m)")


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

        Not asked of rich, which keeps bold text under `NO_COLOR` and takes an empty `NO_COLOR` for a set one before version 14.

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

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str | printing.Bar]]) -> str:
        """A table that fits, its header bold and its bars coloured."""
        return printing.table(header, rows, self.width, colour=self.colour)

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
        return self._styled(text, "bold")

    def verdict(self, text: str, wins: bool | None) -> str:
        """Whether mixed precision is worth it."""
        return self._styled(f"verdict: {text}", "bold green" if wins else "bold yellow")

    def error(self, text: str) -> str:
        """The first word of an error."""
        return printing.styled(text, "bold red", colour=self.colour)

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

    def _styled(self, text: str, style: str) -> str:
        return printing.styled(self.prose(text), style, colour=self.colour)
