"""AdaPT: the least word length without information loss."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.statistics import wide
from mpsearch.models.streaming.offloading import resident

#: Word lengths that are tried.
WORD_LENGTHS = range(2, 17)


@dataclass(frozen=True)
class AdaPTDivergence:
    """Divergence of the distribution of quantized weights from that of the weights (PushDown of AdaPT, 2107.13490).

        sensitivity(l, p) = sum over the distinct weights W of KL(h(W) || h(Q(W)))    [relative; nats a weight]

    Not checked against the authors' code. h is a histogram of `resolution` equal bins over the range of W, each with one count
    added so that the divergence is finite; 0 where every weight lies on its grid. AdaPT's word length is the least one
    whose fixed-point numbers, rounded to a power of two, keep the divergence below a tolerance; it is reported in the
    table's origin as `word_lengths`, and with `floor` a precision of fewer weight bits is not allowed (nan), the
    widest one always is. AdaPT chooses bins a layer while it trains, and looks at gradients before it raises a
    precision; neither exists after training. A baseline: a histogram does not know which weight moved, nor what it
    does to the loss. No data, no passes.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.90, 0.72 among plans of equal size; its own plans do 1.97 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        resolution: bins of the histogram.
        tolerance: nats below which no information is lost.
        floor: forbid precisions below the word length.

    Two bins: weights (0, 0, 1, 1) become (0, 0, 0, 1). Shares with one count added are (3, 3) / 6 and (4, 2) / 6:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0, 0.0, 1.0, 1.0]]))
    >>> change = lambda w, p: torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    >>> table = mps.profile(model, [torch.ones(1, 4)], AdaPTDivergence(2), mps.precisions("w4 w16"), quantizer=change)
    >>> table.sensitivity.round(4), table.origin["word_lengths"]    # ln(3 / sqrt(8)); 1 needs a sign and one bit
    (array([[0.0589, 0.    ]]), {'0': 2})
    """

    resolution: int = 100
    tolerance: float = 0.01
    floor: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 2:
            raise EstimatorError(f"resolution={self.resolution}: expected 2 bins or more")
        if not self.tolerance > 0:
            raise EstimatorError(f"tolerance={self.tolerance}: expected more than 0 nats")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """None: it reads weights alone."""
        return Passes()

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where a precision quantizes inputs.
        """
        for precision in context.precisions:
            if precision.quantizes_activation:
                raise EstimatorError(f"AdaPTDivergence scores weights, not inputs: {precision} quantizes inputs")
        sensitivity = np.zeros((len(context.decisions), len(context.precisions)))
        lengths = {}
        for u, decision in enumerate(context.decisions):
            parameters = context.parameters(decision)
            with resident(*map(context.module, parameters.values())):
                lengths[decision.name] = max(self.word_length(weight.detach()) for weight in parameters)
                for weight, layer in parameters.items():
                    for p, precision in enumerate(context.precisions):
                        if precision.quantizes_weight:
                            sensitivity[u, p] += self.divergence(weight.detach(), context.quantized(layer, precision))
            if self.floor:
                bits = np.array([precision.weight_bits for precision in context.precisions])
                sensitivity[u, bits < min(lengths[decision.name], int(bits.max()))] = np.nan
        return Estimate(sensitivity, None, "relative", {"word_lengths": lengths})

    def divergence(self, weight: Tensor, quantized: Tensor) -> float:
        """KL divergence of the two histograms over the range of the weight, in nats; values outside count in the outer bins.

        Args:
            weight: any shape.
            quantized: the same after rounding.
        """
        low, high = float(weight.min()), float(weight.max())
        p, q = (self._shares(x, low, high) for x in (weight, quantized))
        return max(0.0, float((p * (p / q).log()).sum()))

    def word_length(self, weight: Tensor) -> int:
        """Least word length, sign included, whose fixed-point numbers keep the divergence below the tolerance; else the greatest tried."""
        for bits in WORD_LENGTHS:
            if self.divergence(weight, fixed_point(weight, bits)) < self.tolerance:
                return bits
        return WORD_LENGTHS[-1]

    def _shares(self, x: Tensor, low: float, high: float) -> Tensor:
        scale = self.resolution / (high - low) if high > low else 0.0
        bins = ((wide(x) - low) * scale).long().clamp(0, self.resolution - 1)
        counts = torch.bincount(bins.reshape(-1), minlength=self.resolution).cpu().double() + 1
        return counts / counts.sum()


def fixed_point(weight: Tensor, bits: int) -> Tensor:
    """Round to two's complement numbers with the finest power-of-two step that holds the greatest magnitude, in the widest float.

    >>> fixed_point(torch.tensor([0.75, -1.0, 0.3]), 3)    # steps of 1/4 reach from -1 to 3/4
    tensor([ 0.7500, -1.0000,  0.2500], dtype=torch.float64)
    """
    values = wide(weight)
    low, high = float(values.min()), float(values.max())
    if low == high == 0:
        return values
    codes = 2 ** (bits - 1)
    fraction = math.floor(math.log2(codes / max(-low, high)))  # every step down doubles the range
    if high > (codes - 1) * 2.0**-fraction:
        fraction -= 1
    return (values * 2.0**fraction).round().clamp(-codes, codes - 1) * 2.0**-fraction
