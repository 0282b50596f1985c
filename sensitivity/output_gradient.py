"""ModelOpt: squared output gradients times squared output errors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.averages import GradientEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.targets import TokenWeights


@dataclass(frozen=True)
class OutputGradient(GradientEstimator):
    """Diagonal output Fisher: squared gradients of a layer's output times its squared errors (NVIDIA ModelOpt `auto_quantize`, gradient).

        sensitivity(l, o) = 1/2 mean over predictions of sum over elements (dT/dY)^2 (Y_o - Y)^2   [nats]

    T is that of `FisherProjection`: <u, logits> with random u for the loss `kl`, else the loss (ModelOpt takes the
    loss and no 1/2). It is the Fisher quadratic form without its off-diagonal terms: exact in expectation for errors
    that are independent over the elements of the output, which errors of weights are not. Each layer is run again
    alone for each precision; the model itself one forward and `draws` backward passes. One output difference is held
    at a time. Of a group, members' sums are added. The standard error is over samples and their draws.

    Attributes:
        draws: of u for each prediction.
        seed: of the draws.
        token_weights: `function(model, batch)` returns (B, T) importance of tokens of mean 1 (RSQ, 2503.01820), or
            None.

    Logits (0, w x) at w = 0: p = 1/2, the variance of u is 1/4 for the second logit:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [0.1]])
    >>> table = mps.profile(model, [torch.full((64, 1), 2.0)], OutputGradient(64), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(3)      # 1/2 1/4 (2 x 0.1)^2
    array([[0.005]])
    """

    scores_members: ClassVar[Literal["no", "free", "runs"]] = "free"
    needs: ClassVar[frozenset[Quantity]] = frozenset({"output"})

    draws: int = 1
    seed: int = 0
    token_weights: TokenWeights | None = None

    def contribution(self, context: Context) -> Callable[[Gradients], Tensor]:
        """(N, D, P)."""
        return lambda gradients: 0.5 * gradients.output
