"""SNIP: what the loss would change if single weights were removed."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.hessian import differentiable_weights, mean_gradient
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import cells_from_scores, unit_scores
from mpsearch.metrics.statistics import wide


@dataclass(frozen=True)
class SNIP:
    """Connection sensitivity: the sum of |gradient x weight| (SNIP, 1810.02340; a proxy in EMQ, 2307.10554).

        score(l) = sum over weights of |g w|,    g = d mean loss / d w over all data
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    The paper prunes an untrained network; here the network is the trained one. EMQ multiplies the score by the bits
    instead of an error. A baseline: it knows neither the direction of the quantization error nor curvature. The loss is
    the context's; for `kl` the cross-entropy of the data's labels, or of labels drawn from the model where the data has
    none. One forward and one backward pass.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.93, 0.76 among plans of equal size; its own plans do 1.35 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        seed: of the drawn labels.

    For the loss w1^2 + w2^2 at weights (3, -1), |g w| = 2 w^2 gives 20; an error of (1, 1) is 2 of 10:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0, -1.0]]))
    >>> loss = lambda model, batch: model[0].weight.square().sum() + 0 * model(batch).sum()
    >>> mps.profile(model, [torch.ones(1, 2)], SNIP(), mps.precisions("w4"), loss=loss, quantizer=lambda w, p: w + 1).sensitivity
    array([[4.]])
    """

    takes_all_weights: ClassVar[bool] = True

    seed: int = 0

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone."""
        return Passes(forward=1, backward=1)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the loss cannot be differentiable_weights, or the gradient is not finite.
        """
        weights = differentiable_weights(context)
        gradients = mean_gradient(context, weights, self.seed)
        with torch.no_grad():
            scores = {w: float(wide(g * w).abs().sum()) for w, g in zip(weights, gradients, strict=True)}
        return cells_from_scores(context, unit_scores(context, scores))
