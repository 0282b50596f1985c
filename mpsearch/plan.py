"""A plan: a precision for every layer, and the JSON file that carries it to another tool."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import PlanError, nearest
from mpsearch.files import write_atomically
from mpsearch.precision import Precision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpsearch.layer import Layer

_VERSION = 1
_KEYS = ("mpsearch_plan", "layers", "budget", "predicted", "usage", "origin")


@dataclass(frozen=True)
class Plan(Mapping[str, Precision]):
    """Layer name -> precision.

    Attributes:
        layers: the mapping itself.
        budget: the limits that it was made for.
        predicted: what the table said of it: sensitivity, unit, bound, gap, status.
        usage: its use of every resource of the table, fixed part included.
        origin: where it comes from: table, solver, settings.

    >>> plan = Plan({"fc": Precision("4")})
    >>> str(plan["fc"]), len(plan)
    ('w4', 1)
    """

    layers: Mapping[str, Precision]
    budget: Mapping[str, float | str] = field(default_factory=dict)
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
        """Draw bits over the depth, as in `mpsearch.plot.plan_figure`; what it uses of a budget is in `usage_figure`.

        Args:
            path: .png, .svg or .pdf; without it the figure is only returned.
            layers: of the table or the model (`table.layers`, `mps.layers(...)`): their parameters and MACs are drawn too.
            title: above the picture.
        """
        from mpsearch import plot

        return plot.written(plot.plan_figure(self, layers, title=title), path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        content = {
            "mpsearch_plan": _VERSION,
            "layers": {name: str(precision) for name, precision in self.layers.items()},
            "budget": dict(self.budget),
            "predicted": dict(self.predicted),
            "usage": dict(self.usage),
            "origin": dict(self.origin),
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    def _repr_html_(self) -> str:
        from mpsearch.html import display

        return display.plan(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan.

        Raises:
            PlanError: with the place in the file.
            OSError: where the file cannot be read.
        """
        data = Path(path).read_bytes()
        try:
            return cls._from(json.loads(data, object_pairs_hook=_unique_keys))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: not JSON ({error})") from None
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    @classmethod
    def _from(cls, content: Any) -> "Plan":
        if not isinstance(content, dict) or "mpsearch_plan" not in content:
            raise PlanError("no mpsearch plan: the key 'mpsearch_plan' is missing")
        if content["mpsearch_plan"] != _VERSION:
            raise PlanError(f"version {content['mpsearch_plan']!r} of the plan format, this mpsearch reads {_VERSION}")
        for key in content:
            if key not in _KEYS:
                raise PlanError(f"unknown key {key!r} at $.{key}{nearest(key, _KEYS)}")
        for key in _KEYS[1:]:
            if not isinstance(content.get(key, {}), dict):
                raise PlanError(f"expected an object at $.{key}, got {type(content[key]).__name__}")
        if not content.get("layers"):
            raise PlanError("no layers at $.layers")
        layers = {}
        for name, text in content["layers"].items():
            if not isinstance(text, str):
                raise PlanError(f"expected text at $.layers[{name!r}], got {text!r}")
            try:
                layers[name] = Precision.parse(text)
            except PlanError as error:
                raise PlanError(f"{error} at $.layers[{name!r}]") from None
        rest = {key: content.get(key, {}) for key in _KEYS[2:]}
        return cls(layers, **rest)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise PlanError(f"the key {key!r} occurs twice")
        found[key] = value
    return found
