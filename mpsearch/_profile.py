"""The door from a model and data to a cost table."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from mpsearch._layers import layers as find_layers
from mpsearch.errors import EstimatorError, TableError, nearest
from mpsearch.estimator import Estimate, Estimator, Loss, Setting, Unit
from mpsearch.layer import Layer
from mpsearch.model import Batch, call, collect, data_fingerprint, preserved, state_fingerprint
from mpsearch.perturb import Quantizer, input_ranges
from mpsearch.precision import Precision
from mpsearch.quantize import RoundToNearest
from mpsearch.resources import RESOURCES, Resource
from mpsearch.table import CostTable

#: A resource of one's own: `function(model, layers, precisions)` returns (L, P) numbers, or a `Resource`.
ResourceFunction = Callable[[nn.Module, Sequence[Layer], Sequence[Precision]], Any]


@overload
def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    estimator: Estimator,
    precisions: Sequence[Precision],
    *,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    quantizer: Quantizer | None = None,
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    progress: bool = True,
) -> CostTable: ...


@overload
def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    estimator: Sequence[Estimator],
    precisions: Sequence[Precision],
    *,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    quantizer: Quantizer | None = None,
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    progress: bool = True,
) -> list[CostTable]: ...


def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    estimator: Estimator | Sequence[Estimator],
    precisions: Sequence[Precision],
    *,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    quantizer: Quantizer | None = None,
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    progress: bool = True,
) -> CostTable | list[CostTable]:
    """Fill a cost table: the damage and the costs of every precision of every layer.

    Args:
        model: any module; it comes back bit for bit as it went in, also after an exception.
        batches: calibration data, read once: `(inputs, targets)`, tensors, or dicts of keywords.
        estimator: scores the cells; a sequence of them gives a list of tables.
        precisions: the options, `mps.precisions("w2 w4 w8")`.
        loss: `loss(model, batch) -> scalar` for estimators that differentiate; `kl` (the default: divergence from the
            unquantized model, needs no labels) or `cross-entropy`.
        layers: the decisions; by default all that `mps.layers` finds.
        exclude: names or patterns of layers to leave alone, for the default `layers`.
        groups: as for `mps.layers`.
        quantizer: `quantizer(weight, precision)`, the one that will ship; by default `RoundToNearest()`.
        resources: names of resources, or own functions by name.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        One table an estimator, with `origin` telling estimator, settings, passes, seconds and fingerprints.

    Raises:
        EstimatorError: for unusable data, a model whose output is random, or a score that is not finite.
        TableError: for a model without quantizable layers, or a layer or resource that does not exist.
    """
    data = collect(batches)
    several = isinstance(estimator, Sequence)
    estimators: Sequence[Estimator] = estimator if isinstance(estimator, Sequence) else [estimator]
    if not estimators:
        raise EstimatorError("no estimator given")
    options = _checked_precisions(precisions)
    quantize: Quantizer = RoundToNearest() if quantizer is None else quantizer
    before = state_fingerprint(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with preserved(model):
        decisions = list(find_layers(model, data[0], exclude=exclude, groups=groups) if layers is None else layers)
        _check_layers(model, decisions)
        units = _units(decisions)
        usage = _resources(model, decisions, options, resources, quantize)
        _probe_determinism(model, data[0])
        ranges: dict[str, tuple[float, float]] = {}
        if any(option.quantizes_activation for option in options):
            ranges = input_ranges(model, data, [layer.name for layer in decisions])
        tables = []
        for one in estimators:
            setting = Setting(
                model,
                data,
                units,
                options,
                quantize,
                ranges,
                "kl" if loss is None else loss,
                _Progress(progress),
            )
            with preserved(model):
                start = time.perf_counter()
                estimate = one.estimate(setting)
                seconds = time.perf_counter() - start
            origin = {
                "estimator": repr(one),
                "quantizer": repr(quantize),
                "loss": setting.loss if isinstance(setting.loss, str) else getattr(loss, "__name__", repr(loss)),
                "batches": len(data),
                "passes": {"forward": setting.passes.forward, "backward": setting.passes.backward},
                "seconds": round(seconds, 3),
                "model_fingerprint": before,
                "data_fingerprint": data_fingerprint(data),
                **estimate.facts,
            }
            tables.append(_table(one, estimate, units, decisions, options, usage, origin))
    if state_fingerprint(model) != before:
        raise EstimatorError(f"{estimators!r} changed the model's parameters or buffers")
    for name, module in model.named_modules():
        if set(vars(module)) != attributes[name]:
            extra = sorted(set(vars(module)) ^ attributes[name])
            raise EstimatorError(f"{estimators!r} changed the attributes {', '.join(extra)} of module {name!r}")
    return tables if several else tables[0]


class _Progress:
    """`progress(iterable, total, label)`: tqdm on stderr, off where that is no terminal."""

    def __init__(self, on: bool) -> None:
        self._disable = None if on else True  # None: tqdm looks at the terminal

    def __call__(self, iterable: Any, total: int, label: str) -> Any:
        return tqdm(iterable, total=total, desc=label, disable=self._disable, leave=False)


def _checked_precisions(options: Sequence[Precision]) -> tuple[Precision, ...]:
    found = tuple(options)
    for place, option in enumerate(found):
        if not isinstance(option, Precision):
            raise TableError(f"precision {option!r} is a {type(option).__name__}; write mps.precisions('w2 w4 w8')")
        if option in found[:place]:
            raise TableError(f"precision {option} occurs twice")
    if not found:
        raise TableError("no precisions given; write mps.precisions('w2 w4 w8')")
    return found


def _check_layers(model: nn.Module, decisions: Sequence[Layer]) -> None:
    modules = dict(model.named_modules())
    seen: set[str] = set()
    for layer in decisions:
        if layer.name not in modules:
            raise TableError(f"the model has no layer {layer.name!r}{nearest(layer.name, modules)}")
        if layer.name in seen:
            raise TableError(f"layer {layer.name!r} occurs twice")
        if not isinstance(getattr(modules[layer.name], "weight", None), nn.Parameter):
            raise TableError(f"layer {layer.name!r} is a {type(modules[layer.name]).__name__} without a weight")
        seen.add(layer.name)
    if not decisions:
        raise TableError("no layers to decide on")


def _units(decisions: Sequence[Layer]) -> list[Unit]:
    members: dict[tuple[bool, str], list[Layer]] = {}
    for layer in decisions:
        members.setdefault((bool(layer.group), layer.group or layer.name), []).append(layer)
    return [Unit(name, tuple(found)) for (_, name), found in members.items()]


def _resources(
    model: nn.Module,
    decisions: Sequence[Layer],
    options: Sequence[Precision],
    resources: Sequence[str] | Mapping[str, ResourceFunction],
    quantize: Quantizer,
) -> dict[str, Resource]:
    functions: dict[str, ResourceFunction] = {}
    if isinstance(resources, Mapping):
        functions.update(resources)
    else:
        for name in resources:
            if name not in RESOURCES:
                raise TableError(f"unknown resource {name!r}{nearest(name, RESOURCES)}")
            functions[name] = RESOURCES[name](quantize)
    found = {}
    for name, function in functions.items():
        result = function(model, decisions, options)
        if not isinstance(result, Resource):
            result = Resource(np.asarray(result, np.float64), 0.0, math.nan)
        if result.usage.shape != (len(decisions), len(options)):
            raise TableError(
                f"resource {name} has shape {result.usage.shape}, expected {(len(decisions), len(options))}"
            )
        found[name] = result
    return found


def _probe_determinism(model: nn.Module, batch: Batch) -> None:
    """Two passes must agree: catches dropout that evaluation mode does not turn off, and other randomness."""
    with torch.no_grad():
        first, second = call(model, batch), call(model, batch)
    if not torch.isfinite(first).all():
        raise EstimatorError("the output of the unquantized model on the first batch is not finite")
    if not torch.allclose(first, second, rtol=1e-4, atol=1e-5):
        change = float((first - second).abs().max())
        raise EstimatorError(
            f"two passes over the same batch differ by up to {change:.3g}: the model is random in evaluation mode "
            "(functional dropout without training=self.training?)"
        )


def _table(
    one: Estimator,
    estimate: Estimate,
    units: Sequence[Unit],
    decisions: Sequence[Layer],
    options: tuple[Precision, ...],
    usage: Mapping[str, Resource],
    origin: Mapping[str, Any],
) -> CostTable:
    shape = (len(units), len(options))
    for name, values in (("sensitivity", estimate.sensitivity), ("sensitivity_se", estimate.sensitivity_se)):
        if values is not None and np.shape(values) != shape:
            raise EstimatorError(f"{one!r} returned {name} of shape {np.shape(values)}, expected {shape}")
    if np.isinf(estimate.sensitivity).any():
        u, p = np.argwhere(np.isinf(estimate.sensitivity))[0]
        raise EstimatorError(
            f"sensitivity of layer {units[u].name!r} at {options[p]} is {estimate.sensitivity[u, p]}, "
            f"expected a finite number ({one!r})"
        )
    unit_of = {layer.name: u for u, unit in enumerate(units) for layer in unit.layers}
    rows = np.array([unit_of[layer.name] for layer in decisions])
    share = np.array([1.0 / len(units[u].layers) for u in rows])[:, None]  # the sum over a group is its score
    se = estimate.sensitivity_se
    return CostTable(
        tuple(decisions),
        options,
        estimate.sensitivity[rows] * share,
        None if se is None else se[rows] * share,
        {name: resource.usage for name, resource in usage.items()},
        {name: resource.fixed for name, resource in usage.items()},
        {name: resource.reference for name, resource in usage.items() if math.isfinite(resource.reference)},
        estimate.unit,
        origin,
    )
