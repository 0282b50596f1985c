"""A plan: a precision for every layer, and the JSON file that carries it to another tool."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, TypedDict

from mpsearch.core import shown
from mpsearch.core.precision import Precision
from mpsearch.errors import MpsearchError, PlanError, nearest, warn
from mpsearch.files.file_set import hash_of
from mpsearch.files.schema import OPEN, read_json
from mpsearch.files.writing import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpsearch.core.layer import Layer

#: A limit as it is written: an upper one, or (lower, upper) of which one may be None.
Written = float | str | tuple[float | str | None, float | str | None]

_VERSION = 2  # 1 has no hash of the layers


class Predicted(TypedDict, total=False):
    """What a table said of a plan; other tools may say more."""

    sensitivity: float | None
    unit: str
    status: str
    minimized: str
    bound: float | None
    gap: float | None


class _File(TypedDict):
    mpsearch_plan: int
    layers: dict[str, str]
    layers_hash: NotRequired[str]
    budget: NotRequired[dict[str, float | str | tuple[float | str | None, float | str | None] | None]]
    predicted: NotRequired[Annotated[Predicted, OPEN]]
    usage: NotRequired[dict[str, float | None]]
    origin: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Plan(Mapping[str, Precision]):
    """Layer name -> precision.

    Attributes:
        layers: the mapping itself.
        budget: the limits that it was made for; a pair is (lower, upper).
        predicted: what the table said of it: sensitivity, unit, bound, gap, status.
        usage: its use of every resource of the table, fixed part included.
        origin: where it comes from: table, solver, settings.

    >>> plan = Plan({"fc": Precision("4")})
    >>> str(plan["fc"]), len(plan)
    ('w4', 1)
    """

    layers: Mapping[str, Precision]
    budget: Mapping[str, Written] = field(default_factory=dict)
    predicted: Mapping[str, Any] = field(default_factory=dict)
    usage: Mapping[str, float] = field(default_factory=dict)
    origin: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, layer: str) -> Precision:
        try:
            return self.layers[layer]
        except KeyError:
            raise KeyError(f"no layer {layer!r} in the plan{nearest(layer, self.layers)}") from None

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    __hash__ = None  # type: ignore[assignment]

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, layers: "Sequence[Layer]" = (), title: str = ""
    ) -> "Figure":
        """Draw bits over the depth, as in `mpsearch.display.figures.plan_figure`; what it uses of a budget is in `usage_figure`.

        Args:
            path: .png, .svg or .pdf; without it the figure is only returned.
            layers: of the table or the model (`table.layers`, `mps.layers(...)`): their parameters and MACs are drawn too.
            title: above the picture.
        """
        figures = shown.figures()
        return figures.written(figures.plan_figure(self, layers, title=title), path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        write_atomically(path, self.to_json())

    def to_json(self) -> str:
        """Content of a plan file."""
        content = {
            "mpsearch_plan": _VERSION,
            "layers": {name: str(precision) for name, precision in self.layers.items()},
            "layers_hash": self._hash(),
            "budget": dict(self.budget),
            "predicted": dict(self.predicted),
            "usage": dict(self.usage),
            "origin": dict(self.origin),
        }
        return json.dumps(content, indent=1) + "\n"

    def _hash(self) -> str:
        """Of the decisions, by which `load` sees that they are those that were written."""
        return hash_of(json.dumps(sorted((name, str(precision)) for name, precision in self.layers.items())).encode())

    def _repr_html_(self) -> str:
        return shown.html().plan(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan.

        Warns:
            UserWarning: where the layers were changed after the plan was written: what was predicted of it, and its use, are left out.

        Raises:
            PlanError: with the place in the file.
            OSError: where the file cannot be read.
        """
        data = Path(path).read_bytes()
        try:
            plan, stored = cls._parsed(data)
        except MpsearchError as error:
            raise PlanError(f"{path}: {error}") from None
        if stored == plan._hash() or not (plan.predicted or plan.usage):
            return plan
        warn(
            f"{path}: the layers were changed after the plan was written; what was predicted of it and its use of resources do not belong "
            "to it and are left out"
        )
        return dataclasses.replace(plan, predicted={}, usage={}, origin={**plan.origin, "edited": True})

    @classmethod
    def _parsed(cls, data: bytes) -> "tuple[Plan, str | None]":
        """The plan, and the hash of its layers."""
        file = read_json(data, _File, version="mpsearch_plan", known=(1, _VERSION))
        if not file["layers"]:
            raise PlanError("no layers at $.layers")
        layers = {}
        for name, text in file["layers"].items():
            try:
                layers[name] = Precision.parse(text)
            except PlanError as error:
                raise PlanError(f"{error} at $.layers[{name!r}]") from None
        usage = {name: math.nan if value is None else value for name, value in file.get("usage", {}).items()}
        budget: Any = file.get("budget", {})
        plan = cls(layers, budget, file.get("predicted", {}), usage, file.get("origin", {}))
        return plan, plan._hash() if file["mpsearch_plan"] == 1 else file.get("layers_hash")
