"""FIT with the true Fisher information: labels drawn from the model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.averages import GradientEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.targets import GradientTarget, TokenWeights
from mpsearch.estimation.gradients.trace_times_noise import TraceTimesNoise


@dataclass(frozen=True)
class Fisher(GradientEstimator):
    """Trace of the Fisher information times noise power, weights and activations in one sum (FIT, 2210.08502, section 3).

        sensitivity = 1/2 tr(F_W) / n ||Q(W) - W||^2  +  1/2 tr(F_a) / n_a E||Q(a) - a||^2   [nats]
        tr(F_W) = mean over predictions of |grad_W log p(y)|^2,  y drawn from the model's own prediction

    F is the Hessian of the KL to the unquantized model, so this predicts that KL for errors without preferred
    direction. Gradients are those of single samples: the gradient of a batch mean is smaller by the batch size. FIT
    takes Delta^2 / 12 a element for the noise; here it is measured. One forward and `draws` backward passes (and a
    forward pass for the noise where activations are quantized), whatever the number of precisions. The standard error
    is over samples and their draws.

    Attributes:
        draws: labels drawn for each prediction.
        seed: of the draws.
        token_weights: `function(model, batch)` returns (B, T) importance of tokens of mean 1 (RSQ, 2503.01820), or
            None.

    Logits (0, w x) at w = 0: p = 1/2, the gradient is +-x/2, the Fisher information x^2 / 4:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [0.1]])
    >>> table = mps.profile(model, [torch.full((2, 1), 2.0)], Fisher(), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(6)      # 1/2 (2^2/4 + 2^2/4) / 2 x 0.1^2
    array([[0.005]])
    """

    needs: ClassVar[frozenset[Quantity]] = frozenset({"squared_norm", "input_squared_norm"})

    draws: int = 1
    seed: int = 0
    token_weights: TokenWeights | None = None

    def gradient_target(self, context: Context) -> GradientTarget:
        """Labels drawn from the model, whatever the loss."""
        if callable(context.loss):
            raise EstimatorError(
                "Fisher draws labels from the model's prediction; with an own loss take EmpiricalFisher"
            )
        return GradientTarget("drawn", self.draws, self.seed, self.token_weights)

    def contribution(self, context: Context) -> Callable[[Gradients], Tensor]:
        """(N, D, P)."""
        return TraceTimesNoise(context)
