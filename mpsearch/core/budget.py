"""Budgets: limits on the whole model."""

import math
import numbers
import re
from collections.abc import Iterable, Iterator, Mapping

from mpsearch.core.plan import Written
from mpsearch.core.quantity import DERIVED, quantity
from mpsearch.core.table import CostTable
from mpsearch.errors import BudgetError, nearest

#: Lower and upper limit, -inf and inf where there is none.
Limit = tuple[float, float]

_SI = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_UNITS: dict[str, dict[str, float]] = {
    "_bytes": {f"{p}B": v for p, v in _SI.items()} | {f"{p}iB": 1024.0**n for n, p in enumerate("KMGT", 1)},
    "_s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9},
    "_j": {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "µJ": 1e-6, "nJ": 1e-9},
    "": {prefix: value for prefix, value in _SI.items() if prefix},
}
_AMOUNT = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\d\s]*)")


class Budget(Mapping[str, Written]):
    """Limits on amounts of the whole model, the fixed part included: upper ones, or `(lower, upper)`.

    Any resource of the table by name; `average_bits` (nominal weight bits per weight, over the layers of the table); `effective_bits`
    (8 x memory_bytes of these layers per weight: scales, zero-points and indices counted); or `sensitivity` (the damage, where another
    resource is minimized). Values are numbers in the unit of the resource (bytes, seconds, joules, or a count) or text: `1.2MB`,
    `512KiB`, `3ms`, `2uJ`, `1.5G`, or `25%` of the unquantized model. Either end of a pair may be None.

    Raises:
        BudgetError: for a value that is negative, not finite, or no amount, or a lower limit above the upper one.

    >>> Budget(memory_bytes="1.2MB", bitops="25%")
    Budget(memory_bytes='1.2MB', bitops='25%')
    >>> Budget(average_bits=(3.98, 4.02))
    Budget(average_bits=(3.98, 4.02))
    >>> Budget(average_bits=-1)
    Traceback (most recent call last):
    mpsearch.errors.BudgetError: average_bits <= -1: expected 0 or more
    """

    def __init__(self, **limits: Written) -> None:
        self._limits: dict[str, Written] = {}
        for name, value in limits.items():
            _limit(name, value, 1.0)
            if isinstance(value, tuple | list):
                self._limits[name] = (_plain(value[0]), _plain(value[1]))
            else:
                self._limits[name] = value if isinstance(value, str | int) else float(value)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Budget":
        """Read `resource=value` pairs, as on the command line; a value may be `lower..upper`.

        Raises:
            BudgetError: for text without `=`, or a resource that is given twice.

        >>> Budget.parse(["memory_bytes=1MB", "bitops=25%"])["bitops"]
        '25%'
        >>> Budget.parse(["average_bits=3.98..4.02", "memory_bytes=20%.."])
        Budget(average_bits=('3.98', '4.02'), memory_bytes=('20%', None))
        """
        limits: dict[str, Written] = {}
        for text in texts:
            name, equals, value = text.partition("=")
            name, value = name.strip(), value.strip()
            if not equals or not name or not value:
                raise BudgetError(f"{text!r} is no budget; expected resource=value, such as memory_bytes=1.2MB")
            if name in limits:
                raise BudgetError(f"{name} is limited twice: {limits[name]} and {value}")
            lower, dots, upper = (part.strip() for part in value.partition(".."))
            limits[name] = (lower or None, upper or None) if dots else value
        return cls(**limits)

    def limits(self, table: CostTable) -> dict[str, float | tuple[float, float | None]]:
        """The limits in the units of the table: an upper one is a number, a band a pair; raises as `bounds` does.

        >>> from mpsearch import Layer, precisions
        >>> table = CostTable((Layer("fc", "linear", (2, 2)),), precisions("w4"), [[0.5]], usage={"memory_bytes": [[4]]})
        >>> Budget(average_bits="3.5", memory_bytes=("1B", "2KB")).limits(table)
        {'average_bits': 3.5, 'memory_bytes': (1.0, 2000.0)}
        """
        return {name: written(limit) for name, limit in self.bounds(table).items()}

    def bounds(self, table: CostTable) -> dict[str, Limit]:
        """Lower and upper limits in the units of the table, -inf and inf where there is none.

        Raises:
            BudgetError: for a resource that the table does not have, a percentage of an unknown total, or a lower limit on a peak.
            TableError: for effective_bits of a table without memory_bytes.
        """
        known = (*table.resources, *DERIVED, "sensitivity")
        found = {}
        for name, value in self._limits.items():
            if name not in known:
                raise BudgetError(f"the table has no resource {name!r}{nearest(name, known)}")
            quantity(table, name)  # it may not tell the bits
            whole = reference(table, name) if name in table.resources else None
            found[name] = _limit(name, value, whole)
            if name in table.peaks and found[name][0] > -math.inf:
                raise BudgetError(
                    f"{limit_text(name, found[name])}: {name} is a peak over steps, which has no lower limit"
                )
        return found

    def __getitem__(self, name: str) -> Written:
        return self._limits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._limits)

    def __len__(self) -> int:
        return len(self._limits)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self._limits.items())})"


def limit_text(name: str, limit: Limit) -> str:
    """A limit in symbols.

    >>> limit_text("average_bits", (3.5, 4.0)), limit_text("memory_bytes", (-math.inf, 12.0))
    ('3.5 <= average_bits <= 4', 'memory_bytes <= 12')
    """
    low, high = limit
    if math.isinf(low):
        return f"{name} <= {high:.6g}"
    return f"{name} >= {low:.6g}" if math.isinf(high) else f"{low:.6g} <= {name} <= {high:.6g}"


def written(limit: Limit) -> float | tuple[float, float | None]:
    """A limit as it goes into a `Plan` and JSON."""
    low, high = limit
    return high if math.isinf(low) else (low, high if math.isfinite(high) else None)


def _limit(name: str, value: Written, whole: float | None) -> Limit:
    if not isinstance(value, tuple | list):
        return -math.inf, amount(name, value, whole)
    if len(value) != 2 or (value[0] is None and value[1] is None):
        raise BudgetError(f"{name}={value!r}: expected an upper limit, or (lower, upper)")
    low = -math.inf if value[0] is None else amount(name, value[0], whole)
    high = math.inf if value[1] is None else amount(name, value[1], whole)
    if low > high:
        raise BudgetError(f"{name}={value!r}: the lower limit {low:.6g} is above the upper limit {high:.6g}")
    return low, high


def _plain(value: float | str | None) -> float | str | None:
    return value if value is None or isinstance(value, str | int) else float(value)


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
    return math.fsum([*usage.max(axis=1).tolist(), fixed])


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
