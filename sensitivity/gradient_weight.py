"""Plain gradient x weight, summed with its sign."""

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
class GradientWeight:
    """First-order effect of scaling a whole layer (`plain` in EMQ, 2307.10554, and in zero-cost NAS, 2101.08134).

        score(l) = |sum over weights of g w| = |d mean loss / d log(scale of the layer)|,    g = d mean loss / d w
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    Summed with signs and made positive last, which is what tells it from SNIP; the references keep the sign, but a
    negative score would reward the coarser format. A baseline that ought to fail: the score is near 0 at a trained
    optimum, and exactly 0 for a layer in front of a layer normalization, since the loss does not depend on its scale
    (batch norm has fixed statistics here, so it does not hide the scale). Labels as in `SNIP`. One forward and one backward pass.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.89, 0.61 among plans of equal size; its own plans do 3.22 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        seed: of the drawn labels.

    For the loss w1^2 / 2 - w2^2 at weights (4, 1), g w = 16 - 2; an error of (1, 4) is as large as the weights:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[4.0, 1.0]]))
    >>> loss = lambda model, batch: (torch.tensor([[0.5, -1.0]]) * model[0].weight ** 2).sum() + 0 * model(batch).sum()
    >>> error = lambda w, p: w + torch.tensor([[1.0, 4.0]])
    >>> mps.profile(model, [torch.ones(1, 2)], GradientWeight(), mps.precisions("w4"), loss=loss, quantizer=error).sensitivity
    array([[14.]])
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
            scores = {w: abs(float(wide(g * w).sum())) for w, g in zip(weights, gradients, strict=True)}
        return cells_from_scores(context, unit_scores(context, scores))
