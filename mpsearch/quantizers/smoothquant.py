"""SmoothQuant: large inputs are scaled down, and their weights up."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers.channel_scaling import rounded_under_scale
from mpsearch.quantizers.input_statistics import InputStatistics, LayerByLayer
from mpsearch.quantizers.quantizer import Around, Quantizer
from mpsearch.quantizers.rounding import RoundToNearest


@dataclass(frozen=True)
class SmoothQuant(LayerByLayer):
    """Move the difficulty from inputs to weights, per input channel (SmoothQuant, 2211.10438, equation 4).

        w' = Q(w s) / s,   x' = Q(x / s) s,   s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

    Attributes:
        statistics: of `input_statistics(model, batches)`; by default taken from the calibration data of the run.
        alpha: 0 makes the weights alike, 1 the inputs.
        quantizer: rounds both.

    Inputs 16 times as large in the second channel, weights alike: s = (1, 4) shares the factor.

    >>> statistics = InputStatistics(torch.eye(2)[None], *torch.tensor([[0.0, 0], [1, 16], [1, 1], [1, 1]]))
    >>> quantizer = SmoothQuant({"fc": statistics}, quantizer=RoundToNearest(scale="max")).of_layer("fc")
    >>> quantizer(torch.tensor([[1.0, 0.8]]), Precision("3"))      # round (1, 3.2) to multiples of 3.2 / 3
    tensor([[1.0667, 0.8000]])
    """

    statistics: Mapping[str, InputStatistics | None] | None = field(default=None, repr=False)
    alpha: float = 0.5
    quantizer: RoundToNearest = field(default=RoundToNearest())

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise EstimatorError(f"alpha={self.alpha}: expected a number from 0 to 1")

    def for_inputs(self, statistics: InputStatistics) -> Quantizer:
        """Rounds w s and x / s."""
        inputs_size = torch.maximum(-statistics.low, statistics.high)
        scale = inputs_size**self.alpha / statistics.weight_size ** (1 - self.alpha)
        usable = (inputs_size > 0) & (statistics.weight_size > 0)
        scale = torch.where(usable, scale, torch.ones_like(scale))
        return _Smoothed(statistics, scale, self.quantizer)


class _Smoothed(Around):
    """SmoothQuant in one layer."""

    def __init__(self, statistics: InputStatistics, scale: Tensor, quantizer: RoundToNearest) -> None:
        super().__init__(quantizer)
        self.statistics, self.scale = statistics, scale

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        return rounded_under_scale(weight, self.scale, len(self.statistics.gram), precision, self.quantizer)

    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor:
        """Rounds x / s; its range follows from the ranges of the channels."""
        scale = self.scale.to(x.device)
        least, most = float((self.statistics.low / self.scale).min()), float((self.statistics.high / self.scale).max())
        values: Tensor = self.quantizer.activation_values(x / scale, name, least, most)
        return (values * scale).to(x.dtype)
