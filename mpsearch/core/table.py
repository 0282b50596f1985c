"""The cost table: every option of every layer, what it costs and what it damages."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.core import shown
from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import PlanError, TableError, nearest
from mpsearch.files.writing import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

#: Of damages: nats, a ranking without a unit, and those of the metrics (`mpsearch.metrics.comparisons`).
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
class CostTable:
    """Every option of every layer.

    Attributes:
        layers: L layers, in the order of the rows.
        precisions: P precisions, in the order of the columns.
        sensitivity: (L, P) predicted damage of giving one layer one precision; nan = option not allowed.
        sensitivity_se: (L, P) standard errors, or None.
        usage: resource -> (L, P) use of it by the cell.
        fixed_usage: resource -> what no decision touches (norms, biases, excluded layers).
        reference_usage: resource -> use by the unquantized model.
        unit: `nats` (expected rise of the mean divergence or loss), the unit of another metric (`mse`, `relative error`, ...), or
            `relative` (a ranking).
        origin: where the numbers come from; JSON values.
        interactions: damage of pairs of cells, or None.
        peaks: resources that are a maximum over steps instead of a sum.

    Raises:
        TableError: where shapes, names or numbers do not fit.

    >>> from mpsearch import Layer, precisions
    >>> table = CostTable((Layer("fc"),), precisions("w4 w8"), [[0.5, 0.1]], usage={"memory_bytes": [[4, 8]]})
    >>> table.sensitivity.shape, table.resources
    ((1, 2), ('memory_bytes',))
    """

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

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "layers", tuple(self.layers))
        put(self, "precisions", tuple(self.precisions))
        put(self, "sensitivity", _frozen(self.sensitivity, "sensitivity"))
        if self.sensitivity_se is not None:
            put(self, "sensitivity_se", _frozen(self.sensitivity_se, "sensitivity_se"))
        put(self, "usage", {name: _frozen(values, name) for name, values in self.usage.items()})
        for label in ("fixed_usage", "reference_usage"):
            amounts = getattr(self, label).items()
            for name, value in amounts:
                if np.ndim(value):
                    raise TableError(f"{label} of {name} is {value!r}, expected one number")
            put(self, label, {name: float(numbers(value, f"{label} of {name}")) for name, value in amounts})
        put(self, "peaks", dict(self.peaks))
        put(self, "origin", dict(self.origin))
        self._check()

    def _check(self) -> None:
        shape = (len(self.layers), len(self.precisions))
        if 0 in shape:
            raise TableError(f"a table of {shape[0]} layers and {shape[1]} precisions, expected at least one of each")
        if self.unit not in UNITS:
            raise TableError(f"unit {self.unit!r}, expected one of {', '.join(UNITS)}")
        unique("layer", [layer.name for layer in self.layers])
        unique("precision", [str(precision) for precision in self.precisions])
        arrays = {"sensitivity": self.sensitivity, **self.usage}
        if self.sensitivity_se is not None:
            arrays["sensitivity_se"] = self.sensitivity_se
        for name, values in arrays.items():
            if values.shape != shape:
                raise TableError(f"{name} has shape {values.shape}, expected {shape} (layers, precisions)")
        self._refuse(
            "sensitivity",
            np.isinf(self.sensitivity),
            self.sensitivity,
            "a finite number, or nan = not allowed",
        )
        allowed = self.allowed
        if not allowed.any(axis=1).all():
            row = int(np.argmin(allowed.any(axis=1)))
            raise TableError(f"layer {self.layers[row].name!r} has no allowed precision: every sensitivity is nan")
        for name, values in self.usage.items():
            self._refuse(name, ~np.isfinite(values) & allowed, values, "a finite number")
        if self.sensitivity_se is not None:
            bad = (self.sensitivity_se < 0) | np.isinf(self.sensitivity_se)
            self._refuse("sensitivity_se", bad & allowed, self.sensitivity_se, "0 or more, or nan = unknown")
        for name, peak in self.peaks.items():
            if peak.usage.shape[1:] != shape:
                raise TableError(f"peak {name} has shape {peak.usage.shape}, expected (steps, {shape[0]}, {shape[1]})")
            if not np.isfinite(peak.usage[:, allowed]).all() or not np.isfinite(peak.fixed).all():
                raise TableError(f"peak {name} has a number that is not finite")
            if name in self.usage:
                raise TableError(f"{name} is a sum and a peak at once")
        known = set(self.usage) | set(self.peaks)
        for label, totals in (("fixed_usage", self.fixed_usage), ("reference_usage", self.reference_usage)):
            for name, value in totals.items():
                if name not in known:
                    raise TableError(f"{label} names {name!r}, which is no resource of the table{nearest(name, known)}")
                if not math.isfinite(value):
                    raise TableError(f"{label} of {name} is {value}, expected a finite number")
        if self.interactions is not None and len(self.interactions.value):
            cells = np.concatenate([self.interactions.first, self.interactions.second])
            if (cells < 0).any() or (cells >= np.array(shape)).any():
                raise TableError(f"an interaction names a cell outside the {shape[0]} x {shape[1]} table")

    def _refuse(self, name: str, bad: NDArray[np.bool_], values: Array, expected: str) -> None:
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise TableError(
                f"{name} of layer {self.layers[row].name!r} at {self.precisions[column]} is "
                f"{values[row, column]}, expected {expected}"
            )

    @property
    def allowed(self) -> NDArray[np.bool_]:
        """(L, P) True where the option is allowed."""
        return ~np.isnan(self.sensitivity)

    @property
    def resources(self) -> tuple[str, ...]:
        """Names of all resources, sums first."""
        return (*self.usage, *self.peaks)

    @property
    def bits(self) -> Array:
        """(L, P) nominal weight bits x elements of each cell, 0 for a cache: `average_bits` times the number of weights.

        Raises:
            TableError: where a layer's number of weights is not known.
        """
        numel = np.array([layer.numel for layer in self.layers], np.float64)
        unknown = [layer.name for layer in self.layers if not (layer.numel or layer.is_cache)]
        if unknown or not numel.any():
            name = (unknown or [self.layers[0].name])[0]
            raise TableError(f"average_bits needs the numel of every layer; it is missing for {name!r}")
        return np.outer(numel, [precision.weight_bits for precision in self.precisions])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as long CSV, or as NPZ where the name ends in `.npz`; atomic, and exact to the last bit."""
        from mpsearch.core import table_files

        write = table_files.to_npz if Path(path).suffix == ".npz" else table_files.to_csv
        write_atomically(path, write(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CostTable":
        """Read a table; a CSV without the two comment lines, made by hand or by another tool, loads too.

        Raises:
            TableError: with the place in the file.
            OSError: where the file cannot be read.
        """
        from mpsearch.core import table_files

        path = Path(path)
        data = path.read_bytes()
        try:
            return table_files.from_npz(data) if path.suffix == ".npz" else table_files.from_csv(data)
        except (TableError, PlanError) as error:
            raise TableError(f"{path}: {error}") from None

    def to_frame(self) -> "pd.DataFrame":
        """The table as a long data frame, one row for each layer and allowed precision, columns as in the CSV."""
        import pandas as pd

        from mpsearch.core.table_files import columns_and_rows

        columns, rows = columns_and_rows(self)
        return pd.DataFrame(list(rows), columns=columns)

    def plot(self, path: str | os.PathLike[str] | None = None, *, title: str = "") -> "Figure":
        """Draw the damage of every layer at every precision, as in `mpsearch.display.figures.sensitivity_figure`.

        Args:
            path: .png, .svg or .pdf; without it the figure is only returned.
            title: above the picture.
        """
        figures = shown.figures()
        return figures.written(figures.sensitivity_figure(self, title=title), path)  # type: ignore[no-any-return]

    def _repr_html_(self) -> str:
        return shown.html().cost_table(self)  # type: ignore[no-any-return]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CostTable):
            return NotImplemented
        from mpsearch.core.table_files import to_npz

        return to_npz(self) == to_npz(other)

    __hash__ = None  # type: ignore[assignment]


def _frozen(values: Any, what: str) -> Array:
    array = numbers(values, what)
    array.flags.writeable = False
    return array


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
