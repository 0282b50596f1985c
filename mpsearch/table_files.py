"""Cost tables as files: long CSV, and NPZ for tables of a million layers."""

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np

from mpsearch.errors import PlanError, TableError, nearest
from mpsearch.layer import Layer
from mpsearch.precision import Precision
from mpsearch.table import Array, CostTable, Interactions, Peak, unique

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


def _header(table: CostTable, *, arrays_apart: bool) -> dict[str, Any]:
    header: dict[str, Any] = {
        "unit": table.unit,
        "origin": table.origin,
        "fixed_usage": table.fixed_usage,
        "reference_usage": table.reference_usage,
        "precisions": [str(precision) for precision in table.precisions],
    }
    if arrays_apart:
        return header
    shapes = {layer.name: layer.weight_shape for layer in table.layers if len(layer.weight_shape) > 1}
    dtypes = {layer.name: layer.dtype for layer in table.layers if layer.dtype != "float32"}
    header |= {name: value for name, value in (("weight_shapes", shapes), ("dtypes", dtypes)) if value}
    if table.interactions is not None:
        cells = zip(table.interactions.first, table.interactions.second, table.interactions.value, strict=True)
        header["interactions"] = [
            [
                table.layers[a].name,
                str(table.precisions[p]),
                table.layers[b].name,
                str(table.precisions[q]),
                float(value),
            ]
            for (a, p), (b, q), value in cells
        ]
    if table.peaks:
        header["peaks"] = {
            name: {
                "usage": np.where(table.allowed, peak.usage, 0.0).tolist(),
                "fixed": peak.fixed.tolist(),
            }
            for name, peak in table.peaks.items()
        }
    return header


def columns_and_rows(table: CostTable) -> tuple[list[str], Iterable[list[Any]]]:
    """Columns of the long form, and one row for each layer and allowed precision."""
    sizes = any(layer.numel for layer in table.layers)
    optional = {
        "sensitivity_se": table.sensitivity_se is not None,
        "kind": any(layer.kind for layer in table.layers),
        "group": any(layer.group for layer in table.layers),
        "numel": sizes,
        "macs": sizes or any(layer.macs for layer in table.layers),
    }
    columns = [
        "layer",
        "precision",
        "sensitivity",
        *(name for name, there in optional.items() if there),
        *table.usage,
    ]

    def rows() -> Iterable[list[Any]]:
        names = [str(precision) for precision in table.precisions]
        allowed = table.allowed
        for row, layer in enumerate(table.layers):
            facts = {"kind": layer.kind, "group": layer.group, "numel": layer.numel, "macs": layer.macs}
            fixed = [facts[name] for name in facts if optional[name]]
            for column in np.flatnonzero(allowed[row]):
                cell: list[Any] = [layer.name, names[column], float(table.sensitivity[row, column])]
                if table.sensitivity_se is not None:
                    cell.append(float(table.sensitivity_se[row, column]))
                yield cell + fixed + [_plain(values[row, column]) for values in table.usage.values()]

    return columns, rows()


def to_csv(table: CostTable) -> str:
    """The table as long CSV; every number survives to the last bit."""
    text = io.StringIO()
    text.write(f"{_FIRST_LINE}\n# {json.dumps(_header(table, arrays_apart=False))}\n")
    columns, rows = columns_and_rows(table)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue()


def to_npz(table: CostTable) -> bytes:
    """The table as NPZ; equal tables give equal bytes."""
    arrays: dict[str, Any] = {
        "header": np.array(json.dumps({"mpsearch_table": _VERSION, **_header(table, arrays_apart=True)})),
        "layer": np.array([layer.name for layer in table.layers]),
        "kind": np.array([layer.kind for layer in table.layers]),
        "group": np.array([layer.group for layer in table.layers]),
        "macs": np.array([layer.macs for layer in table.layers], np.int64),
        "dtype": np.array([layer.dtype for layer in table.layers]),
        "weight_shape": np.array(["x".join(map(str, layer.weight_shape)) for layer in table.layers]),
        "sensitivity": table.sensitivity,
    }
    if table.sensitivity_se is not None:
        arrays["sensitivity_se"] = np.where(table.allowed, table.sensitivity_se, np.nan)
    arrays |= {f"usage:{name}": np.where(table.allowed, v, np.nan) for name, v in table.usage.items()}
    if table.interactions is not None:
        arrays |= {f"interactions:{name}": getattr(table.interactions, name) for name in ("first", "second", "value")}
    for name, peak in table.peaks.items():
        arrays[f"peak:{name}"] = np.where(table.allowed, peak.usage, 0.0)
        arrays[f"peak_fixed:{name}"] = peak.fixed
    data = io.BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    return data.getvalue()


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


def from_csv(data: bytes) -> CostTable:
    """Read long CSV, with or without the two comment lines.

    Raises:
        TableError: with the line.
    """
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
    unique("column", columns)
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


def from_npz(data: bytes) -> CostTable:
    """Read NPZ.

    Raises:
        TableError: for a damaged file, or another version.
    """
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
