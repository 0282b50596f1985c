"""Damage of errors without preferred direction: a trace of curvature times the noise power."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.estimator import Setting
from mpsearch.measure import wide
from mpsearch.relative import input_noise
from mpsearch.sweep import Gradients


@dataclass(eq=False)
class IsotropicDamage:
    """What a sample adds to 1/2 tr(F_W) / n ||D||^2 + 1/2 tr(F_a) / n_a E||d||^2, with traces of squared gradients.

    Args:
        setting: of the run; inputs that are quantized cost one forward pass.
    """

    setting: Setting

    def __post_init__(self) -> None:
        setting = self.setting
        weights = {p: None for unit in setting.units for p in setting.parameters(unit)}
        column = {parameter: i for i, parameter in enumerate(weights)}
        self.weights: list[tuple[int, int, list[float]]] = []  # unit, column of squared_norm, factor of each precision
        self.inputs: list[tuple[int, int, list[float]]] = []
        for u, unit in enumerate(setting.units):
            for parameter, layer in setting.parameters(unit).items():
                factors = [
                    0.5 * float(wide(setting.perturbation(layer, p)).square().sum()) / parameter.numel()
                    if p.quantizes_weight
                    else 0.0
                    for p in setting.precisions
                ]
                self.weights.append((u, column[parameter], factors))
        if setting.quantizes_inputs:
            noises = input_noise(setting)
            row = 0
            for u, unit in enumerate(setting.units):
                for layer in unit.layers:
                    noise = noises[layer.name]
                    self.inputs.append((u, row, (0.5 * noise.noise / max(noise.numel, 1.0)).tolist()))
                    row += 1

    def __call__(self, found: Gradients) -> Tensor:
        """(N, U, P), summed over the predictions of each sample."""
        out = torch.zeros_like(found.projection)
        for norms, terms in ((found.squared_norm, self.weights), (found.input_squared_norm, self.inputs)):
            for u, column, factors in terms:
                out[:, u] += norms[:, column, None] * out.new_tensor(factors)
        return out
