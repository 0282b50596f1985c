"""Damage of errors without preferred direction: a trace of curvature times the noise power."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.backward_pass import Gradients
from mpsearch.estimation.relative_error import input_noise
from mpsearch.estimation.weight_changes import squared_change


@dataclass(eq=False)
class TraceTimesNoise:
    """What a sample adds to 1/2 tr(F_W) / n ||D||^2 + 1/2 tr(F_a) / n_a E||d||^2, with traces of squared gradients.

    Args:
        context: of the run; inputs that are quantized cost one forward pass.
    """

    context: Context

    def __post_init__(self) -> None:
        context = self.context
        weights = {p: None for decision in context.decisions for p in context.parameters(decision)}
        column = {parameter: i for i, parameter in enumerate(weights)}
        self.weights: list[
            tuple[int, int, list[float]]
        ] = []  # decision, column of squared_norm, factor of each precision
        self.inputs: list[tuple[int, int, list[float]]] = []
        for u, decision in enumerate(context.decisions):
            for parameter, layer in context.parameters(decision).items():
                factors = [
                    0.5 * squared_change(context, layer, p) / parameter.numel() if p.quantizes_weight else 0.0
                    for p in context.precisions
                ]
                self.weights.append((u, column[parameter], factors))
        if context.quantizes_inputs:
            noises = input_noise(context)
            row = 0
            for u, decision in enumerate(context.decisions):
                for layer in decision.layers:
                    noise = noises[layer.name]
                    self.inputs.append((u, row, (0.5 * noise.noise / max(noise.numel, 1.0)).tolist()))
                    row += 1

    def __call__(self, gradients: Gradients) -> Tensor:
        """(N, D, P), summed over the predictions of each sample."""
        out = torch.zeros_like(gradients.projection)
        for norms, terms in ((gradients.squared_norm, self.weights), (gradients.input_squared_norm, self.inputs)):
            for u, column, factors in terms:
                out[:, u] += norms[:, column, None] * out.new_tensor(factors)
        return out
