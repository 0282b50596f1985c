"""What a table is about: the layers that are decided on, the options of each, and what these cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from mpsearch.core.layer import Layer
from mpsearch.core.layer_options import columns
from mpsearch.core.precision import Precision
from mpsearch.core.settings import check_kind, check_settings
from mpsearch.core.table import CostTable
from mpsearch.decisions.coverage import undecided
from mpsearch.decisions.mask import decidable, refused_options
from mpsearch.errors import TableError, nearest
from mpsearch.models.modules.weights import layer_of, named_layers, weight_of
from mpsearch.models.running import Batch, preserved
from mpsearch.quantizers.quantizer import Quantizer
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources import RESOURCES, Resource
from mpsearch.resources.columns import (
    ResourceFunction,
    counted,
    measure_resources,
    named_functions,
    refused_cells,
    table_fields,
)

#: Names of resources, or own functions by name.
Resources = Sequence[str] | Mapping[str, ResourceFunction]


def checked_precisions(options: Sequence[Precision]) -> tuple[Precision, ...]:
    """The options as a tuple.

    Raises:
        TableError: where there are none, one is no precision, or one is there twice.
    """
    check_kind(options, tuple | list, "precisions, mps.precisions('w2 w4 w8')", TableError)
    for place, option in enumerate(options):
        if not isinstance(option, Precision):
            raise TableError(f"precision {option!r} is a {type(option).__name__}; write mps.precisions('w2 w4 w8')")
        if option in options[:place]:
            raise TableError(f"precision {option} occurs twice")
    if not options:
        raise TableError("no precisions given; write mps.precisions('w2 w4 w8')")
    return tuple(options)


def check_layers(model: nn.Module, decided: Sequence[Layer]) -> None:
    """Hold the layers against the model.

    Raises:
        TableError: for a layer that the model does not have, one without a weight, one that is there twice, or none at all.
    """
    modules = dict(model.named_modules()) | named_layers(model)
    seen: set[str] = set()
    for layer in decided:
        check_kind(layer, Layer, "layers, of mps.layers(model, batch)", TableError)
        if layer.name not in modules:
            raise TableError(f"the model has no layer {layer.name!r}{nearest(layer.name, modules)}")
        if layer.name in seen:
            raise TableError(f"layer {layer.name!r} occurs twice")
        if not isinstance(getattr(modules[layer.name], "weight", None), nn.Parameter):
            raise TableError(f"layer {layer.name!r} is a {type(modules[layer.name]).__name__} without a weight")
        seen.add(layer.name)
    if not decided:
        raise TableError("no layers to decide on")


def resource_columns(
    model: nn.Module,
    decided: Sequence[Layer],
    options: Sequence[Precision],
    resources: Resources,
    quantizer: Quantizer,
    example: Batch,
) -> dict[str, Resource]:
    """What each option of each decision uses, by resource."""
    functions = named_functions(resources, RESOURCES, quantizer)
    for function in functions.values():
        check_settings(function, TableError)
    return measure_resources(model, decided, options, functions, example)


def left_undecided(
    model: nn.Module, decided: Sequence[Layer], exclude: Sequence[str], without: Mapping[str, str]
) -> dict[str, Any]:
    """What no decision touches, for the origin of a table; `without` has the layers that no option fits, with the reasons."""
    weights = [weight_of(layer_of(model, layer.name)) for layer in decided if not layer.is_cache]
    return undecided(model, weights, exclude) | ({"without_option": dict(without)} if without else {})


def unscored_table(
    decided: Sequence[Layer],
    options: tuple[Precision, ...],
    usage: Mapping[str, Resource],
    undecided: Mapping[str, Any],
    unit: str = "relative",
) -> CostTable:
    """A table that knows costs alone: its sensitivity is 0 where an option is allowed."""
    refused = refused_cells(usage) | refused_options(decided, options)
    origin = {"undecided": dict(undecided), "counted": counted(usage)}
    sensitivity = np.where(refused, np.nan, 0.0)
    return CostTable(tuple(decided), options, sensitivity, unit=unit, origin=origin, **table_fields(usage))


def unscored(
    model: nn.Module,
    example: Batch,
    precisions: Sequence[Precision],
    decided: Sequence[Layer],
    resources: Resources = ("memory_bytes", "bitops"),
    exclude: Sequence[str] = (),
) -> CostTable:
    """What every option costs, before any calibration: a table whose sensitivity is 0 where an option is allowed."""
    decided, options = columns(decided, checked_precisions(precisions))
    with preserved(model, example):
        check_layers(model, decided)
        decided, without = decidable(decided, options)
        usage = resource_columns(model, decided, options, resources, RoundToNearest(), example)
        facts = left_undecided(model, decided, exclude, without)
    return unscored_table(decided, options, usage, facts, "nats")


def with_costs(
    table: CostTable,
    model: nn.Module,
    example: Batch,
    decided: Sequence[Layer],
    resources: Resources = ("memory_bytes", "bitops"),
) -> CostTable:
    """A table from elsewhere with what its options cost in a model: damage by the table, all else counted.

    Args:
        table: its layers are decisions of the model; those that it does not have are left alone.
        model: it needs no weights.
        example: one batch.
        decided: the decisions of the model, `mps.layers(model, example)`.
        resources: names, or own functions by name.

    Raises:
        TableError: for a layer that is no decision of the model, or one that shares its precision with a layer that the table does not
            have.

    >>> from mpsearch import layers, precisions
    >>> import torch
    >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.ones(1, 4)
    >>> table = CostTable((Layer("0"),), tuple(precisions("w4 w8")), [[0.5, 0.1]])
    >>> costs = with_costs(table, model, x, layers(model, x), ["memory_bytes"])
    >>> costs.sensitivity.tolist(), costs.usage["memory_bytes"].tolist(), costs.fixed_usage
    ([[0.5, 0.1]], [[48.0, 64.0]], {'memory_bytes': 104.0})
    """
    row_of = {layer.name: row for row, layer in enumerate(table.layers)}
    known = {layer.name: layer for layer in decided}
    for name in row_of:
        if name not in known:
            raise TableError(f"{name!r} of the table is no decision of the model{nearest(name, known)}")
    absent = {layer.group: layer.name for layer in decided if layer.group and layer.name not in row_of}
    for name in row_of:
        if other := absent.get(known[name].group):
            raise TableError(
                f"{name!r} of the table shares its precision with {other!r} ({known[name].group}): add its row"
            )
    own = [
        replace(layer, group=layer.group or table.layers[row_of[layer.name]].group)
        for layer in decided
        if layer.name in row_of
    ]
    costs = unscored(model, example, table.precisions, own, resources)
    if table.interactions is not None:
        raise TableError(
            "interactions of pairs of cells are of the table's own rows: drop them to take costs from a model"
        )
    rows = [row_of[layer.name] for layer in costs.layers]
    sensitivity = np.where(costs.allowed, table.sensitivity[rows], np.nan)
    return replace(
        costs,
        sensitivity=sensitivity,
        sensitivity_se=None if table.sensitivity_se is None else table.sensitivity_se[rows],
        unit=table.unit,
        origin={**costs.origin, **table.origin},
    )
