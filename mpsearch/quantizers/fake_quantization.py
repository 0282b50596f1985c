"""Quantized weights and inputs put into a model, and taken out again."""

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.core.precision import Precision
from mpsearch.core.settings import check_kind
from mpsearch.errors import EstimatorError
from mpsearch.models.modules.kv_cache import KVCache
from mpsearch.models.modules.weights import canonical, channel_axis, holds_weight, layer_of, restore, weight_of
from mpsearch.models.running import Batch, call
from mpsearch.models.streaming.offloading import replaced, resident
from mpsearch.quantizers.packing import Codes
from mpsearch.quantizers.quantizer import Quantizer

#: Least and greatest input of each layer over the calibration data.
Ranges = Mapping[str, tuple[float, float]]


def quantized_weight(module: nn.Module, name: str, precision: Precision, quantizer: Quantizer) -> Tensor:
    """The weight of a module after quantization, laid out as the module stores it.

    Raises:
        EstimatorError: where the quantizer changes shape, dtype or device, or returns what is not finite.
    """
    if not precision.quantizes_weight:
        return weight_of(module).detach()
    return restore(module, rounded_weight(module, name, precision, quantizer)[0])


def rounded_weight(
    module: nn.Module, name: str, precision: Precision, quantizer: Quantizer
) -> tuple[Tensor, Codes | None]:
    """The weight of a module after quantization, output channels first, and its codes where the quantizer tells them.

    Raises:
        EstimatorError: where the quantizer changes shape, dtype or device, or returns what is not finite.
    """
    with torch.no_grad(), resident(module):
        weight = canonical(module).detach()
        try:
            of_layer = quantizer.of_layer(name)
            codes = of_layer.encoded(weight, precision)
            values = of_layer(weight, precision) if codes is None else codes.values()
        except EstimatorError as error:
            raise EstimatorError(f"layer {name!r} at {precision}: {error}") from None
        check_kind(values, Tensor, f"a tensor from the quantizer for layer {name!r} at {precision}", EstimatorError)
        if values.shape != weight.shape or values.dtype != weight.dtype or values.device != weight.device:
            raise EstimatorError(
                f"the quantizer returned {tuple(values.shape)} {values.dtype} on {values.device} for layer {name!r} at "
                f"{precision}, expected {tuple(weight.shape)} {weight.dtype} on {weight.device}"
            )
        if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():  # no copy of a large layer
            raise EstimatorError(
                f"the quantizer returned a weight that is not finite for layer {name!r} at {precision}"
            )
        return values, codes


@contextlib.contextmanager
def weights_for_calls(
    makers: Mapping[nn.Parameter, Callable[[], Tensor]], readers: Mapping[nn.Parameter, Sequence[nn.Module]]
) -> Iterator[None]:
    """Put tensors in the place of parameters while a module that reads them is called, each made for the call and let go behind it.

    Args:
        makers: parameter -> what makes its value.
        readers: parameter -> the modules whose calls alone read it.
    """
    originals: dict[nn.Parameter, Tensor] = {}
    handles = []

    def around(parameter: nn.Parameter, make: Callable[[], Tensor], module: nn.Module) -> None:
        def put(*_: Any) -> None:
            value = make()
            originals[parameter] = parameter.data
            parameter.data = value

        def take(*_: Any) -> None:
            if parameter in originals:
                parameter.data = originals.pop(parameter)

        handles.append(module.register_forward_pre_hook(put))
        handles.append(module.register_forward_hook(take, always_call=True))

    try:
        for parameter, make in makers.items():
            for module in readers[parameter]:
                around(parameter, make, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, original in originals.items():
            parameter.data = original


@contextlib.contextmanager
def inputs(functions: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Pass the input of modules through functions: the first floating-point tensor that `forward` is given.

    Arguments count in the order of the signature, whether passed by position or by keyword. Without such a tensor (an
    embedding's token numbers) the module is left alone.
    """
    handles = []

    def hook(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda module, args, keywords: with_input(module, args, keywords, function)

    try:
        for module, function in functions.items():
            handles.append(module.register_forward_pre_hook(hook(function), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_input(
    module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], function: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the module's input passed through a function."""
    for place, value in enumerate(args):
        if _is_input(value):
            return (*args[:place], function(value), *args[place + 1 :]), keywords
    order = [*inspect.signature(module.forward).parameters, *keywords] if len(keywords) > 1 else [*keywords]
    for name in order:
        if _is_input(keywords.get(name)):
            return args, {**keywords, name: function(keywords[name])}
    return args, keywords


def _is_input(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def input_quantizer(
    module: nn.Module, name: str, precision: Precision, quantizer: Quantizer, ranges: Ranges
) -> Callable[[Tensor], Tensor] | None:
    """The function that fake-quantizes the input of a layer; None where it is left alone.

    Args:
        module: blocks, and tokens, lie along the channels of its input.
        name: of the layer.
        precision: its precision; a cache takes the weight format.
        quantizer: of inputs.
        ranges: calibrated ranges by layer.
    """
    if isinstance(module, KVCache):
        return _cache_quantizer(name, precision, quantizer)
    if not precision.quantizes_activation:
        return None
    axis = channel_axis(module)
    inner = quantizer.of_layer(name)
    low, high = ranges.get(name, (math.nan, math.nan))

    def quantize(x: Tensor) -> Tensor:
        try:
            values = inner.activation_values(x.movedim(axis, -1), precision.activation, low, high)
        except EstimatorError as error:
            raise EstimatorError(f"input of layer {name!r} at {precision}: {error}") from None
        return values.movedim(-1, axis)

    return quantize


def _cache_quantizer(name: str, precision: Precision, quantizer: Quantizer) -> Callable[[Tensor], Tensor] | None:
    """Keys and values: each head of each token as a row of a weight, by its largest value, as is done while a model runs."""
    if not precision.quantizes_weight:
        return None
    on_the_spot = dataclasses.replace(quantizer.rounding, scale="max", granularity="channel")

    def quantize(x: Tensor) -> Tensor:
        try:
            return on_the_spot(x.detach().flatten(0, -2), precision).reshape(x.shape)
        except EstimatorError as error:
            raise EstimatorError(f"{name!r} at {precision}: {error}") from None

    return quantize


def quantized_weights(
    model: nn.Module, precisions: Mapping[str, Precision], quantizer: Quantizer
) -> dict[nn.Parameter, Tensor]:
    """Quantized values of the weights of layers, tied ones once."""
    values: dict[nn.Parameter, Tensor] = {}
    for name, precision in precisions.items():
        module = layer_of(model, name)
        if holds_weight(module) and precision.quantizes_weight and weight_of(module) not in values:
            values[weight_of(module)] = quantized_weight(module, name, precision, quantizer)
    return values


def input_quantizers(
    model: nn.Module, precisions: Mapping[str, Precision], quantizer: Quantizer, ranges: Ranges
) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Functions that fake-quantize the inputs of layers, where they are quantized."""
    functions = {}
    for name, precision in precisions.items():
        module = layer_of(model, name)
        function = input_quantizer(module, name, precision, quantizer, ranges)
        if function is not None:
            functions[module] = function
    return functions


@contextlib.contextmanager
def quantized(
    model: nn.Module, precisions: Mapping[str, Precision], quantizer: Quantizer, ranges: Ranges
) -> Iterator[bool]:
    """The model with some layers at given precisions, weights and inputs.

    Args:
        model: the model.
        precisions: layer name -> precision; tied layers share a parameter and must agree.
        quantizer: of the weights.
        ranges: of the inputs, where these are quantized.

    Yields:
        False where nothing changes: no input is quantized and every weight lies on its grid already.
    """
    values = quantized_weights(model, precisions, quantizer)
    functions = input_quantizers(model, precisions, quantizer, ranges)
    changed = bool(functions) or any(not torch.equal(value, parameter.data) for parameter, value in values.items())
    with replaced(values), inputs(functions):
        yield changed


def input_ranges(model: nn.Module, batches: Sequence[Batch], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Least and greatest input of layers over batches, from one forward pass.

    Raises:
        EstimatorError: where an input is not finite.
    """
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            if not x.numel():
                return x
            low, high = (float(v) for v in torch.aminmax(x.detach()))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise EstimatorError(
                    f"the input of layer {name!r} ranges from {low} to {high}, expected finite numbers"
                )
            before = ranges.get(name, (low, high))
            ranges[name] = (min(low, before[0]), max(high, before[1]))
            return x

        return see

    with torch.no_grad(), inputs({layer_of(model, name): watch(name) for name in names}):
        for batch in batches:
            call(model, batch)
    return ranges
