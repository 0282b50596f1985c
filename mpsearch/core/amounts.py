"""Amounts of a resource: read from text and printed with a unit, both from one table of units.

The ending of a resource's name tells its unit: `_bytes`, `_s`, `_j`, `_bits`; anything else is a plain count.
"""

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpsearch.errors import BudgetError


@dataclass(frozen=True)
class _Units:
    """Units of one kind of amount.

    Attributes:
        ending: of the names of resources that are counted so.
        printed: unit -> its size, largest first.
        example: for the message of what cannot be read.
        accepted: further spellings that are read, not printed.
        decimals: of a number that is printed without a unit; None: it has one.
    """

    ending: str
    printed: Mapping[str, float]
    example: str
    accepted: Mapping[str, float] = field(default_factory=dict)
    decimals: int | None = None

    @property
    def readable(self) -> dict[str, float]:
        """All spellings -> size; none is the unit of the resource itself."""
        return {**self.printed, **self.accepted, "": 1.0}


_SI = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0}
#: The first whose ending fits counts.
_KINDS = (
    _Units(
        "_bytes",
        {f"{prefix}B": size for prefix, size in _SI.items()},
        "1.2MB or 512KiB",
        accepted={"KB": 1e3, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40, "PiB": 2.0**50},
    ),
    _Units("_s", {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}, "3ms", accepted={"µs": 1e-6}),
    _Units("_j", {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "nJ": 1e-9}, "2mJ", accepted={"µJ": 1e-6}),
    _Units("_bits", _SI, "4 or '4.5 bits'", accepted={"bits": 1.0, "bit": 1.0, "K": 1e3}, decimals=2),
    _Units("", _SI, "4 or 1.5G", accepted={"K": 1e3}),
)
_AMOUNT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\d\s]*)")


def parse(resource: str, value: float | str, whole: float | None = None) -> float:
    """An amount as a number in the unit of the resource: bytes, seconds, joules, bits, or a count.

    Args:
        resource: its name, whose ending tells the unit.
        value: a number, or text such as `1.2MB`, `512KiB`, `25%`, `3ms`, `4 bits`, `1.5G`.
        whole: what 100 % is, in the unit of the resource; None where a percentage has no meaning.

    Raises:
        BudgetError: where the value is malformed, not finite, or negative; a damage may be negative.

    >>> parse("memory_bytes", "512KiB"), parse("latency_s", "3ms"), parse("average_bits", "4 bits"), parse("bitops", "25%", 400.0)
    (524288.0, 0.003, 4.0, 100.0)
    """
    if isinstance(value, str):
        number = _read(resource, value, whole)
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BudgetError(f"{resource} <= {value!r}: expected a number or text, got {type(value).__name__}")
    else:
        number = float(value)
    if not math.isfinite(number):
        raise BudgetError(f"{resource} <= {value}: expected a finite number")
    if number < 0 and resource != "sensitivity":
        raise BudgetError(f"{resource} <= {value}: expected 0 or more")
    return number


def text(resource: str, value: float, digits: int = 3) -> str:
    """An amount with its unit and so many significant digits; `-` where it is not finite.

    >>> text("memory_bytes", 1234567), text("latency_s", 0.0123), text("bitops", 4.2e9), text("average_bits", 4)
    ('1.23 MB', '12.3 ms', '4.20 G', '4.00')
    >>> text("memory_bytes", 999_999), text("memory_bytes", 12)   # the unit fits the number as it is printed
    ('1.00 MB', '12.0 B')
    """
    if not math.isfinite(value):
        return "-"
    units = _units(resource)
    if units.decimals is not None:
        return f"{value:.{units.decimals}f}"
    rounded = abs(float(f"{value:.{digits - 1}e}"))
    unit, size = next(
        ((unit, size) for unit, size in units.printed.items() if rounded >= size), list(units.printed.items())[-1]
    )
    zeros = "#" if 1 <= rounded / size < 10 ** (digits - 1) else ""  # 4.20, but 420 and 0
    return f"{value / size:{zeros}.{digits}g} {unit}".rstrip()


def tick(resource: str, value: float) -> str:
    """An amount on an axis: as many digits as tell it from its neighbour, without zeros that say nothing.

    >>> tick("memory_bytes", 1.5e6), tick("memory_bytes", 162_500), tick("bitops", 2e9)
    ('1.5 MB', '162.5 kB', '2 G')
    """
    number, _, unit = text(resource, value, digits=6).partition(" ")
    return f"{float(number):g} {unit}".rstrip()


def label(resource: str) -> str:
    """Name of a resource without its unit.

    >>> label("memory_bytes"), label("latency_s"), label("average_bits")
    ('memory', 'latency', 'average bits')
    """
    for ending in ("_bytes", "_s", "_j"):
        resource = resource.removesuffix(ending)
    return resource.replace("_", " ")


def upper_limit(limit: Any) -> float | None:
    """The upper end of a limit in a plan's budget, as a number; None where there is none, or only text.

    >>> upper_limit(4.0), upper_limit([3.98, 4.02]), upper_limit([3.98, None]), upper_limit("25%")
    (4.0, 4.02, None, None)
    """
    upper = limit[1] if isinstance(limit, tuple | list) else limit
    return upper if isinstance(upper, int | float) else None


def limit_text(resource: str, limit: Any) -> str:
    """A limit in a plan's budget, in words.

    >>> limit_text("average_bits", 4.0), limit_text("average_bits", [3.9, 4.0]), limit_text("memory_bytes", [1000, None])
    ('4.00', '3.90 to 4.00', 'at least 1.00 kB')
    >>> limit_text("bitops", "25%")
    '25%'
    """

    def end(value: Any) -> str:
        return text(resource, value) if isinstance(value, int | float) else str(value)

    if not isinstance(limit, tuple | list):
        return end(limit)
    lower, upper = limit
    if lower is None:
        return end(upper)
    return f"at least {end(lower)}" if upper is None else f"{end(lower)} to {end(upper)}"


def _units(resource: str) -> _Units:
    return next(units for units in _KINDS if resource.endswith(units.ending))


def _read(resource: str, value: str, whole: float | None) -> float:
    units = _units(resource)
    match = _AMOUNT.fullmatch(value.strip())
    if match is None or (match[2] not in units.readable and match[2] != "%"):
        raise BudgetError(f"{resource} <= {value!r}: expected an amount such as {units.example}, or a percentage")
    if match[2] != "%":
        return float(match[1]) * units.readable[match[2]]
    if whole is None:
        raise BudgetError(f"{resource} <= {value!r}: a percentage has no meaning here, give a number")
    return float(match[1]) / 100 * whole
