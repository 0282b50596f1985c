"""Squared projection of the gradient on the real perturbation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimator import Setting
from mpsearch.sweep import GradientEstimator, Gradients, Quantity, TokenWeights


@dataclass(frozen=True)
class FisherProjection(GradientEstimator):
    """Half the mean squared first-order change that the real perturbation makes (MPQCO, 2110.06554; loss-MSE, 2505.13060).

        sensitivity(l, o) = 1/2 mean over predictions of <grad_W log p(y), Q_o(W) - W>^2  =  1/2 D^T F D   [nats]

    with y drawn from the model's own prediction: the quadratic form of the full Fisher block, off-diagonal entries
    included, and no matrix. A precision that quantizes inputs takes <dT/dY, Y_o - Y> in the same square, so that
    errors of weights and inputs can cancel or add. The square comes after the sum over elements; `OutputGradient`
    squares before. With a loss of one's own, or `cross-entropy`, the gradients are those of that loss. One forward
    and `draws` backward passes, whatever the number of precisions. The standard error is over samples and their
    draws.

    Attributes:
        draws: labels drawn for each prediction.
        seed: of the draws.
        token_weights: `function(model, batch)` returns (B, T) importance of tokens of mean 1 (RSQ, 2503.01820), or
            None.

    Logits (0, w x) at w = 0: p = 1/2, the gradient is +-x/2 whatever the label:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [0.1]])
    >>> table = mps.profile(model, [torch.full((2, 1), 2.0)], FisherProjection(), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(6)      # 1/2 (2/2 x 0.1)^2
    array([[0.005]])
    """

    needs: ClassVar[frozenset[Quantity]] = frozenset({"projection"})

    draws: int = 2
    seed: int = 0
    token_weights: TokenWeights | None = None

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise EstimatorError(f"draws={self.draws}: expected 1 or more")

    def contribution(self, setting: Setting) -> Callable[[Gradients], Tensor]:
        """(N, U, P)."""
        return lambda found: 0.5 * found.projection.square()
