"""From resource functions to the columns of a table."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.core.settings import check_kind
from mpsearch.core.table import Peak
from mpsearch.errors import TableError, nearest
from mpsearch.resources.resource import Resource, example_for

#: A resource of one's own: `function(model, layers, precisions)` returns (L, P) numbers, or a `Resource`; one that has a
#: parameter `example` is given the first batch by that keyword.
ResourceFunction = Callable[..., Any]


def measure_resources(
    model: nn.Module,
    layers: Sequence[Layer],
    precisions: Sequence[Precision],
    functions: Mapping[str, ResourceFunction],
    example: Any,
) -> dict[str, Resource]:
    """Call the functions and check what they return.

    Raises:
        TableError: for a wrong shape, an infinite number, or a layer without an option that a resource allows.

    >>> from mpsearch import precisions
    >>> one = lambda model, layers, precisions: [[1.0, math.nan]]
    >>> found = measure_resources(nn.Identity(), [Layer("fc")], precisions("w4 w8"), {"coins": one}, None)
    >>> found["coins"].usage, refused_cells(found)
    (array([[ 1., nan]]), array([[False,  True]]))
    """
    found = {}
    shape = (len(layers), len(precisions))
    for name, function in functions.items():
        try:
            keywords = example_for(function, example)
            inspect.signature(function).bind(model, layers, precisions, **keywords)
        except TypeError as error:
            raise TableError(f"resource {name}: {error}; expected a function of (model, layers, precisions)") from None
        result = function(model, layers, precisions, **keywords)
        if not isinstance(result, Resource):
            try:
                result = Resource(np.asarray(result, np.float64), 0.0, math.nan)
            except (TypeError, ValueError) as error:
                raise TableError(f"resource {name} returned no numbers of shape {shape}: {error}") from None
        if result.usage.shape[-2:] != shape or result.usage.ndim not in (2, 3):
            raise TableError(f"resource {name} has shape {result.usage.shape}, expected {shape} or (steps, *{shape})")
        if np.isinf(result.usage).any():
            row, column = np.argwhere(np.isinf(result.usage))[0][-2:]
            raise TableError(
                f"{name} of layer {layers[row].name!r} at {precisions[column]} is infinite, expected a number, or nan = "
                "not allowed"
            )
        found[name] = result
    blocked = refused_cells(found).all(axis=1) if found else np.zeros(len(layers), bool)
    if blocked.any():
        row = int(np.argmax(blocked))
        names = [name for name, one in found.items() if np.isnan(one.usage).any()]
        raise TableError(
            f"no precision of layer {layers[row].name!r} is allowed by {', '.join(names)}: each of "
            f"{', '.join(map(str, precisions))} is nan; add one that is allowed, such as w16, or exclude the layer"
        )
    return found


def named_functions(
    resources: Sequence[str] | Mapping[str, ResourceFunction],
    known: Mapping[str, Callable[[Any], ResourceFunction]],
    quantizer: Any,
) -> dict[str, ResourceFunction]:
    """Resource functions by name.

    Raises:
        TableError: for a name that is not known.
    """
    check_kind(resources, Mapping | list | tuple, "names of resources, or functions by name", TableError)
    if isinstance(resources, Mapping):
        for name, function in resources.items():
            check_kind(function, callable, f"a function of (model, layers, precisions) for resource {name}", TableError)
        return dict(resources)
    for name in resources:
        check_kind(name, str, "names of resources as text", TableError)
        if name not in known:
            raise TableError(f"unknown resource {name!r}{nearest(name, known)}")
    return {name: known[name](quantizer) for name in resources}


def refused_cells(found: Mapping[str, Resource]) -> NDArray[np.bool_]:
    """(L, P) True where a resource is nan: the option is not allowed."""
    refused = [np.isnan(one.usage).any(axis=0) if one.is_peak else np.isnan(one.usage) for one in found.values()]
    return np.logical_or.reduce(refused) if refused else np.zeros((1, 1), bool)


def counted(found: Mapping[str, Resource]) -> dict[str, str]:
    """How resources are counted, in words, where they say."""
    return {name: one.counted for name, one in found.items() if one.counted}


def table_fields(found: Mapping[str, Resource]) -> dict[str, Any]:
    """`usage`, `fixed_usage`, `reference_usage` and `peaks` of a `CostTable`."""
    sums = {name: one for name, one in found.items() if not one.is_peak}
    return {
        "usage": {name: one.usage for name, one in sums.items()},
        "fixed_usage": {name: one.fixed for name, one in sums.items()},
        "reference_usage": {name: one.reference for name, one in found.items() if math.isfinite(one.reference)},
        "peaks": {name: Peak(one.usage, np.asarray(one.fixed)) for name, one in found.items() if one.is_peak},
    }
