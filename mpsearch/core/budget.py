"""Budgets: limits on the whole model."""

import math
from collections.abc import Iterable, Iterator, Mapping

from mpsearch.core import amounts
from mpsearch.core.plan import Written
from mpsearch.core.table import CostTable
from mpsearch.core.totals import DERIVED, total_of
from mpsearch.errors import BudgetError, nearest

#: Lower and upper limit, -inf and inf where there is none.
Limit = tuple[float, float]


class Budget(Mapping[str, Written]):
    """Limits on amounts of the whole model, the fixed part included: upper ones, or `(lower, upper)`.

    Any resource of the table by name; `average_bits` (nominal weight bits per weight, over the layers of the table); `effective_bits`
    (8 x memory_bytes of these layers per weight: scales, zero-points and indices counted); or `sensitivity` (the damage, where another
    resource is minimized). Values are numbers in the unit of the resource (bytes, seconds, joules, or a count) or text: `1.2MB`,
    `512KiB`, `3ms`, `2uJ`, `4 bits`, `1.5G`, or `25%` of the unquantized model. Either end of a pair may be None.

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
        limits = {}
        for name, value in self._limits.items():
            if name not in known:
                raise BudgetError(f"the table has no resource {name!r}{nearest(name, known)}")
            total_of(table, name)  # it may not tell the bits
            whole = reference(table, name) if name in table.resources else None
            limits[name] = _limit(name, value, whole)
            if name in table.peaks and limits[name][0] > -math.inf:
                raise BudgetError(
                    f"{inequality(name, limits[name])}: {name} is a peak over steps, which has no lower limit"
                )
        return limits

    def __getitem__(self, name: str) -> Written:
        return self._limits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._limits)

    def __len__(self) -> int:
        return len(self._limits)

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{name}={value!r}' for name, value in self._limits.items())})"


def inequality(name: str, limit: Limit) -> str:
    """A limit in symbols.

    >>> inequality("average_bits", (3.5, 4.0)), inequality("memory_bytes", (-math.inf, 12.0))
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
        return -math.inf, amounts.parse(name, value, whole)
    if len(value) != 2 or (value[0] is None and value[1] is None):
        raise BudgetError(f"{name}={value!r}: expected an upper limit, or (lower, upper)")
    low = -math.inf if value[0] is None else amounts.parse(name, value[0], whole)
    high = math.inf if value[1] is None else amounts.parse(name, value[1], whole)
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
