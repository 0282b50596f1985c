"""Kurtosis of the weights: a baseline that needs no data."""

from dataclasses import dataclass

import numpy as np

from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import cells_from_scores
from mpsearch.metrics.statistics import wide
from mpsearch.models.streaming.offloading import resident


@dataclass(frozen=True)
class Kurtosis:
    """Kurtosis of the weights times relative quantization error (KURE, 2002.07686; a weak predictor on LLMs, 2405.20835).

        sensitivity(l, o) = E[(w - mean)^4] / E[(w - mean)^2]^2  x  ||Q(W) - W||^2 / ||W||^2   [relative]

    Heavy tails (a normal distribution has 3, a uniform one 1.8) mean outliers that stretch the grid. That the score
    multiplies the error is a choice made here. Of a group, the elements of all members are taken together. A constant
    weight scores 1.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0, -1.0]]))     # kurtosis 1
    >>> add = lambda weight, precision: weight + 1                     # error 2 / 2
    >>> mps.profile(model, [torch.ones(1, 2)], Kurtosis(), mps.precisions("w4"), quantizer=add).sensitivity
    array([[1.]])
    """

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`."""
        score = np.ones(len(context.decisions))
        for u, decision in enumerate(context.decisions):
            parameters = context.parameters(decision)
            with resident(*map(context.module, parameters.values())):
                weights = [wide(parameter.detach()).flatten() for parameter in parameters]
                count = sum(w.numel() for w in weights)
                mean = sum(float(w.sum()) for w in weights) / count
                second, fourth = (sum(float((w - mean).pow(k).sum()) for w in weights) / count for k in (2, 4))
            if second > 0:
                score[u] = fourth / second**2
        return cells_from_scores(context, score)

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """No passes; one forward where activations are quantized."""
        return Passes(1.0, 0.0)
