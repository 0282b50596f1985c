"""What a resource function returns, and what it declares of itself."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Resource:
    """Use of one resource: a sum over the layers, or the maximum over steps of such sums.

    Attributes:
        usage: (L, P) use by each cell, nan = option not allowed; (T, L, P) for a maximum over T steps.
        fixed: use that no decision touches; (T,) for a maximum.
        reference: use by the unquantized model; nan where it is not known.
        counted: how, in words, where that is no matter of course.
    """

    usage: Array
    fixed: float | Array
    reference: float
    counted: str = ""

    @property
    def is_peak(self) -> bool:
        """True for a maximum over steps."""
        return self.usage.ndim == 3

    def of(self, columns: Sequence[int]) -> float:
        """Use by a plan, fixed part included.

        Args:
            columns: (L,) the column of each layer.

        >>> Resource(np.array([[1.0, 2.0], [3.0, 4.0]]), 10.0, 16.0).of([0, 1])
        15.0
        """
        cells = self.usage[..., np.arange(len(columns)), np.asarray(columns)]
        return float(np.max(cells.sum(axis=-1) + self.fixed))


@dataclass(frozen=True)
class ResourceCapabilities:
    """What a resource counts and how, declared as its attribute `capabilities`; `mpsearch.testing.resource_checks` holds it to it.

    Attributes:
        unit: of its numbers, such as `bytes`.
        column: the column of a table that it fills where `resources=["memory_bytes"]` names one; empty: it needs a column's name.
        example: it takes the first batch as the keyword `example`.
        quantizer: its setting `quantizer` is the one that the table is made with.
        peak: a maximum over steps instead of a sum over the layers.
        monotone: more bits of weights and inputs never use less.
        measured: measured anew, so that numbers differ from call to call.
        on_meta: counts the same of a model without weights, on the device `meta`.
        reference: what the unquantized model uses: as the plan that leaves everything alone does (`plan`), and besides really stored
            bytes (`stored bytes`) or MACs x 16 x 16 (`bit operations`); `unknown`: may be nan.
    """

    unit: str = ""
    column: str = ""
    example: bool = False
    quantizer: bool = False
    peak: bool = False
    monotone: bool = False
    measured: bool = False
    on_meta: bool = False
    reference: Literal["plan", "stored bytes", "bit operations", "unknown"] = "unknown"


@runtime_checkable
class DeclaredResource(Protocol):
    """A resource function that says what it counts: frozen settings, called with (model, layers, precisions), and `example` if declared."""

    @property
    def capabilities(self) -> ResourceCapabilities:
        """What it counts and how."""
        ...

    def __call__(
        self, model: nn.Module, layers: Sequence[Layer], precisions: Sequence[Precision], *args: Any, **keywords: Any
    ) -> Resource:
        """Count; see `Resource`."""
        ...


def capabilities_of(function: Callable[..., Any]) -> ResourceCapabilities:
    """What a resource declares. The one place that adapts to plain functions: these take `example` where they have such a parameter.

    Raises:
        TypeError: for what cannot be called, ValueError for what does not tell its parameters.

    >>> capabilities_of(lambda model, layers, precisions, example: None).example
    True
    """
    if isinstance(function, DeclaredResource):
        return function.capabilities
    return ResourceCapabilities(example="example" in inspect.signature(function).parameters)


def example_for(function: Callable[..., Any], example: Any) -> dict[str, Any]:
    """The first batch as a keyword, for a resource function that takes it.

    Raises:
        TypeError: for what cannot be called, ValueError for what does not tell its parameters.

    >>> example_for(lambda model, layers, precisions, example: None, [1]), example_for(lambda model: None, [1])
    ({'example': [1]}, {})
    """
    return {"example": example} if capabilities_of(function).example else {}
