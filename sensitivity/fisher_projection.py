"""Squared projection of the gradient on the real perturbation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.averages import GradientEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.targets import TokenWeights


@dataclass(frozen=True)
class FisherProjection(GradientEstimator):
    """Half the mean squared first-order change that the real perturbation makes (MPQCO, 2110.06554; loss-MSE, 2505.13060).

        sensitivity(l, o) = 1/2 mean over predictions of <grad_W T, Q_o(W) - W>^2  =  1/2 D^T F D   [nats]
        T = <u, logits>,  u = sqrt(p) z - p <sqrt(p), z>,  random signs z

    in expectation: u has the covariance diag(p) - p p^T, the Hessian of the KL at the logits, so this is the quadratic
    form of the full Fisher block, off-diagonal entries included, and no matrix. Labels drawn from the prediction, as
    in the papers, have the same expectation and, on confident networks, far more variance. A precision that quantizes
    inputs takes <dT/dY, Y_o - Y> in the same square, so that errors of weights and inputs can cancel or add. The
    square comes after the sum over elements; `OutputGradient` squares before. With another metric than the KL, u has the
    covariance of its Hessian (`metrics.Comparison.random_output`) and the table its unit: for `mse` and `relative-error` u is in
    proportion to z, so for a linear model this is the measured error, exactly with a power of two of draws of no less than the numbers of
    a sample. With a loss of one's own, or `cross-entropy`, T is that loss.
    One forward and `draws` backward passes, whatever the number of precisions. The
    standard error is over samples and their draws.

    Attributes:
        draws: of u for each prediction.
        seed: of the draws.
        token_weights: `function(model, batch)` returns (B, T) importance of tokens of mean 1 (RSQ, 2503.01820), or
            None.

    Logits (0, w x) at w = 0: p = 1/2, the Fisher information of the second weight is x^2 / 4:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [0.1]])
    >>> table = mps.profile(model, [torch.full((64, 1), 2.0)], FisherProjection(64), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(3)      # 1/2 2^2/4 0.1^2
    array([[0.005]])
    """

    scores_members: ClassVar[Literal["no", "free", "runs"]] = "free"
    needs: ClassVar[frozenset[Quantity]] = frozenset({"projection"})

    draws: int = 2
    seed: int = 0
    token_weights: TokenWeights | None = None

    def contribution(self, context: Context) -> Callable[[Gradients], Tensor]:
        """(N, D, P)."""
        return lambda gradients: 0.5 * gradients.projection.square()
