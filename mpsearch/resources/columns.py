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
from mpsearch.resources.resource import DeclaredResource, Resource, example_for

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
    >>> coins = lambda model, layers, precisions: [[1.0, math.nan]]
    >>> resources = measure_resources(nn.Identity(), [Layer("fc")], precisions("w4 w8"), {"coins": coins}, None)
    >>> resources["coins"].usage, refused_cells(resources)
    (array([[ 1., nan]]), array([[False,  True]]))
    """
    resources = {}
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
        resources[name] = result
    blocked = refused_cells(resources).all(axis=1) if resources else np.zeros(len(layers), bool)
    if blocked.any():
        row = int(np.argmax(blocked))
        names = [name for name, resource in resources.items() if np.isnan(resource.usage).any()]
        raise TableError(
            f"no precision of layer {layers[row].name!r} is allowed by {', '.join(names)}: each of "
            f"{', '.join(map(str, precisions))} is nan; add one that is allowed, such as w16, or exclude the layer"
        )
    return resources


def named_functions(
    resources: Sequence[str] | Mapping[str, ResourceFunction],
    known: Mapping[str, type[DeclaredResource]],
    quantizer: Any,
) -> dict[str, ResourceFunction]:
    """Resource functions by column.

    Args:
        resources: names of columns, or functions by column.
        known: the registry.
        quantizer: for those that declare to take it.

    Raises:
        TableError: for a name that is not known.
    """
    check_kind(resources, Mapping | list | tuple, "names of resources, or functions by name", TableError)
    if isinstance(resources, Mapping):
        for name, function in resources.items():
            check_kind(function, callable, f"a function of (model, layers, precisions) for resource {name}", TableError)
        return dict(resources)
    usual = usual_resources(known)
    for name in resources:
        check_kind(name, str, "names of resources as text", TableError)
        if name not in usual:
            raise TableError(f"unknown resource {name!r}{nearest(name, usual)}")
    return {name: _made_with(usual[name], quantizer) for name in resources}


def usual_resources(known: Mapping[str, type[DeclaredResource]]) -> dict[str, type[DeclaredResource]]:
    """Column -> the resource that fills it where nothing but the column is named.

    >>> from mpsearch.resources import RESOURCES
    >>> usual_resources(RESOURCES)["latency_s"].__name__
    'MeasuredLatency'
    """
    columns = {name: resource.capabilities.column for name, resource in known.items()}  # type: ignore[attr-defined]
    return {column: known[name] for name, column in columns.items() if column}


def _made_with(resource: type[DeclaredResource], quantizer: Any) -> ResourceFunction:
    takes: bool = resource.capabilities.quantizer  # type: ignore[attr-defined]
    return resource(quantizer=quantizer) if takes else resource()  # type: ignore[call-arg]


def refused_cells(resources: Mapping[str, Resource]) -> NDArray[np.bool_]:
    """(L, P) True where a resource is nan: the option is not allowed."""
    refused = [np.isnan(r.usage).any(axis=0) if r.is_peak else np.isnan(r.usage) for r in resources.values()]
    return np.logical_or.reduce(refused) if refused else np.zeros((1, 1), bool)


def counted(resources: Mapping[str, Resource]) -> dict[str, str]:
    """How resources are counted, in words, where they say."""
    return {name: resource.counted for name, resource in resources.items() if resource.counted}


def table_fields(resources: Mapping[str, Resource]) -> dict[str, Any]:
    """`usage`, `fixed_usage`, `reference_usage` and `peaks` of a `CostTable`."""
    sums = {name: resource for name, resource in resources.items() if not resource.is_peak}
    peaks = {name: resource for name, resource in resources.items() if resource.is_peak}
    return {
        "usage": {name: resource.usage for name, resource in sums.items()},
        "fixed_usage": {name: resource.fixed for name, resource in sums.items()},
        "reference_usage": {
            name: resource.reference for name, resource in resources.items() if math.isfinite(resource.reference)
        },
        "peaks": {name: Peak(resource.usage, np.asarray(resource.fixed)) for name, resource in peaks.items()},
    }
