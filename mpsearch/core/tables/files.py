"""Cost tables as files: long CSV, and NPZ for tables of a million layers."""

import io
import itertools
import json
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, cast

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.core.tables.fields import Array, Interactions, Peak, TableFields, numbers, unique
from mpsearch.errors import FileError, PlanError, TableError, nearest
from mpsearch.files.schema import checked, parse_json, read_json
from mpsearch.files.writing import comment_lines, csv_rows, csv_text

_VERSION = 1
_FIRST_LINE = f"# mpsearch_table: {_VERSION}"
_KNOWN_COLUMNS = ("layer", "precision", "sensitivity", "sensitivity_se", "kind", "group", "numel", "macs")
#: Kinds of numpy types that each array of an NPZ file may have.
_KINDS = {
    "header": "U", "layer": "U", "kind": "U", "group": "U", "macs": "iu", "dtype": "U", "weight_shape": "U", "sensitivity": "fiu",
}  # fmt: skip
_PAIRS = ("first", "second", "value")
#: An NPZ file takes at most so many times its size in memory; zeros compress a thousandfold.
_LARGEST = 1000


class _Peak(TypedDict):
    usage: list[list[list[float]]]
    fixed: list[float]


class _Header(TypedDict, total=False):
    """The JSON object of both forms; the last four only in CSV."""

    unit: str
    origin: dict[str, Any]
    fixed_usage: dict[str, float]
    reference_usage: dict[str, float]
    precisions: list[str]
    weight_shapes: dict[str, list[int]]
    dtypes: dict[str, str]
    interactions: list[tuple[str, str, str, str, float]]
    peaks: dict[str, _Peak]


class _ArraysHeader(TypedDict):
    mpsearch_table: int
    unit: str
    origin: dict[str, Any]
    fixed_usage: dict[str, float]
    reference_usage: dict[str, float]
    precisions: list[str]


def _header(table: TableFields, *, arrays_apart: bool) -> dict[str, Any]:
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


def columns_and_rows(table: TableFields) -> tuple[list[str], Iterable[list[Any]]]:
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


def to_csv(table: TableFields) -> str:
    """The table as long CSV; every number survives to the last bit, and every name.

    Raises:
        TableError: for a resource that has the name of another column.
    """
    columns, rows = columns_and_rows(table)
    for name in table.usage:
        if name in _KNOWN_COLUMNS:
            raise TableError(
                f"the resource {name!r} has the name of a column of the CSV; give it another name, or write .npz"
            )
    header = json.dumps(_header(table, arrays_apart=False))
    return f"{_FIRST_LINE}\n# {header}\n{csv_text(itertools.chain([columns], rows))}"


def to_npz(table: TableFields) -> bytes:
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
        arrays |= {f"interactions:{name}": getattr(table.interactions, name) for name in _PAIRS}
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


def from_csv(data: bytes) -> TableFields:
    """Read long CSV, with or without the two comment lines.

    Raises:
        TableError: with the line.
    """
    try:
        comments, text = comment_lines(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TableError(f"byte {error.start} is not UTF-8 text, so this is no CSV") from None
    header: _Header = {}
    if comments:
        if not comments[0].startswith("# mpsearch_table:"):
            raise TableError(f"line 1: {comments[0]!r}, expected {_FIRST_LINE!r}")
        if comments[0].strip() != _FIRST_LINE:
            raise TableError(f"line 1: {comments[0]!r}: this mpsearch reads version {_VERSION} of the table format")
        if not comments[1].startswith("#"):
            raise TableError("line 2: expected '# ' and one JSON object")
        try:
            header = checked(parse_json(comments[1][1:]), _Header)
        except FileError as error:
            raise TableError(f"line 2: {error}") from None
    try:
        rows = csv_rows(text, 1 + len(comments))
    except FileError as error:
        raise TableError(str(error)) from None
    if not rows:
        raise TableError("no header line, expected one such as layer,precision,sensitivity,memory_bytes")
    line, columns = rows[0]
    if not comments:  # made by hand or another tool
        columns = [name.strip() for name in columns]
    for needed in ("layer", "precision", "sensitivity"):
        if needed not in columns:
            raise TableError(f"line {line}: no column {needed!r} among {', '.join(columns)}")
    unique("column", columns)
    return _assemble(header, columns, rows[1:])


def _assemble(header: _Header, columns: list[str], rows: list[tuple[int, list[str]]]) -> TableFields:
    place = {name: index for index, name in enumerate(columns)}
    resources = [name for name in columns if name not in _KNOWN_COLUMNS]
    measures = [name for name in ("sensitivity", "sensitivity_se", *resources) if name in place]
    layers: dict[str, int] = {}
    facts: list[dict[str, str]] = []
    about: list[str] = [name for name in ("kind", "group", "numel", "macs") if name in place]
    options: dict[Precision, int] = {Precision.parse(text): i for i, text in enumerate(header.get("precisions", []))}
    cells: dict[tuple[int, int], list[float]] = {}
    for line, row in rows:
        where = f"line {line}"
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
        cells[cell] = [_number(row[place[name]], name, where, layer, precision) for name in measures]
    if not cells:
        raise TableError("no rows: a table needs at least one layer")
    arrays = {name: np.full((len(layers), len(options)), np.nan) for name in measures}
    for (i, j), values in cells.items():
        for name, value in zip(measures, values, strict=True):
            arrays[name][i, j] = value
    return TableFields(
        _layers(header, layers, facts),
        tuple(options),
        arrays["sensitivity"],
        arrays.get("sensitivity_se"),
        {name: arrays[name] for name in resources},
        header.get("fixed_usage", {}),
        header.get("reference_usage", {}),
        header.get("unit", "relative"),
        header.get("origin", {}),
        _named_interactions(header.get("interactions"), layers, options),
        {
            name: Peak(numbers(peak["usage"], name), numbers(peak["fixed"], name))
            for name, peak in header.get("peaks", {}).items()
        },
    )


def _layers(header: _Header, names: Mapping[str, int], facts: list[dict[str, str]]) -> tuple[Layer, ...]:
    """The layers, from what their rows say and from shapes and dtypes of the header."""
    shapes, dtypes = header.get("weight_shapes", {}), header.get("dtypes", {})
    for key, named in (("weight_shapes", shapes), ("dtypes", dtypes)):
        for name in named:
            if name not in names:
                raise TableError(f"line 2: {key} names {name!r}, which is no layer of the table{nearest(name, names)}")
    layers = []
    for name, index in names.items():
        numel = _integer(facts[index].get("numel", ""), "numel", name)
        shape = tuple(shapes.get(name, (numel,) if numel else ()))
        if shape and numel and math.prod(shape) != numel:
            raise TableError(f"layer {name!r} has numel {numel} but the shape {shape}")
        macs = _integer(facts[index].get("macs", ""), "macs", name)
        fact = facts[index]
        layers.append(
            Layer(name, fact.get("kind", ""), shape, macs, fact.get("group", ""), dtypes.get(name, "float32"))
        )
    return tuple(layers)


def _named_interactions(
    rows: list[tuple[str, str, str, str, float]] | None, layers: Mapping[str, int], options: Mapping[Precision, int]
) -> Interactions | None:
    if rows is None:
        return None
    first, second, value = [], [], []
    for number, row in enumerate(rows):
        try:
            a, p, b, q, amount = row
            first.append((layers[a], options[Precision.parse(p)]))
            second.append((layers[b], options[Precision.parse(q)]))
            value.append(amount)
        except (KeyError, PlanError):
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
    if not value.is_integer() or not 0 <= value < 2**63:
        raise TableError(f"{name} of layer {layer!r} is {text!r}, expected a whole number from 0 to 2^63")
    return int(value)


def from_npz(data: bytes) -> TableFields:
    """Read NPZ.

    Raises:
        TableError: for a damaged file, or another version.
    """
    arrays = _arrays(data)
    for name, kinds in _KINDS.items():
        if name not in arrays:
            raise TableError(f"no array {name!r} in the NPZ file")
        if arrays[name].dtype.kind not in kinds or arrays[name].ndim > 2:
            raise TableError(f"the array {name!r} holds {arrays[name].dtype} {arrays[name].shape}")
    try:
        header = read_json(str(arrays.pop("header")), _ArraysHeader, version="mpsearch_table", known=(_VERSION,))
    except FileError as error:
        raise TableError(f"header: {error}") from None
    names = ("layer", "kind", "weight_shape", "macs", "group", "dtype")
    lengths = {name: arrays[name].shape for name in names}
    if len(set(lengths.values())) > 1 or arrays["layer"].ndim != 1:
        raise TableError(f"the arrays of layers have the shapes {lengths}, expected one number a layer")
    layers = tuple(
        Layer(name, kind, _shape(shape, name), macs, group, dtype)
        for name, kind, shape, macs, group, dtype in zip(*(arrays[name].tolist() for name in names), strict=True)
    )

    def named(prefix: str) -> dict[str, Array]:
        return {name[len(prefix) :]: values for name, values in arrays.items() if name.startswith(prefix)}

    pairs = cast("dict[str, Any]", named("interactions:"))
    if pairs and pairs.keys() != set(_PAIRS):
        raise TableError(f"interactions of the arrays {', '.join(pairs)}, expected {', '.join(_PAIRS)}")
    peaks, fixed = named("peak:"), named("peak_fixed:")
    if peaks.keys() != fixed.keys():
        raise TableError(f"peaks {', '.join(peaks) or 'none'} with the fixed parts of {', '.join(fixed) or 'none'}")
    return TableFields(
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
        {name: Peak(values, fixed[name]) for name, values in peaks.items()},
    )


def _arrays(data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays of an NPZ file, none made before the file is known to hold it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > _LARGEST * len(data):
                raise TableError(f"an NPZ file of {len(data)} bytes that takes more than {_LARGEST} times as many")
            unique("array", [member.filename for member in members])
            return {m.filename.removesuffix(".npy"): _array(archive.read(m), m.filename) for m in members}
    except TableError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        OSError,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise TableError(f"no table in NPZ form, or a damaged one ({error})") from None


def _array(data: bytes, name: str) -> NDArray[Any]:
    """One array, without pickled objects, as large as its header says."""
    file = io.BytesIO(data)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in read:
        raise TableError(f"{name}: version {version} of the NPY format, expected 1.0 or 2.0")
    shape, _, dtype = read[version](file)
    size = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or min(shape, default=0) < 0 or size != len(data) - file.tell():
        raise TableError(f"{name}: {len(data) - file.tell()} bytes for {dtype} of shape {shape}")
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _shape(text: str, layer: str) -> tuple[int, ...]:
    if text and not re.fullmatch(r"\d{1,15}(x\d{1,15})*", text, re.ASCII):
        raise TableError(f"weight_shape of layer {layer!r} is {text!r}, expected sides such as 64x3x3x3")
    return tuple(map(int, text.split("x"))) if text else ()
