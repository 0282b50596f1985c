"""FIT: empirical Fisher information, with the labels of the data."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.averages import GradientEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.targets import GradientTarget, TokenWeights
from mpsearch.estimation.gradients.trace_times_noise import TraceTimesNoise


@dataclass(frozen=True)
class EmpiricalFisher(GradientEstimator):
    """Squared gradients of single samples times noise power, weights and activations in one sum (FIT, 2210.08502, section 3).

        sensitivity = 1/2 tr(E_W) / n ||Q(W) - W||^2  +  1/2 tr(E_a) / n_a E||Q(a) - a||^2   [nats]
        tr(E_W) = mean over predictions of |grad_W loss|^2

    The loss is the cross-entropy of the data's labels, or the user's own. On a well-trained network that gradient is
    nearly 0 for most samples, and the few wrong ones decide; `Fisher` draws labels instead and needs none. An own
    loss is taken as a mean over the samples of the batch. For a language model the tokens of a sequence are added up
    before squaring. One forward and one backward pass, whatever the number of precisions. The standard error is over
    samples.

    Attributes:
        token_weights: `function(model, batch)` returns (B, T) importance of tokens of mean 1 (RSQ, 2503.01820), or
            None.

    Logits (0, w x) at w = 0: p = 1/2, the gradient is +-x/2:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [0.1]])
    >>> batch = (torch.full((2, 1), 2.0), torch.tensor([0, 1]))
    >>> table = mps.profile(model, [batch], EmpiricalFisher(), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(6)      # 1/2 (2^2/4 + 2^2/4) / 2 x 0.1^2
    array([[0.005]])
    """

    needs: ClassVar[frozenset[Quantity]] = frozenset({"squared_norm", "input_squared_norm"})

    token_weights: TokenWeights | None = None

    def gradient_target(self, context: Context) -> GradientTarget:
        """The loss with the data's labels."""
        return GradientTarget("given", token_weights=self.token_weights)

    def contribution(self, context: Context) -> Callable[[Gradients], Tensor]:
        """(N, D, P)."""
        return TraceTimesNoise(context)
