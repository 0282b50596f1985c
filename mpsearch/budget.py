"""Budgets: upper limits on the whole model."""

import math
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping

from mpsearch.errors import BudgetError, nearest
from mpsearch.table import CostTable

_SI = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_UNITS: dict[str, dict[str, float]] = {
    "_bytes": {f"{p}B": v for p, v in _SI.items()} | {f"{p}iB": 1024.0**n for n, p in enumerate("KMGT", 1)},
    "_s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "_j": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "µJ": 1e-6, "nJ": 1e-9},
    "": {prefix: value for prefix, value in _SI.items() if prefix},
}
_AMOUNT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\d\s]*)")


class Budget(Mapping[str, float | str]):
    """Upper limits on resources of the whole model, the fixed part included.

    Any resource of the table by name, `average_bits` (weight bits per weight, over the layers of the table), or
    `sensitivity` (the damage, where another resource is minimized). Values are numbers in the unit of the resource (bytes,
    seconds, joules, or a count) or text: `1.2MB`, `512KiB`, `3ms`, `2uJ`, `1.5G`, or `25%` of the unquantized model.

    Raises:
        BudgetError: for a value that is negative, not finite, or no amount.

    >>> Budget(memory_bytes="1.2MB", bitops="25%")
    Budget(memory_bytes='1.2MB', bitops='25%')
    >>> Budget(average_bits=-1)
    Traceback (most recent call last):
    mpsearch.errors.BudgetError: average_bits <= -1: expected 0 or more
    """

    def __init__(self, **limits: float | str) -> None:
        for name, value in limits.items():
            amount(name, value, 1.0)
        self._limits = {name: value if isinstance(value, str | int) else float(value) for name, value in limits.items()}

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Budget":
        """Read `resource=value` pairs, as on the command line.

        Raises:
            BudgetError: for text without `=`, or a resource that is given twice.

        >>> Budget.parse(["memory_bytes=1MB", "bitops=25%"])["bitops"]
        '25%'
        """
        limits: dict[str, float | str] = {}
        for text in texts:
            name, equals, value = text.partition("=")
            name, value = name.strip(), value.strip()
            if not equals or not name or not value:
                raise BudgetError(f"{text!r} is no budget; expected resource=value, such as memory_bytes=1.2MB")
            if name in limits:
                raise BudgetError(f"{name} is limited twice: {limits[name]} and {value}")
            limits[name] = value
        return cls(**limits)

    def limits(self, table: CostTable) -> dict[str, float]:
        """The limits in the units of the table.

        Raises:
            BudgetError: for a resource that the table does not have, or a percentage of an unknown total.
        """
        known = (*table.resources, "average_bits", "sensitivity")
        found = {}
        for name, value in self._limits.items():
            if name not in known:
                raise BudgetError(f"the table has no resource {name!r}{nearest(name, known)}")
            whole = None if name in ("average_bits", "sensitivity") else reference(table, name)
            found[name] = amount(name, value, whole)
        return found

    def __getitem__(self, name: str) -> float | str:
        return self._limits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._limits)

    def __len__(self) -> int:
        return len(self._limits)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self._limits.items())})"


def reference(table: CostTable, resource: str) -> float:
    """Use of a resource by the unquantized model, or, where the table does not say, by every layer at its most."""
    if resource in table.reference_usage:
        return table.reference_usage[resource]
    fixed = table.fixed_usage.get(resource, 0.0)
    if resource in table.peaks:
        peak = table.peaks[resource]
        most = peak.usage.copy()
        most[:, ~table.allowed] = -math.inf
        return float((most.max(axis=2).sum(axis=1) + peak.fixed).max())
    usage = table.usage[resource].copy()
    usage[~table.allowed] = -math.inf
    return math.fsum(usage.max(axis=1)) + fixed


def amount(resource: str, value: float | str, whole: float | None) -> float:
    """A value of a budget as a number in the unit of the resource.

    Args:
        resource: its name, whose ending tells the unit: `_bytes`, `_s`, `_j`, or a plain count.
        value: a number, or text such as `1.2MB`, `512KiB`, `25%`, `3ms`, `1.5G`.
        whole: what 100 % is, in the unit of the resource; None where a percentage has no meaning.

    Raises:
        BudgetError: where the value is malformed, negative or not finite.

    >>> amount("memory_bytes", "512KiB", None), amount("latency_s", "3ms", None), amount("bitops", "25%", 400.0)
    (524288.0, 0.003, 100.0)
    """
    if isinstance(value, str):
        match = _AMOUNT.fullmatch(value.strip())
        ending = next(end for end in _UNITS if resource.endswith(end))
        units = _UNITS[ending] | {"": 1.0}
        if match is None or (match[2] not in units and match[2] != "%"):
            example = {"_bytes": "1.2MB or 512KiB", "_s": "3ms", "_j": "2mJ", "": "4 or 1.5G"}[ending]
            raise BudgetError(f"{resource} <= {value!r}: expected an amount such as {example}, or a percentage")
        if match[2] == "%":
            if whole is None:
                raise BudgetError(f"{resource} <= {value!r}: a percentage has no meaning here, give a number")
            number = float(match[1]) / 100 * whole
        else:
            number = float(match[1]) * units[match[2]]
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BudgetError(f"{resource} <= {value!r}: expected a number or text, got {type(value).__name__}")
    else:
        number = float(value)
    if not math.isfinite(number):
        raise BudgetError(f"{resource} <= {value}: expected a finite number")
    if number < 0 and resource != "sensitivity":
        raise BudgetError(f"{resource} <= {value}: expected 0 or more")
    return number
