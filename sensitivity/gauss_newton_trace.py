"""Trace of the Gauss-Newton matrix times noise power."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.averages import GradientEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.targets import GradientTarget
from mpsearch.estimation.gradients.trace_times_noise import TraceTimesNoise


@dataclass(frozen=True)
class GaussNewtonTrace(GradientEstimator):
    """Trace of the Gauss-Newton matrix times noise power (Schraudolph 2002; Martens 2014, 1412.1193, section 8).

        G = E[J^T (diag p - p p^T) J],   J = d logits / d W
        sensitivity = 1/2 tr(G_W) / n ||Q(W) - W||^2  +  1/2 tr(G_a) / n_a E||Q(a) - a||^2   [nats]

    For a softmax G is the Fisher information and the Hessian of the KL to the unquantized model, and, unlike the
    Hessian of the loss, never negative. Its trace is the mean of |J^T u|^2 over random u = sqrt(p) z - p <sqrt(p), z>
    with signs z, whose covariance is diag p - p p^T; with another metric than the KL, of the covariance of its Hessian.
    One forward and `num_samples` backward passes and no double
    backward; the standard error is over samples and their draws.

    Attributes:
        num_samples: draws of u for each prediction.
        seed: of the draws.

    Logits (0, w x) at w = 0: p = 1/2, G = x^2 / 4:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.zeros_(model[0].weight)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [0.1]])
    >>> table = mps.profile(model, [torch.full((64, 1), 2.0)], GaussNewtonTrace(64), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(3)      # 1/2 (2^2/4 + 2^2/4) / 2 x 0.1^2
    array([[0.005]])
    """

    needs: ClassVar[frozenset[Quantity]] = frozenset({"squared_norm", "input_squared_norm"})

    num_samples: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise EstimatorError(f"num_samples={self.num_samples}: expected 1 or more")

    @property
    def draws(self) -> int:
        """Backward passes a batch, one for each draw of u."""
        return self.num_samples

    def gradient_target(self, context: Context) -> GradientTarget:
        """Random outputs with the covariance of the softmax."""
        if callable(context.loss):
            raise EstimatorError("GaussNewtonTrace takes the softmax at the logits; with an own loss take HessianTrace")
        return GradientTarget("gauss-newton", self.num_samples, self.seed)

    def contribution(self, context: Context) -> Callable[[Gradients], Tensor]:
        """(N, D, P)."""
        return TraceTimesNoise(context)
