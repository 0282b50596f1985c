"""Relative quantization error, and scores of whole layers turned into cells with it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.weight_changes import squared_change, squared_length
from mpsearch.models.modules.weights import layer_of
from mpsearch.models.running import call, samples
from mpsearch.models.streaming.offloading import resident
from mpsearch.quantizers.fake_quantization import input_quantizer, inputs

Floats = NDArray[np.float64]


def unit_scores(context: Context, scores: Mapping[nn.Parameter, float]) -> Floats:
    """(D,) score of each decision: the sum over its distinct weights."""
    return np.array(
        [sum(scores[p] for p in context.parameters(decision)) for decision in context.decisions], np.float64
    )


def cells_from_scores(
    context: Context, score: Floats, se: Floats | None = None, facts: Mapping[str, Any] | None = None
) -> Estimate:
    """Give scores without a bit axis one: sensitivity(u, p) = score(u) x `relative_error`(u, p), unit `relative`.

    Args:
        context: decisions, precisions, quantizer and data.
        score: (D,) one score a decision; larger = worse to quantize.
        se: (D,) standard errors, or None.
        facts: for the table's origin.
    """
    error = relative_error(context)
    noise = None if se is None else np.abs(se[:, None] * error)
    return Estimate(score[:, None] * error, noise, "relative", dict(facts or {}))


def relative_error(context: Context) -> Floats:
    """Squared quantization error over squared size, of the weights plus, where a precision quantizes them, of the inputs.

        error(u, p) = sum ||Q(W) - W||^2 / sum ||W||^2  +  sum ||Q(a) - a||^2 / sum ||a||^2

    over the distinct weights of a decision, and over the inputs of its layers on the calibration data: to first order the
    relative squared error of its output for errors without preferred direction. Quantized inputs cost one forward
    pass.

    Returns:
        (D, P); 0 for what is not quantized or lies on its grid, inf for a tensor of zeros that does not stay one.
    """
    error = np.zeros((len(context.decisions), len(context.precisions)))
    for u, decision in enumerate(context.decisions):
        power, noise = 0.0, np.zeros(len(context.precisions))
        for parameter, layer in context.parameters(decision).items():
            with resident(context.module(layer)):
                power += squared_length(parameter)
                for p, precision in enumerate(context.precisions):
                    if precision.quantizes_weight:
                        noise[p] += squared_change(context, layer, precision)
        error[u] = [_ratio(float(changed), power) for changed in noise]
    if context.quantizes_inputs:
        noise_of = input_noise(context)
        for u, decision in enumerate(context.decisions):
            power = sum(noise_of[layer.name].power for layer in decision.layers)
            noises = sum((noise_of[layer.name].noise for layer in decision.layers), np.zeros(len(context.precisions)))
            error[u] += [_ratio(noise, power) for noise in noises]
    return error


@dataclass(eq=False)
class InputNoise:
    """Means over samples of squared sizes of a layer's input.

    Attributes:
        noise: (P,) mean of ||Q(a) - a||^2.
        power: mean of ||a||^2.
        numel: mean number of elements.
    """

    noise: Floats
    power: float = 0.0
    numel: float = 0.0


def input_noise(context: Context) -> dict[str, InputNoise]:
    """Noise that each precision puts on the input of each layer; one forward pass, results by layer name."""
    total = sum(samples(batch) for batch in context.batches)
    layers = [layer.name for decision in context.decisions for layer in decision.layers]
    noise_of = {name: InputNoise(np.zeros(len(context.precisions))) for name in layers}

    def measure(name: str) -> Callable[[Tensor], Tensor]:
        module = layer_of(context.model, name)
        functions = [input_quantizer(module, name, p, context.quantizer, context.ranges) for p in context.precisions]

        def see(x: Tensor) -> Tensor:
            noise_of[name].power += squared_length(x) / total
            noise_of[name].numel += x.numel() / total
            for p, function in enumerate(functions):
                if function is not None:
                    noise_of[name].noise[p] += squared_length(function(x) - x) / total
            return x

        return see

    with torch.no_grad(), inputs({layer_of(context.model, name): measure(name) for name in noise_of}):
        numbers: Iterable[tuple[int | None, int]] = (
            ((None, number) for number in range(len(context.batches)))
            if context.blocks is None
            else context.blocks.runs(context.batches, [])
        )
        for _, number in numbers:
            call(context.model, context.batches[number])
            context.passes.add(len(context.batches), forward=1)
    return noise_of


def _ratio(noise: float, power: float) -> float:
    return 0.0 if noise == 0 else float(np.divide(noise, power)) if power else float("inf")
