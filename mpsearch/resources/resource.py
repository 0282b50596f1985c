"""What a resource function returns."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def example_for(function: Callable[..., Any], example: Any) -> dict[str, Any]:
    """The first batch as a keyword, for a resource function that has a parameter `example`.

    Raises:
        TypeError: for what cannot be called, ValueError for what does not tell its parameters.

    >>> example_for(lambda model, layers, precisions, example: None, [1]), example_for(lambda model: None, [1])
    ({'example': [1]}, {})
    """
    return {"example": example} if "example" in inspect.signature(function).parameters else {}
