"""The one place that looks up pictures and HTML, which lie above all else and load when something is first shown.

What is shown hands itself over, so that nothing here or below needs to know its type; `mpsearch.display` holds its modules against these
protocols.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Fragments(Protocol):
    """`mpsearch.display.fragments`: what Jupyter shows, as HTML."""

    def cost_table(self, shown: Any, /) -> str:
        """Of a `CostTable`."""

    def plan(self, shown: Any, /) -> str:
        """Of a `Plan`."""

    def solution(self, shown: Any, /) -> str:
        """Of a `Solution`."""

    def front(self, shown: Any, /) -> str:
        """Of a `Front`."""

    def evaluation(self, shown: Any, /) -> str:
        """Of an `Evaluation`."""

    def measured_plans(self, shown: Any, /) -> str:
        """Of `MeasuredPlans`."""

    def measured_front(self, shown: Any, /) -> str:
        """Of a `MeasuredFront`."""

    def search_result(self, shown: Any, /) -> str:
        """Of a `SearchResult`."""


class Figures(Protocol):
    """`mpsearch.display.figures`: pictures by matplotlib."""

    def written(self, figure: "Figure", path: str | os.PathLike[str] | None, /) -> "Figure":
        """The figure, saved where there is a path."""

    def sensitivity_figure(self, table: Any, /, *, title: str = "") -> "Figure":
        """Damage of every layer at every precision."""

    def plan_figure(self, plan: Any, layers: Any = (), /, *, title: str = "") -> "Figure":
        """Bits over the depth."""

    def front_figure(
        self, front: Any, /, *, mark: Any = None, measured: Sequence[Any] = (), title: str = ""
    ) -> "Figure":
        """Damage over a resource."""

    def measured_front_figure(self, front: Any, /, *, plans: Any = None, mark: Any = None, title: str = "") -> "Figure":
        """Measured damage over a resource."""

    def usage_figure(self, table: Any, plan: Any, /, *, title: str = "") -> "Figure":
        """What the layers use of a resource."""

    def agreement_figure(self, tables: Mapping[str, Any], measured: Any, /, *, title: str = "") -> "Figure":
        """Rank correlation of tables with each other and with measured plans."""

    def prediction_figure(self, table: Any, measured: Any, /, *, title: str = "") -> "Figure":
        """Measured damage over what a table says."""


class Page(Protocol):
    """`mpsearch.display.page`: the report of a search."""

    def write(self, result: Any, path: str | os.PathLike[str], /) -> None:
        """Write one HTML page."""


def html() -> Fragments:
    """What Jupyter shows."""
    return cast(Fragments, importlib.import_module("mpsearch.display.fragments"))


def figures() -> Figures:
    """The pictures."""
    return cast(Figures, importlib.import_module("mpsearch.display.figures"))


def page() -> Page:
    """The report of a search."""
    return cast(Page, importlib.import_module("mpsearch.display.page"))
