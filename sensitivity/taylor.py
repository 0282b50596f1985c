"""First-order change of the loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.averages import GradientEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.targets import GradientTarget, TokenWeights


@dataclass(frozen=True)
class Taylor(GradientEstimator):
    """First-order change of the loss under the real perturbation (as in LLM-MQ, 2023).

        sensitivity(l, o) = mean over predictions of <grad loss, Q_o(W) - W>   [nats], or its absolute value [relative]

    The loss is the cross-entropy of the data's labels, or the user's own (taken as a mean over samples); the KL to
    the unquantized model has no first order. A precision that quantizes inputs takes <dloss/dY, Y_o - Y>. At a
    minimum the first order is 0 in expectation, and what is left is chance: a signed table rewards layers whose
    errors happen to lower the loss on the calibration data. One forward and one backward pass, whatever the number of
    precisions; the standard error is over samples.

    Attributes:
        signed: keep the sign; by default the absolute value of the mean.
        token_weights: `function(model, batch)` returns (B, T) importance of tokens of mean 1 (RSQ, 2503.01820), or
            None.

    Logits (0, w x) at w = 0 and label 0: the gradient is x/2:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [-0.1]])
    >>> batch = (torch.full((2, 1), 2.0), torch.tensor([0, 0]))
    >>> mps.profile(model, [batch], Taylor(signed=True), mps.precisions("w4"), quantizer=shift).sensitivity.round(6)
    array([[-0.1]])
    """

    needs: ClassVar[frozenset[Quantity]] = frozenset({"projection"})

    signed: bool = False
    token_weights: TokenWeights | None = None

    def gradient_target(self, context: Context) -> GradientTarget:
        """The loss with the data's labels."""
        weights = self.token_weights
        return GradientTarget(
            "given", token_weights=weights, root=weights is None
        )  # without weights as other signals: shared

    def contribution(self, context: Context) -> Callable[[Gradients], Tensor]:
        """(N, D, P)."""
        return lambda gradients: gradients.projection

    def finish(self, context: Context, mean: NDArray[np.float64], se: NDArray[np.float64]) -> Estimate:
        """The mean of the signed changes, or its absolute value."""
        return Estimate(mean, se, context.unit) if self.signed else Estimate(np.abs(mean), se, "relative")
