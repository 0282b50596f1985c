"""Exact arithmetic on plans: what a choice costs, whether it keeps the limits, what can be part of one that does."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Options = NDArray[np.int64]

Whole = NDArray[Any]  # int64, or Python integers where 64 bits are too few

_ROWS = 1 << 16  # rows worked on at once
_OFFSET = 2.0**20  # least uses that outweigh what options differ by so much are taken out


def total(table: Floats, options: Options) -> float:
    """Correctly rounded sum of one cell a row.

    >>> total(np.array([[1e16, 1.0], [1.0, 2.0], [-1e16, 0.0]]), np.array([0, 0, 0]))
    1.0
    """
    return math.fsum(table[np.arange(len(options)), options].tolist())


def fits(options: Options, usage: Floats, limits: Floats) -> bool:
    """Whether `options` (L,) keep every limit, decided as `Solver.choose` defines it."""
    return all(total(use, options) <= limit for use, limit in zip(usage, limits, strict=True))


def least_usage(allowed: NDArray[np.bool_], usage: Floats) -> Floats:
    """(R, L): the least that any allowed option of a row uses."""
    least: Floats = np.where(allowed, usage, np.inf).min(axis=2)
    return least


def reachable(sensitivity: Floats, usage: Floats, limits: Floats) -> NDArray[np.bool_]:
    """(L, P): the cells that a choice within the limits can contain, every other row at its least use.

    A row without any is a proof of infeasibility: `math.fsum` is monotone, so a sum of least uses above its
    limit stays above it for every choice. Cells within rounding of the limit are kept.
    """
    allowed = ~np.isnan(sensitivity)
    for use, least, limit in zip(usage, least_usage(allowed, usage), limits, strict=True):
        needed = math.fsum(least.tolist())
        rounding = 4 * np.finfo(float).eps * (math.fsum(np.abs(least).tolist()) + abs(limit))
        slack = limit - needed if needed > limit else limit - needed + rounding
        allowed &= use - least[:, None] <= slack + 4 * np.finfo(float).eps * np.abs(use)
        allowed &= needed <= limit
    return allowed


def room(least: Floats, limit: float) -> float:
    """What a choice may use beyond the least of each row, up to half an ulp of the limit that rounds away.

    >>> bool(room(np.array([8e10]), 8e10) == np.spacing(8e10) / 2)
    True
    """
    if math.isinf(limit):
        return limit
    middle = (Fraction(limit) + Fraction(math.nextafter(limit, math.inf))) / 2
    return float(middle - sum(map(Fraction, least.tolist()), Fraction(0)))


def whole(use: Floats, allowed: NDArray[np.bool_], limit: float) -> tuple[Whole, int, int]:
    """`use` in whole multiples of the largest power of two that allows it, the most that keeps the limit, and the exponent of the unit.

    A sum keeps the limit when it does so after rounding to a float, half to even, as `math.fsum` rounds.

    >>> whole(np.array([[0.5, 0.75]]), np.full((1, 2), True), 1.0)
    (array([[2, 3]]), 4, -2)
    """
    mantissa, exponent = np.frexp(np.where(allowed, use, 0.0))
    digits = np.ldexp(mantissa, 53).astype(np.int64)
    lowest_bit = np.where(digits == 0, 1, digits & -digits)
    place = np.where(digits == 0, np.iinfo(np.int32).max, exponent - 53 + np.log2(lowest_bit).astype(np.int64))
    unit = min(int(place.min()), 1023)
    shift = np.where(digits == 0, 0, place - unit)
    bits = int((shift + 53).max()) + len(use).bit_length() + 1
    odd = digits // lowest_bit
    cells = (odd << shift) if bits < 63 else (odd.astype(object) << shift.astype(object))
    if math.isinf(limit):
        return cells, 1 << (bits + 1 if bits >= 63 else 62), unit
    middle = (Fraction(limit) + Fraction(math.nextafter(limit, math.inf))) / 2
    most = math.floor(middle / Fraction(2) ** unit)
    if float(most * Fraction(2) ** unit) > limit:
        most -= 1
    return cells, (most if bits >= 63 else max(min(most, 2**62), -(2**62))), unit


def shifted(sensitivity: Floats, usage: Floats, limits: Floats) -> tuple[Floats, Floats]:
    """The same choices within the limits, without least uses of rows so large that what options differ by drowns in their rounding.

    Such a resource is counted from the least use of each row, and the limit with it; in whole multiples of a power of two, so nothing
    is rounded. Where 2^53 of them are too few it stays as it is.

    >>> use, limit = np.array([[[1e16, 1e16 + 4]]]), np.array([1e16 + 4])
    >>> [part.tolist() for part in shifted(np.zeros((1, 2)), use, limit)]
    [[[[0.0, 4.0]]], [4.0]]
    """
    rows, free, moved = list(usage), limits.astype(np.float64), False
    for r, (use, limit) in enumerate(zip(usage, limits.tolist(), strict=True)):
        offset = spread = 0.0
        for at in range(0, len(use), _ROWS):
            part = np.where(np.isnan(sensitivity[at : at + _ROWS]), np.nan, use[at : at + _ROWS])
            low = np.nanmin(part, axis=1)
            offset += float(np.abs(low).sum())
            spread += float((np.nanmax(part, axis=1) - low).sum())
        if not offset > _OFFSET * spread or not math.isfinite(limit):
            continue
        allowed = ~np.isnan(sensitivity)
        cells, most, unit = whole(use, allowed, limit)
        cells = cells.astype(object)
        least = np.array([min(row[there].tolist()) for row, there in zip(cells, allowed, strict=True)], object)
        more = np.where(allowed, cells - least[:, None], 0)
        room = most - sum(least.tolist())
        if sum(more.max(axis=1).tolist()) < 2**53:
            moved = True
            rows[r] = np.ldexp(more.astype(float), unit)
            free[r] = math.ldexp(max(min(room, 2**53), -(2**53)), unit)
    return (np.array(rows) if moved else usage), free
