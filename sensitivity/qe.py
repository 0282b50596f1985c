"""Entropy of feature maps under the Gaussian assumption."""

import math
from dataclasses import dataclass

import numpy as np

from mpsearch.core.layer import Layer
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import cells_from_scores
from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.weights import canonical
from mpsearch.models.streaming.offloading import resident


@dataclass(frozen=True)
class QE:
    """Gaussian entropy of a layer's output (entropy-driven mixed precision, NeurIPS 2022; `QE` in EMQ, 2307.10554).

        score(l) = max(log C + log sigma, 0),    sigma^2 = mean over output channels of ||w_c||^2
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    sigma is the standard deviation of the output for white input of variance 1, C the number of output channels. EMQ's
    port scores a whole configuration: sums of log sigma over residual blocks plus log C a stage, with hand-set stage
    weights (0, 0, 1, 1, 6), random Gaussian weights and a lookup table of sigma by bits; this is its term of one
    layer, with the trained weights, and stage weights of 1. A baseline: it measures capacity, not damage, and sees no
    data. Layers that share a weight each add their own. No passes.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.93, 0.74 among plans of equal size; its own plans do 1.74 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Two channels of squared norms 1 and 7: sigma = 2, so log 2 + log 2; an error as large as the weights:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [7.0**0.5]]))
    >>> mps.profile(model, [torch.ones(1, 1)], QE(), mps.precisions("w4"), quantizer=lambda w, p: 2 * w).sensitivity.round(4)
    array([[1.3863]])
    """

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone."""
        return Passes()

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`."""
        score = [sum(_entropy(context, layer) for layer in decision.layers) for decision in context.decisions]
        return cells_from_scores(context, np.array(score))


def _entropy(context: Context, layer: Layer) -> float:
    module = context.module(layer)
    with resident(module):
        weight = wide(canonical(module).detach())
    channels = weight.shape[1] if layer.kind == "embedding" else len(weight)  # a row of an embedding is an output
    variance = float(weight.square().sum()) / len(weight) / (channels if layer.kind == "embedding" else 1)
    return max(math.log(channels) + 0.5 * math.log(variance), 0.0) if variance else 0.0
