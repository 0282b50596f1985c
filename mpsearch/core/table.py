"""The cost table: every option of every layer, what it costs and what it damages."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.core import shown
from mpsearch.core.layer import Layer
from mpsearch.core.tables import files
from mpsearch.core.tables.fields import UNITS as UNITS
from mpsearch.core.tables.fields import Array as Array
from mpsearch.core.tables.fields import Interactions as Interactions
from mpsearch.core.tables.fields import Peak as Peak
from mpsearch.core.tables.fields import TableFields, numbers, unique
from mpsearch.errors import PlanError, TableError, nearest
from mpsearch.files.writing import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class CostTable(TableFields):
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
        write = files.to_npz if Path(path).suffix == ".npz" else files.to_csv
        write_atomically(path, write(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CostTable":
        """Read a table; a CSV without the two comment lines, made by hand or by another tool, loads too.

        Raises:
            TableError: with the place in the file.
            OSError: where the file cannot be read.
        """
        path = Path(path)
        data = path.read_bytes()
        read = files.from_npz if path.suffix == ".npz" else files.from_csv
        try:
            return cls(**vars(read(data)))
        except (TableError, PlanError) as error:
            raise TableError(f"{path}: {error}") from None

    def to_frame(self) -> "pd.DataFrame":
        """The table as a long data frame, one row for each layer and allowed precision, columns as in the CSV."""
        import pandas as pd

        columns, rows = files.columns_and_rows(self)
        return pd.DataFrame(list(rows), columns=columns)

    def plot(self, path: str | os.PathLike[str] | None = None, *, title: str = "") -> "Figure":
        """Draw the damage of every layer at every precision, as in `mpsearch.display.figures.sensitivity_figure`.

        Args:
            path: .png, .svg or .pdf; without it the figure is only returned.
            title: above the picture.
        """
        figures = shown.figures()
        return figures.written(figures.sensitivity_figure(self, title=title), path)

    def _repr_html_(self) -> str:
        return shown.html().cost_table(self)

    def __eq__(self, other: object) -> bool:
        """True where a file of one is a file of the other: what is not allowed, or only tells a target, does not count."""
        if not isinstance(other, CostTable):
            return NotImplemented
        return (
            all(getattr(self, name) == getattr(other, name) for name in ("precisions", "unit"))
            and [_facts(layer) for layer in self.layers] == [_facts(layer) for layer in other.layers]
            and all(
                _json(getattr(self, n)) == _json(getattr(other, n))
                for n in ("origin", "fixed_usage", "reference_usage")
            )
            and self._numbers() == other._numbers()
        )

    def _numbers(self) -> dict[str, tuple[tuple[int, ...], bytes]]:
        """All numbers by name and to the last bit, without those of cells that are not allowed."""
        allowed = self.allowed
        arrays: dict[str, NDArray[Any]] = {"sensitivity": self.sensitivity}
        if self.sensitivity_se is not None:
            arrays["sensitivity_se"] = np.where(allowed, self.sensitivity_se, np.nan)
        arrays |= {f"usage of {name}": np.where(allowed, values, np.nan) for name, values in self.usage.items()}
        for name, peak in self.peaks.items():
            arrays |= {f"peak of {name}": np.where(allowed, peak.usage, 0.0), f"fixed part of {name}": peak.fixed}
        if self.interactions is not None:
            arrays |= {f"interactions: {name}": values for name, values in vars(self.interactions).items()}
        return {name: _bits(values) for name, values in arrays.items()}

    __hash__ = None  # type: ignore[assignment]


def _frozen(values: Any, what: str) -> Array:
    array = numbers(values, what)
    array.flags.writeable = False
    return array


def _facts(layer: Layer) -> tuple[Any, ...]:
    """What a file tells of a layer."""
    return layer.name, layer.kind, tuple(layer.weight_shape), layer.macs, layer.group, layer.dtype


def _json(values: Mapping[str, Any]) -> str:
    """Text that is the same before a file and after it, in whatever order the keys are."""
    return json.dumps(json.loads(json.dumps(values)), sort_keys=True)


def _bits(values: NDArray[Any]) -> tuple[tuple[int, ...], bytes]:
    """Shape and content, every nan the same."""
    return values.shape, (np.where(np.isnan(values), np.nan, values) if values.dtype.kind == "f" else values).tobytes()
