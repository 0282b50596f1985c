"""AWQ: the weights of large inputs are scaled up before they are rounded."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers.channel_scaling import rounded_under_scale
from mpsearch.quantizers.input_statistics import InputStatistics, LayerByLayer, WeightsBy
from mpsearch.quantizers.quantizer import Quantizer
from mpsearch.quantizers.rounding import RoundToNearest


@dataclass(frozen=True)
class ActivationAware(LayerByLayer):
    """Scale up the weights of large input channels before rounding (AWQ, 2306.00978, equations 4 and 5).

        w' = Q(w s) / s,   s_j = (mean|x_j|)^alpha,   alpha of least  E ||(w' - w) x||^2  among 0, 1/steps, ..., 1 - 1/steps

    s is divided by the root of its extremes' product. alpha = 0 is no scaling, so that the result is never worse on the calibration
    data. Inputs are left to `quantizer`.

    Attributes:
        statistics: of `input_statistics(model, batches)`; by default taken from the calibration data of the run.
        steps: values of alpha.
        quantizer: rounds the scaled weight.

    Inputs 16 times as large in the first channel; alpha is 0 or 1/2, so s is 1 and 1, or in proportion 4 to 1:

    >>> import torch
    >>> from mpsearch import Precision
    >>> from mpsearch.quantizers import InputStatistics, RoundToNearest
    >>> statistics = InputStatistics(torch.diag(torch.tensor([256.0, 1.0]))[None], *torch.tensor([[0.0, 0], [16, 1], [16, 1], [1, 1]]))
    >>> quantizer = ActivationAware({"fc": statistics}, steps=2, quantizer=RoundToNearest(scale="max")).of_layer("fc")
    >>> quantizer(torch.tensor([[0.4, 1.0]]), Precision("3"))     # round (1.6, 1) to multiples of 1.6 / 3
    tensor([[0.4000, 1.0667]])
    """

    statistics: Mapping[str, InputStatistics | None] | None = field(default=None, repr=False)
    steps: int = 20
    quantizer: RoundToNearest = field(default=RoundToNearest())

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise EstimatorError(f"steps={self.steps}: expected 1 or more")

    def for_inputs(self, statistics: InputStatistics) -> Quantizer:
        """Rounds w s under the best of the scales that it tries."""
        sizes = statistics.mean_size.clamp(min=1e-4)

        def quantize(weight: Tensor, precision: Precision) -> Tensor:
            candidates = []
            for step in range(self.steps):
                scale = sizes ** (step / self.steps)
                scale = scale / (scale.max() * scale.min()).sqrt()
                value = rounded_under_scale(weight, scale, len(statistics.gram), precision, self.quantizer)
                candidates.append((float(_output_error(value.double() - weight.double(), statistics.gram)), value))
            return min(candidates, key=lambda pair: pair[0])[1]

        return WeightsBy(quantize, self.quantizer)


def _output_error(change: Tensor, gram: Tensor) -> Tensor:
    """Mean squared change of the outputs, summed over rows: tr(D G D^T)."""
    rows = change.reshape(len(gram), -1, gram.shape[-1]).double()
    return ((rows @ gram.to(rows)) * rows).sum()
