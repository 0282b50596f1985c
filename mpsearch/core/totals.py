"""Totals of a whole plan, its use of a resource or its damage: one correctly rounded sum, wherever it is printed, limited or drawn."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.table import Array, CostTable, Interactions
from mpsearch.errors import TableError

Options = NDArray[np.int64]

#: Totals that are not resources of a table but made of its layers.
DERIVED = ("average_bits", "effective_bits")


@dataclass(frozen=True, eq=False)
class Total:
    """What a whole plan uses or damages: the most over the steps of (sum of the chosen cells + what is fixed) / divisor.

    Sums are correctly rounded (`math.fsum`) over the cells of the layers and the fixed part at once, so that they depend on no order and on
    no grouping, and a larger exact sum never gives a smaller total.

    Attributes:
        name: resource, `average_bits`, `effective_bits` or `sensitivity`.
        cells: for each step, (L, P); one step but for peaks.
        fixed: for each step, what no decision touches.
        divisor: 1, or the number of weights.
        interactions: of the damage, or None.

    >>> from mpsearch import Layer, precisions
    >>> table = CostTable((Layer("a"), Layer("b")), precisions("w4"), [[0.0], [0.0]], usage={"s": [[0.1], [0.2]]}, fixed_usage={"s": 0.3})
    >>> total_of(table, "s").of(np.array([0, 0])), 0.1 + 0.2 + 0.3
    (0.6, 0.6000000000000001)
    """

    name: str
    cells: Sequence[Array]
    fixed: Sequence[float] = (0.0,)
    divisor: float = 1.0
    interactions: Interactions | None = None

    def of(self, options: Options) -> float:
        """The total of one column a layer (L,)."""
        return max(self._terms(options))

    def _terms(self, options: Options) -> Iterator[float]:
        rows = np.arange(len(options))
        pairs = self.interactions.chosen(options).tolist() if self.interactions is not None else []
        for cells, fixed in zip(self.cells, self.fixed, strict=True):
            yield math.fsum([*cells[rows, options].tolist(), fixed, *pairs]) / self.divisor

    def room(self, step: int, limit: float) -> tuple[Fraction, bool]:
        """The exact sum of cells up to which the total of a step is at most `limit`, and whether it may be reached.

        >>> total = Total("s", [np.array([[1.0]])], [0.5])
        >>> total.room(0, 3.0)[0] - Fraction(5, 2) == Fraction(1, 2**52)   # halfway to the next float
        True
        """
        last = limit
        if self.divisor != 1:
            last = limit * self.divisor
            while last / self.divisor > limit:
                last = math.nextafter(last, -math.inf)
            while (after := math.nextafter(last, math.inf)) / self.divisor <= limit:
                last = after
        after = math.nextafter(last, math.inf)
        if math.isinf(after):
            return Fraction(last) - Fraction(self.fixed[step]), True
        middle = (Fraction(last) + Fraction(after)) / 2
        return middle - Fraction(self.fixed[step]), float(middle) == last

    @property
    def negative(self) -> "Total":
        """Less of it is more: a lower limit on a sum is an upper one on its negative."""
        return Total(self.name, [-cells for cells in self.cells], [-fixed for fixed in self.fixed], self.divisor)


def total_of(table: CostTable, name: str) -> Total:
    """One total of the plans of a table.

    Args:
        table: the table.
        name: a resource; `average_bits`, nominal weight bits over the weights; `effective_bits`, 8 x memory_bytes of the decided weights
            (codes, scales, zero-points, indices) over their number, where what shares memory counts once; or `sensitivity`.

    Raises:
        TableError: where the table does not tell it.

    >>> from mpsearch import Layer, precisions
    >>> layers = (Layer("a", weight_shape=(16,)), Layer("b", weight_shape=(48,)))
    >>> table = CostTable(layers, precisions("w4 w8"), [[0, 0], [0, 0]], usage={"memory_bytes": [[10, 18], [26, 50]]})
    >>> total_of(table, "average_bits").of(np.array([1, 0])), total_of(table, "effective_bits").of(np.array([1, 0]))
    (5.0, 5.5)
    """
    if name == "sensitivity":
        return Total(name, [table.sensitivity], interactions=table.interactions)
    if name == "average_bits":
        return Total(name, [table.bits], divisor=weights(table))
    if name == "effective_bits":
        return _effective_bits(table)
    if name in table.peaks:
        return Total(name, list(table.peaks[name].usage), table.peaks[name].fixed.tolist())
    return Total(name, [table.usage[name]], [table.fixed_usage.get(name, 0.0)])


def totals_of(table: CostTable) -> list[Total]:
    """All that a table tells of its plans: resources, bits where they are known, sensitivity last."""
    names = [*table.resources]
    if all(layer.numel or layer.is_cache for layer in table.layers) and weights(table):
        names.append("average_bits")
        if "memory_bytes" in table.usage:
            names.append("effective_bits")
    return [total_of(table, name) for name in [*names, "sensitivity"]]


def weights(table: CostTable) -> float:
    """Number of weights of the layers of a table."""
    return float(sum(layer.numel for layer in table.layers))


def _effective_bits(table: CostTable) -> Total:
    if "memory_bytes" not in table.usage:
        raise TableError(
            "effective_bits are bits that are really stored, and the table has no memory_bytes; count them "
            '(resources=("memory_bytes",)), or limit average_bits'
        )
    table.bits  # noqa: B018 refuses layers whose number of weights is not known
    bytes_ = table.usage["memory_bytes"]
    numel = np.array([layer.numel for layer in table.layers])
    stored = (numel > 0) & np.where(table.allowed, bytes_, 0.0).any(axis=1)
    if not stored.any():
        raise TableError("effective_bits: the table counts no byte of any weight")
    return Total("effective_bits", [np.where(stored[:, None], 8 * bytes_, 0.0)], divisor=float(numel[stored].sum()))


def merged(values: Array, row_of_layer: NDArray[np.int64]) -> tuple[Array, Array]:
    """Sums of the layers of each row as pairs of floats (G, P): the rounded sum, and what rounding it left over.

    Each addition is free of error (Knuth, The Art of Computer Programming 2, 4.2.2); a pair holds some 106 bits. nan where any
    layer is nan.

    >>> [part.tolist() for part in merged(np.array([[0.1], [0.2], [0.3]]), np.array([0, 0, 1]))]
    [[[0.30000000000000004], [0.3]], [[-2.7755575615628914e-17], [0.0]]]
    """
    count = int(row_of_layer.max()) + 1
    if count == len(row_of_layer):
        return values.view(), np.broadcast_to(0.0, values.shape)
    order = np.argsort(row_of_layer, kind="stable")
    first = np.searchsorted(row_of_layer[order], np.arange(count))
    sizes = np.diff(np.append(first, len(order)))
    high, low = values[order[first]].copy(), np.zeros((count, values.shape[1]))
    for place in range(1, int(sizes.max())):
        rows = np.flatnonzero(sizes > place)
        high[rows], low[rows] = plus(high[rows], low[rows], values[order[first[rows] + place]])
    return high, low


def plus(high: Array, low: Array, more: Array | float) -> tuple[Array, Array]:
    """The pair `high + low` after adding `more`."""
    total = high + more
    back = total - high
    error = (high - (total - back)) + (more - back) + low
    rounded = total + error
    return rounded, error - (rounded - total)


def exact_sum(values: Array) -> Fraction:
    """The sum without any rounding.

    >>> exact_sum(np.array([0.1, 0.2])) == Fraction(0.1) + Fraction(0.2)
    True
    """
    parts = [math.fsum(values.tolist())]
    while parts[-1]:
        parts.append(math.fsum([*values.tolist(), *(-part for part in parts)]))
    return sum(map(Fraction, parts), Fraction(0))


def running_sums(terms: Array) -> Array:
    """(N,) correctly rounded sums of the first 1, 2, ... N terms.

    >>> running_sums(np.array([0.1, 0.2, 0.3, -0.6])).tolist()
    [0.1, 0.30000000000000004, 0.6, 2.7755575615628914e-17]
    """
    mantissa, exponent = np.frexp(terms)
    digits = np.ldexp(mantissa, 53).astype(np.int64)
    there = digits != 0
    if not there.any():
        return np.zeros(len(terms))
    zeros = np.log2(np.where(there, digits & -digits, 1).astype(float)).astype(np.int64)  # at the end of each
    place = np.where(there, exponent - 53 + zeros, exponent[there].max())
    unit = int(place[there].min())
    shift = np.where(there, place - unit, 0)
    if int(shift.max()) + 53 + len(terms).bit_length() < 63:
        return np.asarray(np.ldexp(np.cumsum((digits >> zeros) << shift).astype(float), unit))
    sums = np.cumsum((digits >> zeros).astype(object) << shift.astype(object)).tolist()
    if unit >= 0:
        return np.array([float(whole << unit) for whole in sums])
    scale = 1 << -unit
    return np.array([whole / scale for whole in sums])  # whole numbers divide with one rounding
