"""EAGL: entropy of quantized weights."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import cells_from_scores
from mpsearch.models.modules.weights import canonical
from mpsearch.models.streaming.offloading import resident
from mpsearch.quantizers.rounding import RoundToNearest


@dataclass(frozen=True)
class WeightEntropy:
    """Entropy of the codes of a quantized weight (EAGL, 2301.13330).

        score(l) = - sum over codes of p log2 p    [bits a weight],    p = share of the weights with the code
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    EAGL takes the codes of a layer trained at the higher of two precisions and keeps the layers of highest entropy
    there. Here codes are those of rounding to nearest with one scale a layer, the granularity of the paper's
    quantizer, whatever quantizer fills the table (not checked against the authors' code). A baseline: it measures the
    tensor, not the loss. No data, no passes.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.93, 0.75 among plans of equal size; its own plans do 1.78 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        bits: of the codes; the entropy lies between 0 and this.

    Weights -3, -1, 1, 3 are four codes of equal share: 2 bits; an error as large as the weights:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]))
    >>> mps.profile(model, [torch.ones(1, 4)], WeightEntropy(), mps.precisions("w4"), quantizer=lambda w, p: 2 * w).sensitivity
    array([[2.]])
    """

    bits: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 15:
            raise EstimatorError(f"bits={self.bits}: expected 1 to 15")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone."""
        return Passes()

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where a weight is not finite.
        """
        quantize, precision = RoundToNearest(granularity="tensor"), Precision(str(self.bits))
        score = []
        for decision in context.decisions:
            modules = [context.module(layer) for layer in context.parameters(decision).values()]
            with resident(*modules):
                score.append(sum(entropy(quantize(canonical(module).detach(), precision)) for module in modules))
        return cells_from_scores(context, np.array(score))


def entropy(values: Tensor) -> float:
    """Shannon entropy of the distinct values of a tensor, in bits.

    >>> entropy(torch.tensor([0.5, 0.5, 7.0, -1.0]))
    1.5
    """
    counts = torch.unique(values, return_counts=True)[1].cpu().double()
    share = counts / counts.sum()
    return max(0.0, float(-(share * share.log()).sum()) / math.log(2))
