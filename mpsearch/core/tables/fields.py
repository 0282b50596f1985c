"""What a cost table is made of, apart from what it can do: its fields, which files translate to and from bytes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import TableError

Array = NDArray[np.float64]

#: Of damages: nats, a ranking without a unit, and those of the metrics (`mpsearch.metrics.registry`).
UNITS = (
    "nats", "relative", "mse", "relative error", "mse / peak^2", "cosine distance", "loss",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Interactions:
    """Extra damage of pairs of cells, added once where both cells are chosen (CLADO, 2307.05657).

    Attributes:
        first: (N, 2) int64, [layer, precision] indices of one cell.
        second: (N, 2) int64, of the other; the two layers differ, and each unordered pair is listed once.
        value: (N,) float64, in the unit of the table.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    value: Array

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            cells = numbers(getattr(self, name), f"interactions: {name}")
            if not ((cells == np.floor(cells)) & (np.abs(cells) < 2**53)).all():
                raise TableError(f"interactions: {name} has a place that is no whole number")
            object.__setattr__(self, name, cells.astype(np.int64))
        object.__setattr__(self, "value", numbers(self.value, "interactions: value"))
        count = len(self.value)
        if self.first.shape != (count, 2) or self.second.shape != (count, 2):
            raise TableError(
                f"interactions of shapes {self.first.shape}, {self.second.shape}, {self.value.shape}, "
                "expected (N, 2), (N, 2), (N,)"
            )
        if not np.isfinite(self.value).all():
            raise TableError(f"interaction {int(np.argmin(np.isfinite(self.value)))} is not finite")
        if (self.first[:, 0] == self.second[:, 0]).any():
            raise TableError("an interaction of a layer with itself; put it into the sensitivity")

    def chosen(self, options: NDArray[np.int64]) -> Array:
        """Values of the pairs that `options` (L,) chooses."""
        both = (options[self.first[:, 0]] == self.first[:, 1]) & (options[self.second[:, 0]] == self.second[:, 1])
        values: Array = self.value[both]
        return values

    def total(self, options: NDArray[np.int64]) -> float:
        """Their sum."""
        return math.fsum(self.chosen(options))


@dataclass(frozen=True, eq=False)
class Peak:
    """A resource that is the maximum over steps, such as activation memory: at each step the live tensors.

    Attributes:
        usage: (T, L, P) float64, what each cell adds at each step.
        fixed: (T,) float64, what no decision touches at each step.
    """

    usage: Array
    fixed: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "usage", numbers(self.usage, "usage of a peak"))
        object.__setattr__(self, "fixed", numbers(self.fixed, "fixed part of a peak"))
        if self.usage.ndim != 3 or self.fixed.shape != self.usage.shape[:1] or not len(self.fixed):
            raise TableError(
                f"a peak of shapes {self.usage.shape} and {self.fixed.shape}, expected (T, L, P) and (T,), T >= 1"
            )


@dataclass(frozen=True, eq=False)
class TableFields:
    """Fields of a `CostTable`, which says what each is and checks them."""

    layers: tuple[Layer, ...]
    precisions: tuple[Precision, ...]
    sensitivity: Array
    sensitivity_se: Array | None = None
    usage: Mapping[str, Array] = field(default_factory=dict)
    fixed_usage: Mapping[str, float] = field(default_factory=dict)
    reference_usage: Mapping[str, float] = field(default_factory=dict)
    unit: str = "relative"
    origin: Mapping[str, Any] = field(default_factory=dict)
    interactions: Interactions | None = None
    peaks: Mapping[str, Peak] = field(default_factory=dict)

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """(L, P) True where the option is allowed."""
        return ~np.isnan(self.sensitivity)


def numbers(values: Any, what: str) -> Array:
    """Real numbers as an array of float64.

    Raises:
        TableError: for anything else: text, complex numbers, rows of different length.

    >>> numbers([[1, 2], [3]], "sensitivity")
    Traceback (most recent call last):
    mpsearch.errors.TableError: sensitivity: expected numbers in rows of one length, got a list
    """
    try:
        array = np.asarray(values)
        if array.dtype.kind in "biufO":
            return array.astype(np.float64)
    except (ValueError, TypeError, OverflowError, RuntimeError):  # the last: of a tensor with a gradient
        pass
    got = values.dtype if isinstance(values, np.ndarray) else f"a {type(values).__name__}"
    raise TableError(f"{what}: expected numbers in rows of one length, got {got}")


def unique(what: str, names: list[str]) -> None:
    """Refuse a name that occurs twice.

    Raises:
        TableError: with the name.
    """
    if len(set(names)) != len(names):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise TableError(f"{what} {name!r} occurs twice")
            seen.add(name)
