"""The best proxy that EMQ published."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.hessian import differentiable_weights, gradient, ones_like_sample
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import cells_from_scores, unit_scores
from mpsearch.metrics.statistics import wide
from mpsearch.models.running import call


@dataclass(frozen=True)
class EMQ:
    """The best tree of EMQ's evolution (2307.10554).

        score(l) = mean over weights of softmax(log |G|) sqrt(relu(W)),    G = gradient of the summed logits for an input of ones
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    In the authors' code it is genotype [[1, 11], [6, 14], 2] over `virtual_grad` and `weight`. The softmax runs over
    the first axis of the stored weight (output channels); a zero of G counts as 1 before the logarithm, as in the
    code. The operation numbers are read with the table of the authors' sibling repositories, which differ among
    themselves, so the formula is likely, not certain. Those repositories pair the gradients in reverse order with the
    weights; here each layer has its own. Published: rank correlation 76 % over 50 configurations of one network with
    weights that were never trained, and with the bits as factor in place of the error. A baseline without data: one
    forward and one backward run of one sample of ones.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.90, 0.68 among plans of equal size; its own plans do 2.07 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    With the input 1 the gradient is (1, 1) for each of two output channels: the softmax is 1/2, and sqrt(relu) is 3
    and 0:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[9.0], [-4.0]]))
    >>> mps.profile(model, [torch.zeros(1, 1)], EMQ(), mps.precisions("w4"), quantizer=lambda w, p: 2 * w).sensitivity
    array([[0.75]])
    """

    takes_all_weights: ClassVar[bool] = True

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone; the one run is counted as one batch."""
        return Passes(forward=1 / batches, backward=1 / batches)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the model cannot be differentiable_weights, or a gradient is not finite.
        """
        weights = differentiable_weights(context)
        with torch.enable_grad():
            gradients = gradient(wide(call(context.model, ones_like_sample(context.batches[0]))).sum(), weights)
        context.passes.add(len(context.batches), forward=1, backward=1)
        if not all(torch.isfinite(g).all() for g in gradients):
            raise EstimatorError("a gradient for an input of ones is not finite")
        scores = {w: _score(wide(g), wide(w.detach())) for w, g in zip(weights, gradients, strict=True)}
        return cells_from_scores(context, unit_scores(context, scores))


def _score(g: Tensor, weight: Tensor) -> float:
    attention = torch.where(g == 0, torch.ones_like(g), g).abs().log().softmax(0)
    return float((attention * weight.relu().sqrt()).mean())
