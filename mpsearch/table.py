"""The cost table: every option of every layer, what it costs and what it damages."""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import PlanError, TableError, nearest
from mpsearch.files import write_atomically
from mpsearch.layer import Layer
from mpsearch.precision import Precision

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[np.float64]

UNITS = ("nats", "relative")
_VERSION = 1
_FIRST_LINE = f"# mpsearch_table: {_VERSION}"
_KNOWN_COLUMNS = ("layer", "precision", "sensitivity", "sensitivity_se", "kind", "group", "numel", "macs")
_HEADER_KEYS = (
    "unit",
    "origin",
    "fixed_usage",
    "reference_usage",
    "precisions",
    "weight_shapes",
    "dtypes",
    "interactions",
    "peaks",
)


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
        for name, dtype in (("first", np.int64), ("second", np.int64), ("value", np.float64)):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype))
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

    def total(self, options: NDArray[np.int64]) -> float:
        """Sum of the values of the pairs that `options` (L,) chooses."""
        chosen = (options[self.first[:, 0]] == self.first[:, 1]) & (options[self.second[:, 0]] == self.second[:, 1])
        return math.fsum(self.value[chosen])


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
        object.__setattr__(self, "usage", np.asarray(self.usage, np.float64))
        object.__setattr__(self, "fixed", np.asarray(self.fixed, np.float64))
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
        unit: `nats` (expected rise of the mean divergence or loss) or `relative` (a ranking).
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
        put(self, "sensitivity", _frozen(self.sensitivity))
        if self.sensitivity_se is not None:
            put(self, "sensitivity_se", _frozen(self.sensitivity_se))
        put(self, "usage", {name: _frozen(values) for name, values in self.usage.items()})
        put(self, "fixed_usage", {name: float(value) for name, value in self.fixed_usage.items()})
        put(self, "reference_usage", {name: float(value) for name, value in self.reference_usage.items()})
        put(self, "peaks", dict(self.peaks))
        put(self, "origin", dict(self.origin))
        self._check()

    def _check(self) -> None:
        shape = (len(self.layers), len(self.precisions))
        if 0 in shape:
            raise TableError(f"a table of {shape[0]} layers and {shape[1]} precisions, expected at least one of each")
        if self.unit not in UNITS:
            raise TableError(f"unit {self.unit!r}, expected one of {', '.join(UNITS)}")
        _unique("layer", [layer.name for layer in self.layers])
        _unique("precision", [str(precision) for precision in self.precisions])
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
        """(L, P) nominal weight bits x elements of each cell: `average_bits` times the number of weights.

        Raises:
            TableError: where a layer's number of weights is not known.
        """
        numel = np.array([layer.numel for layer in self.layers], np.float64)
        if not numel.all():
            name = self.layers[int(np.argmin(numel > 0))].name
            raise TableError(f"average_bits needs the numel of every layer; it is missing for {name!r}")
        return np.outer(numel, [precision.weight_bits for precision in self.precisions])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as long CSV, or as NPZ where the name ends in `.npz`; atomic, and exact to the last bit."""
        write_atomically(path, self._npz() if Path(path).suffix == ".npz" else self._csv())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CostTable":
        """Read a table; a CSV without the two comment lines, made by hand or by another tool, loads too.

        Raises:
            TableError: with the place in the file.
            OSError: where the file cannot be read.
        """
        path = Path(path)
        data = path.read_bytes()
        try:
            return _from_npz(data) if path.suffix == ".npz" else _from_csv(data)
        except (TableError, PlanError) as error:
            raise TableError(f"{path}: {error}") from None

    def to_frame(self) -> "pd.DataFrame":
        """The table as a long data frame, one row for each layer and allowed precision, columns as in the CSV."""
        import pandas as pd

        columns, rows = self._rows()
        return pd.DataFrame(list(rows), columns=columns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CostTable):
            return NotImplemented
        return self._npz() == other._npz()

    __hash__ = None  # type: ignore[assignment]

    def _header(self, *, arrays_apart: bool) -> dict[str, Any]:
        header: dict[str, Any] = {
            "unit": self.unit,
            "origin": self.origin,
            "fixed_usage": self.fixed_usage,
            "reference_usage": self.reference_usage,
            "precisions": [str(precision) for precision in self.precisions],
        }
        if arrays_apart:
            return header
        shapes = {layer.name: layer.weight_shape for layer in self.layers if len(layer.weight_shape) > 1}
        dtypes = {layer.name: layer.dtype for layer in self.layers if layer.dtype != "float32"}
        header |= {name: value for name, value in (("weight_shapes", shapes), ("dtypes", dtypes)) if value}
        if self.interactions is not None:
            cells = zip(self.interactions.first, self.interactions.second, self.interactions.value, strict=True)
            header["interactions"] = [
                [
                    self.layers[a].name,
                    str(self.precisions[p]),
                    self.layers[b].name,
                    str(self.precisions[q]),
                    float(value),
                ]
                for (a, p), (b, q), value in cells
            ]
        if self.peaks:
            header["peaks"] = {
                name: {
                    "usage": np.where(self.allowed, peak.usage, 0.0).tolist(),
                    "fixed": peak.fixed.tolist(),
                }
                for name, peak in self.peaks.items()
            }
        return header

    def _rows(self) -> tuple[list[str], Iterable[list[Any]]]:
        sizes = any(layer.numel for layer in self.layers)
        optional = {
            "sensitivity_se": self.sensitivity_se is not None,
            "kind": any(layer.kind for layer in self.layers),
            "group": any(layer.group for layer in self.layers),
            "numel": sizes,
            "macs": sizes or any(layer.macs for layer in self.layers),
        }
        columns = [
            "layer",
            "precision",
            "sensitivity",
            *(name for name, there in optional.items() if there),
            *self.usage,
        ]

        def rows() -> Iterable[list[Any]]:
            names = [str(precision) for precision in self.precisions]
            allowed = self.allowed
            for row, layer in enumerate(self.layers):
                facts = {"kind": layer.kind, "group": layer.group, "numel": layer.numel, "macs": layer.macs}
                fixed = [facts[name] for name in facts if optional[name]]
                for column in np.flatnonzero(allowed[row]):
                    cell: list[Any] = [layer.name, names[column], float(self.sensitivity[row, column])]
                    if self.sensitivity_se is not None:
                        cell.append(float(self.sensitivity_se[row, column]))
                    yield cell + fixed + [_plain(values[row, column]) for values in self.usage.values()]

        return columns, rows()

    def _csv(self) -> str:
        text = io.StringIO()
        text.write(f"{_FIRST_LINE}\n# {json.dumps(self._header(arrays_apart=False))}\n")
        columns, rows = self._rows()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
        return text.getvalue()

    def _npz(self) -> bytes:
        arrays: dict[str, Any] = {
            "header": np.array(json.dumps({"mpsearch_table": _VERSION, **self._header(arrays_apart=True)})),
            "layer": np.array([layer.name for layer in self.layers]),
            "kind": np.array([layer.kind for layer in self.layers]),
            "group": np.array([layer.group for layer in self.layers]),
            "macs": np.array([layer.macs for layer in self.layers], np.int64),
            "dtype": np.array([layer.dtype for layer in self.layers]),
            "weight_shape": np.array(["x".join(map(str, layer.weight_shape)) for layer in self.layers]),
            "sensitivity": self.sensitivity,
        }
        if self.sensitivity_se is not None:
            arrays["sensitivity_se"] = np.where(self.allowed, self.sensitivity_se, np.nan)
        arrays |= {f"usage:{name}": np.where(self.allowed, v, np.nan) for name, v in self.usage.items()}
        if self.interactions is not None:
            arrays |= {
                f"interactions:{name}": getattr(self.interactions, name) for name in ("first", "second", "value")
            }
        for name, peak in self.peaks.items():
            arrays[f"peak:{name}"] = np.where(self.allowed, peak.usage, 0.0)
            arrays[f"peak_fixed:{name}"] = peak.fixed
        data = io.BytesIO()
        np.savez(data, allow_pickle=False, **arrays)
        return data.getvalue()


def _frozen(values: Any) -> Array:
    array = np.array(values, np.float64)
    array.flags.writeable = False
    return array


def _unique(what: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise TableError(f"{what} {name!r} occurs twice")
            seen.add(name)


def _plain(value: float) -> float | int:
    """Whole numbers without `.0`, so that a table of bytes reads as one."""
    value = float(value)
    return (
        int(value)
        if value.is_integer() and abs(value) < 2**53 and not (value == 0 and math.copysign(1, value) < 0)
        else value
    )


def _json_header(text: str, place: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except json.JSONDecodeError as error:
        raise TableError(f"{place}: not a JSON object ({error})") from None
    if not isinstance(header, dict):
        raise TableError(f"{place}: a JSON {type(header).__name__}, expected an object")
    for key in header:
        if key not in _HEADER_KEYS:
            raise TableError(f"{place}: unknown key {key!r}{nearest(key, _HEADER_KEYS)}")
    for key in ("fixed_usage", "reference_usage"):
        amounts = header.get(key, {})
        if not isinstance(amounts, dict) or not all(isinstance(v, int | float) for v in amounts.values()):
            raise TableError(f"{place}: {key} is {amounts!r}, expected an object of resource: number")
    return header


def _from_csv(data: bytes) -> CostTable:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise TableError(f"byte {error.start} is not UTF-8 text, so this is no CSV") from None
    header: dict[str, Any] = {}
    first = 0
    if lines and lines[0].startswith("#"):
        if not lines[0].startswith("# mpsearch_table:"):
            raise TableError(f"line 1: {lines[0]!r}, expected {_FIRST_LINE!r}")
        if lines[0].strip() != _FIRST_LINE:
            raise TableError(f"line 1: {lines[0]!r}: this mpsearch reads version {_VERSION} of the table format")
        if len(lines) < 2 or not lines[1].startswith("#"):
            raise TableError("line 2: expected '# ' and one JSON object")
        header = _json_header(lines[1][1:], "line 2")
        first = 2
    rows = list(csv.reader(lines[first:], strict=True)) if len(lines) > first else []
    if not rows:
        raise TableError("no header line, expected one such as layer,precision,sensitivity,memory_bytes")
    columns = [name.strip() for name in rows[0]]
    for needed in ("layer", "precision", "sensitivity"):
        if needed not in columns:
            raise TableError(f"line {first + 1}: no column {needed!r} among {', '.join(columns)}")
    _unique("column", columns)
    return _assemble(header, columns, rows[1:], first + 2)


def _assemble(header: dict[str, Any], columns: list[str], rows: list[list[str]], line: int) -> CostTable:
    place = {name: index for index, name in enumerate(columns)}
    resources = [name for name in columns if name not in _KNOWN_COLUMNS]
    numbers = [name for name in ("sensitivity", "sensitivity_se", *resources) if name in place]
    layers: dict[str, int] = {}
    facts: list[dict[str, str]] = []
    about: list[str] = [name for name in ("kind", "group", "numel", "macs") if name in place]
    options: dict[Precision, int] = {Precision.parse(text): i for i, text in enumerate(header.get("precisions", []))}
    cells: dict[tuple[int, int], list[float]] = {}
    for offset, row in enumerate(rows):
        if not row:
            continue
        where = f"line {line + offset}"
        if len(row) != len(columns):
            raise TableError(f"{where}: {len(row)} fields, expected {len(columns)} ({', '.join(columns)})")
        try:
            precision = Precision.parse(row[place["precision"]])
        except PlanError as error:
            raise TableError(f"{where}: {error}") from None
        layer = row[place["layer"]]
        index = layers.setdefault(layer, len(layers))
        fact = {name: row[place[name]] for name in about}
        if index == len(facts):
            facts.append(fact)
        elif facts[index] != fact:
            name = next(name for name in fact if fact[name] != facts[index][name])
            raise TableError(
                f"{where}: {name} of layer {layer!r} is {fact[name]!r}, earlier it was {facts[index][name]!r}"
            )
        cell = (index, options.setdefault(precision, len(options)))
        if cell in cells:
            raise TableError(f"{where}: layer {layer!r} at {precision} occurs twice")
        cells[cell] = [_number(row[place[name]], name, where, layer, precision) for name in numbers]
    if not cells:
        raise TableError("no rows: a table needs at least one layer")
    shapes, dtypes = header.get("weight_shapes", {}), header.get("dtypes", {})
    for key, named in (("weight_shapes", shapes), ("dtypes", dtypes)):
        for name in named:
            if name not in layers:
                raise TableError(f"line 2: {key} names {name!r}, which is no layer of the table{nearest(name, layers)}")
    made = []
    for name, index in layers.items():
        numel = _integer(facts[index].get("numel", ""), "numel", name)
        shape = tuple(shapes.get(name, (numel,) if numel else ()))
        if shape and numel and math.prod(shape) != numel:
            raise TableError(f"layer {name!r} has numel {numel} but the shape {shape}")
        macs = _integer(facts[index].get("macs", ""), "macs", name)
        fact = facts[index]
        made.append(Layer(name, fact.get("kind", ""), shape, macs, fact.get("group", ""), dtypes.get(name, "float32")))
    arrays = {name: np.full((len(layers), len(options)), np.nan) for name in numbers}
    for (i, j), values in cells.items():
        for name, value in zip(numbers, values, strict=True):
            arrays[name][i, j] = value
    return CostTable(
        tuple(made),
        tuple(options),
        arrays["sensitivity"],
        arrays.get("sensitivity_se"),
        {name: arrays[name] for name in resources},
        header.get("fixed_usage", {}),
        header.get("reference_usage", {}),
        header.get("unit", "relative"),
        header.get("origin", {}),
        _named_interactions(header.get("interactions"), layers, options),
        {name: Peak(peak["usage"], peak["fixed"]) for name, peak in header.get("peaks", {}).items()},
    )


def _named_interactions(
    rows: list[list[Any]] | None, layers: Mapping[str, int], options: Mapping[Precision, int]
) -> Interactions | None:
    if rows is None:
        return None
    first, second, value = [], [], []
    for number, row in enumerate(rows):
        try:
            a, p, b, q, amount = row
            first.append((layers[a], options[Precision.parse(p)]))
            second.append((layers[b], options[Precision.parse(q)]))
            value.append(float(amount))
        except (KeyError, ValueError, TypeError):
            raise TableError(
                f"line 2: interaction {number} is {row!r}, expected [layer, precision, layer, precision, number] of the table"
            ) from None
    return Interactions(
        np.array(first, np.int64).reshape(-1, 2), np.array(second, np.int64).reshape(-1, 2), np.array(value)
    )


def _number(text: str, name: str, where: str, layer: str, precision: Precision) -> float:
    try:
        value = float(text)
    except ValueError:
        raise TableError(f"{where}: {name} of layer {layer!r} at {precision} is {text!r}, expected a number") from None
    if math.isfinite(value) or (name == "sensitivity_se" and math.isnan(value)):
        return value
    hint = "; leave the row out where the option is not allowed" if name == "sensitivity" else ""
    raise TableError(f"{where}: {name} of layer {layer!r} at {precision} is {text}, expected a finite number{hint}")


def _integer(text: str, name: str, layer: str) -> int:
    if not text:
        return 0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value.is_integer() or value < 0:
        raise TableError(f"{name} of layer {layer!r} is {text!r}, expected a whole number >= 0")
    return int(value)


def _from_npz(data: bytes) -> CostTable:
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise TableError(f"not a table in NPZ form ({error})") from None
    except Exception as error:  # zipfile.BadZipFile and zlib.error share no root but this one
        raise TableError(f"a damaged NPZ file ({error})") from None
    needed = ("header", "layer", "kind", "group", "macs", "dtype", "weight_shape", "sensitivity")
    for name in needed:
        if name not in arrays:
            raise TableError(f"no array {name!r} in the NPZ file")
    header = json.loads(str(arrays.pop("header")))
    if header.pop("mpsearch_table", None) != _VERSION:
        raise TableError(f"not version {_VERSION} of the table format")
    header = _json_header(json.dumps(header), "header")
    facts = [arrays[name].tolist() for name in ("layer", "kind", "weight_shape", "macs", "group", "dtype")]
    layers = tuple(
        Layer(name, kind, tuple(map(int, shape.split("x"))) if shape else (), macs, group, dtype)
        for name, kind, shape, macs, group, dtype in zip(*facts, strict=True)
    )

    def named(prefix: str) -> dict[str, Array]:
        return {name[len(prefix) :]: values for name, values in arrays.items() if name.startswith(prefix)}

    pairs = cast("dict[str, Any]", named("interactions:"))
    fixed = named("peak_fixed:")
    return CostTable(
        layers,
        tuple(Precision.parse(text) for text in header["precisions"]),
        arrays["sensitivity"],
        arrays.get("sensitivity_se"),
        named("usage:"),
        header["fixed_usage"],
        header["reference_usage"],
        header["unit"],
        header["origin"],
        Interactions(**pairs) if pairs else None,
        {name: Peak(values, fixed[name]) for name, values in named("peak:").items()},
    )
