"""Text for a person: tables, damages, shares, names that fit; amounts of a resource are in `mpsearch.core.amounts`.

Tables, bars and colours are rich's, which is loaded when the first of them is printed.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.measure import Measurement

#: Metric -> what its damage is, on an axis.
DAMAGE = {
    "kl": "KL to the unquantized model [nats]",
    "bernoulli-kl": "KL of the labels to the unquantized model [nats]",
    "mse": "squared error to the unquantized model",
    "relative-error": "relative error to the unquantized model",
    "psnr": "squared error over squared peak",
    "cosine": "cosine distance to the unquantized model",
    "loss": "rise of the loss [nats]",
    "accuracy": "drop of the accuracy",
}
#: Matrices of this share of all weights and more are worth a word.
WORTH_A_WORD = 0.01
#: Names in one sentence.
_NAMED = 5
#: Columns of text that a name has at least, and more than any table has.
_NARROWEST, _WIDEST = 12, 10_000


@dataclass(frozen=True)
class Bar:
    """A cell of a table: a bar in blocks of an eighth.

    Attributes:
        value: what it is as long as.
        most: what fills the whole width.
        width: columns.
    """

    value: float
    most: float
    width: int


@dataclass(frozen=True)
class _Name:
    """A cell that rich may make narrower, by shortening the name."""

    name: str

    def __rich_measure__(self, console: "Console", options: "ConsoleOptions") -> "Measurement":
        from rich.measure import Measurement

        return Measurement(min(len(self.name), _NARROWEST), len(self.name))

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        yield Text(short(self.name, options.max_width))


def table(
    header: Sequence[str], rows: Sequence[Sequence[str | Bar]], width: int | None = 80, *, colour: bool = False
) -> str:
    """Columns aligned, the first one and bars to the left, the others to the right, and cut to fit.

    Args:
        header: names of the columns.
        rows: cells.
        width: columns of text; names in the first column are shortened to fit, but not below 12, other cells never; None: no limit.
        colour: codes of a terminal for the header and the bars.

    >>> print(table(["layer", "bits"], [["conv1", "8"], ["fc", "16"]]))
    layer  bits
    -----  ----
    conv1     8
    fc       16
    >>> print(table(["layer", "bits"], [["model.layers.10.q_proj", "8"]], width=19))
    layer          bits
    -------------  ----
    m.l.10.q_proj     8
    """
    from rich.measure import Measurement
    from rich.rule import Rule
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    bars = {place for line in rows for place, cell in enumerate(line) if isinstance(cell, Bar)}
    for place, name in enumerate(header):
        left = place == 0 or place in bars
        grid.add_column(Text(name) if place else _Name(name), justify="left" if left else "right", no_wrap=place > 0)
    grid.add_row(*(Rule(characters="-", style="dim") for _ in header))
    for line in rows:
        grid.add_row(_Name(str(line[0])), *map(_drawn, line[1:]))
    console = _console(colour)
    longest = max(len(str(line[0])) for line in (header, *rows))
    whole = Measurement.get(console, console.options, grid).maximum
    least = whole - longest + min(longest, _NARROWEST)
    with console.capture() as capture:
        console.print(grid, width=max(_WIDEST if width is None else width, least), no_wrap=True, crop=False)
    lines = capture.get().rstrip("\n").split("\n")
    return "\n".join(re.sub(r" +(\x1b\[0m)?$", r"\1", line) for line in lines)


def _drawn(cell: str | Bar) -> "RenderableType":
    from rich.bar import Bar as Blocks
    from rich.text import Text

    if isinstance(cell, str):
        return Text(cell)
    return Blocks(cell.most, 0, cell.value, width=cell.width, color="cyan", bgcolor=None)  # type: ignore[arg-type]


def styled(text: str, style: str, *, colour: bool) -> str:
    """Lines in a style of rich, each by itself, so that a pager shows all of them in it.

    >>> styled("a", "bold red", colour=True), styled("a", "bold red", colour=False)
    ('\\x1b[1;31ma\\x1b[0m', 'a')
    """
    if not colour:
        return text
    from rich.color import ColorSystem
    from rich.style import Style

    return "\n".join(Style.parse(style).render(line, color_system=ColorSystem.STANDARD) for line in text.split("\n"))


def _console(colour: bool) -> "Console":
    """A terminal of rich that is none and has room: what the stream can show is known already (`mpsearch.cli.screen`)."""
    from rich.console import Console

    return Console(
        width=_WIDEST, color_system="standard" if colour else None, force_terminal=colour, no_color=not colour, highlight=False,
        legacy_windows=False, _environ={},
    )  # fmt: skip


def passes(forward: float, backward: float) -> str:
    """Runs of the model over the data.

    >>> passes(14.5, 0), passes(1, 32)
    ('14.5 forward passes', '1 forward and 32 backward passes')
    """
    if not backward:
        return f"{forward:.4g} forward passes"
    return f"{forward:.4g} forward and {backward:.4g} backward passes"


def counted(origin: Mapping[str, Any]) -> str:
    """How the resources of a table are counted, in words; empty where its origin does not say.

    >>> counted({"counted": {"memory_bytes": "as hqq stores it"}}), counted({})
    ('memory_bytes: as hqq stores it', '')
    """
    facts = origin.get("counted", {})
    return "; ".join(f"{name}: {text}" for name, text in facts.items()) if isinstance(facts, Mapping) else ""


def damage(value: float | None, se: float | None = None) -> str:
    """A damage with three digits and its standard error.

    >>> damage(0.012345, 0.0012), damage(1.5e-7), damage(None)
    ('0.0123 ± 0.0012', '1.5e-07', '-')
    """
    if value is None or not math.isfinite(value):
        return "-"
    text = f"{value:.3g}"
    return text if se is None or not math.isfinite(se) else f"{text} ± {se:.2g}"


def percent(value: float | None, se: float | None = None) -> str:
    """A share in percent with its standard error.

    >>> percent(0.917, 0.0095), percent(None)
    ('91.7 ± 0.9 %', '-')
    """
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if se is None or not math.isfinite(se) else f"{100 * value:.1f} ± {100 * se:.1f} %"


def short(name: str, width: int = 32) -> str:
    """A name that fits, without characters that move a terminal's cursor.

    Words are cut to their first letter, numbers never, from the left until it fits; else the middle is left out.

    >>> short("model.layers.10.self_attn.q_proj", 24), short("model.layers.10.self_attn.q_proj", 8)
    ('m.l.10.self_attn.q_proj', 'm.l…proj')
    >>> short("a\\x1b[2J")
    'a�[2J'
    """
    *parts, last = "".join(c if c.isprintable() else "�" for c in name).split(".")
    for place in range(len(parts) + 1):
        name = ".".join([*(part if part.isdigit() else part[:1] for part in parts[:place]), *parts[place:], last])
        if len(name) <= width:
            return name
    head = (width - 1) * 2 // 5 + (width <= 20)
    return f"{name[:head]}…{name[-(width - 1 - head) :]}"


def undecided_text(facts: Mapping[str, Any]) -> str:
    """What is undecided in one line; empty where it is less than a hundredth of the weights, and no layer is without an option.

    >>> undecided_text({"share": 0.31, "parameters": {"pos": 0.2, "table": 0.1}, "vectors": 0.01})
    '31 % of the weights are not decided on and stay at full width: pos 20 %, table 10 %, norms and biases 1 %'
    """
    refused = without_option(facts.get("without_option", {}))
    share = facts.get("share", 0.0)
    if share < WORTH_A_WORD:
        return refused
    named = list(facts.get("parameters", {}).items())
    parts = [f"{name} {_percent(part)}" for name, part in named[:_NAMED] if part > 0]
    others = facts.get("others", {})
    number = len(named[_NAMED:]) + others.get("number", 0)
    if number:
        rest = sum(part for _, part in named[_NAMED:]) + others.get("share", 0.0)
        parts.append(f"{number} further {_percent(rest)}")
    if facts.get("vectors"):
        parts.append(f"norms and biases {_percent(facts['vectors'])}")
    if facts.get("excluded"):
        parts.append(f"excluded {_percent(facts['excluded'])}")
    shares = f"{_percent(share)} of the weights are not decided on and stay at full width: {', '.join(parts)}"
    return "; ".join(filter(None, [shares, refused]))


def without_option(reasons: Mapping[str, str]) -> str:
    """Which layers are left alone, since no option fits them, with the reason of the first; empty for none.

    >>> without_option({"gate": "q8_0 packs rows in multiples of 32 weights, the weight has 4", "b": "the same"})
    'no option fits gate, b: left alone (q8_0 packs rows in multiples of 32 weights, the weight has 4)'
    """
    names = list(reasons)
    shown = ", ".join(names[:_NAMED]) + (f", ... ({len(names)} in all)" if len(names) > _NAMED else "")
    return f"no option fits {shown}: left alone ({reasons[names[0]]})" if names else ""


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.3g} %"
