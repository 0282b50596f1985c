"""Plans with the damage measured for each: what predictions are held against."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from mpsearch.core import printing, shown
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.core.table import CostTable
from mpsearch.core.tables.fields import UNITS, Array, numbers
from mpsearch.errors import FileError, PlanError, TableError, nearest
from mpsearch.files.schema import checked, parse_json
from mpsearch.files.writing import comment_lines, csv_rows, csv_text, write_atomically

_VERSION = 1
_MARK = "# mpsearch_plans:"
_NUMBERS = ("damage", "damage_se")
#: Plans that are printed.
_PRINTED = 20


class _Header(TypedDict, total=False):
    unit: str
    origin: dict[str, Any]


@dataclass(frozen=True, eq=False)
class MeasuredPlans:
    """N plans over the same layers, each with the damage that it was measured to do on common data.

    The file is CSV: a first line `# mpsearch_plans: 1`, then `# ` and one JSON object (unit, origin), then the header
    `damage[,damage_se],<one column a layer>` and one row a plan, with the precision in the layer's column. A CSV without
    the two comment lines, made by hand or by another tool, loads too; its unit is `relative`.

    Attributes:
        plans: N plans.
        damage: (N,) measured damage.
        damage_se: (N,) standard errors, nan where unknown, or None.
        unit: `nats` (rise of the mean divergence or loss), the unit of another metric, or `relative` (anything else that is larger for
            worse plans).
        origin: where the numbers come from; JSON values.

    Raises:
        PlanError: where the plans name different layers, or shapes or numbers do not fit.

    >>> measured = MeasuredPlans((Plan({"fc": Precision("4")}), Plan({"fc": Precision("8")})), [0.5, 0.1])
    >>> len(measured), measured.layers
    (2, ('fc',))
    """

    plans: tuple[Plan, ...]
    damage: Array
    damage_se: Array | None = None
    unit: str = "relative"
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plans", tuple(self.plans))
        object.__setattr__(self, "origin", dict(self.origin))
        for name in _NUMBERS:
            if getattr(self, name) is not None:
                try:
                    values = numbers(getattr(self, name), name)
                except TableError as error:
                    raise PlanError(error) from None
                values.flags.writeable = False
                object.__setattr__(self, name, values)
        self._check()

    def __str__(self) -> str:
        """A line for each of the first plans: how many layers have which precision, and the damage."""
        errors = [None] * len(self.plans) if self.damage_se is None else self.damage_se.tolist()
        rows = []
        for number, (plan, damage, se) in enumerate(zip(self.plans, self.damage.tolist(), errors, strict=True)):
            if number == _PRINTED:
                break
            counts = Counter(map(str, plan.values())).most_common()
            rows.append([str(number), ", ".join(f"{n} {name}" for name, n in counts), printing.damage(damage, se)])
        text = printing.table(["plan", "layers", f"damage [{self.unit}]"], rows)
        return text if len(self.plans) <= _PRINTED else f"{text}\n... ({len(self.plans)} plans)"

    def _check(self) -> None:
        if self.damage is None:
            raise PlanError("no damage of the measured plans, expected one number a plan")
        if not self.plans:
            raise PlanError("no measured plans, expected at least one")
        if self.unit not in UNITS:
            raise PlanError(f"unit {self.unit!r}, expected one of {', '.join(UNITS)}")
        for name in _NUMBERS:
            values = getattr(self, name)
            if values is not None and values.shape != (len(self.plans),):
                raise PlanError(f"{name} has shape {values.shape}, expected ({len(self.plans)},), one number a plan")
        if not np.isfinite(self.damage).all():
            number = int(np.argmin(np.isfinite(self.damage)))
            raise PlanError(f"damage of plan {number} is {self.damage[number]}, expected a finite number")
        if self.damage_se is not None and ((self.damage_se < 0) | np.isinf(self.damage_se)).any():
            number = int(np.argmax((self.damage_se < 0) | np.isinf(self.damage_se)))
            raise PlanError(
                f"damage_se of plan {number} is {self.damage_se[number]}, expected 0 or more, or nan = unknown"
            )
        first = set(self.plans[0])
        for number, plan in enumerate(self.plans):
            if not plan or set(plan) != first:
                odd = sorted(set(plan) ^ first)
                raise PlanError(
                    f"plan {number} and plan 0 name different layers: {', '.join(map(repr, odd[:5])) or 'none'}"
                )

    def __len__(self) -> int:
        return len(self.plans)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the first plan."""
        return tuple(self.plans[0])

    def options(self, table: CostTable) -> NDArray[np.int64]:
        """(N, L) column of a table for each layer of each plan.

        Raises:
            PlanError: where plans and table name different layers, or a plan holds an option that the table does not allow.
        """
        known = [layer.name for layer in table.layers]
        for name in self.layers:
            if name not in known:
                raise PlanError(f"the plans name {name!r}, which is no layer of the table{nearest(name, known)}")
        for name in known:
            if name not in self.layers:
                raise PlanError(f"the plans say nothing of layer {name!r} of the table")
        column = {precision: p for p, precision in enumerate(table.precisions)}
        columns = np.empty((len(self.plans), len(known)), np.int64)
        for number, plan in enumerate(self.plans):
            for row, name in enumerate(known):
                at = column.get(plan[name], -1)
                if at < 0 or not table.allowed[row, at]:
                    options = " ".join(str(table.precisions[p]) for p in np.flatnonzero(table.allowed[row]))
                    raise PlanError(f"plan {number} has {name!r} at {plan[name]}, the table allows {options}")
                columns[number, row] = at
        return columns

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plans as CSV, atomically; every number survives to the last bit."""
        write_atomically(path, self.to_csv())

    def to_csv(self) -> str:
        """Content of a file of measured plans."""
        numbers = {name: getattr(self, name) for name in _NUMBERS if getattr(self, name) is not None}
        if self.layers[0] == "damage_se":  # a layer: what is in front of the layers ends at this column
            numbers.setdefault("damage_se", np.full(len(self), np.nan))
        rows = (
            [*(float(values[number]) for values in numbers.values()), *(str(plan[name]) for name in self.layers)]
            for number, plan in enumerate(self.plans)
        )
        header = json.dumps({"unit": self.unit, "origin": self.origin})
        return f"{_MARK} {_VERSION}\n# {header}\n{csv_text([[*numbers, *self.layers], *rows])}"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MeasuredPlans":
        """Read measured plans.

        Raises:
            PlanError: with the line.
            OSError: where the file cannot be read.
        """
        data = Path(path).read_bytes()
        try:
            return _parsed(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise PlanError(f"{path}: byte {error.start} is not UTF-8 text, so this is no CSV") from None
        except (FileError, PlanError) as error:
            raise PlanError(f"{path}: {error}") from None

    def _repr_html_(self) -> str:
        return shown.html().measured_plans(self)

    __hash__ = None  # type: ignore[assignment]


def holds_plans(path: str | os.PathLike[str]) -> bool:
    """True for a file of measured plans, by its first line; False for a cost table.

    Raises:
        OSError: where the file cannot be read.
    """
    with open(path, "rb") as file:
        line = file.readline(1 << 20).decode("utf-8-sig", "replace")
    return line.startswith(_MARK) or "damage" in (name.strip() for name in line.split(","))


def _parsed(text: str) -> MeasuredPlans:
    header: _Header = {}
    comments, text = comment_lines(text)
    if comments:
        if comments[0].strip() != f"{_MARK} {_VERSION}":
            raise PlanError(f"line 1: {comments[0]!r}, this mpsearch reads '{_MARK} {_VERSION}'")
        header = _header(comments[1])
    rows = csv_rows(text, 1 + len(comments))
    if not rows:
        raise PlanError("no header line, expected one such as damage,damage_se,conv1,conv2,fc")
    line, columns = rows[0]
    if comments:  # numbers are in front, whatever layers are called
        places = {name: i for i, name in enumerate(_NUMBERS) if columns[i : i + 1] == [name]}
    else:
        columns = [name.strip() for name in columns]
        places = {name: columns.index(name) for name in _NUMBERS if name in columns}
    if "damage" not in places:
        raise PlanError(f"line {line}: no column 'damage' among {', '.join(columns)}")
    layers = {i: name for i, name in enumerate(columns) if i not in places.values()}
    names = set() if comments else set(places)
    for name in layers.values():
        if name in names:
            raise PlanError(f"line {line}: column {name!r} occurs twice")
        names.add(name)
    plans: list[Plan] = []
    numbers: dict[str, list[float]] = {name: [] for name in places}
    for line, row in rows[1:]:
        if len(row) != len(columns):
            raise PlanError(f"line {line}: {len(row)} fields, expected {len(columns)} ({', '.join(columns)})")
        for name, i in places.items():
            numbers[name].append(_number(row[i], name, line))
        plans.append(Plan({name: _precision(row[i], name, line) for i, name in layers.items()}))
    return MeasuredPlans(
        tuple(plans),
        np.array(numbers["damage"]),
        np.array(numbers["damage_se"]) if "damage_se" in numbers else None,
        header.get("unit", "relative"),
        header.get("origin", {}),
    )


def _header(line: str) -> _Header:
    if not line.startswith("#"):
        raise PlanError(f"line 2: expected '# ' and one JSON object, got {line[:60]!r}")
    try:
        return checked(parse_json(line.removeprefix("#")), _Header)
    except FileError as error:
        raise PlanError(f"line 2: expected '# ' and one JSON object ({error})") from None


def _number(text: str, name: str, line: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise PlanError(f"line {line}: {name} is {text!r}, expected a number") from None


def _precision(text: str, name: str, line: int) -> Precision:
    try:
        return Precision.parse(text)
    except PlanError as error:
        raise PlanError(f"line {line}, layer {name!r}: {error}") from None
