"""Synaptic flow: what passes through a layer when every weight is positive and every input is one."""

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.hessian import differentiable_weights, gradient, ones_like_sample
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import cells_from_scores, unit_scores
from mpsearch.models.running import call
from mpsearch.models.streaming.offloading import replaced


@dataclass(frozen=True)
class Synflow:
    """Synaptic flow in double precision (Synflow, 2006.05467; a proxy in EMQ, 2307.10554).

        R = sum of f(1; |parameters|),    score(l) = sum (or mean) over weights of |w dR/dw|
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    Without data: the input is one sample of ones (token numbers stay). Batch norm keeps its scale and loses its
    running mean (EMQ passes it by, and draws new Gaussian weights). A baseline that ought to fail: flow is
    conserved, so the sum is the same number in every layer of a chain without biases; the mean is then little but 1 /
    size of the layer, and its plans were worse than uniform precision. One forward and one backward run of one sample.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.84, 0.59 among plans of equal size; its own plans do 5.46 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        reduction: over the weights of a layer, `sum` or `mean`.

    Two layers of one input and one output, weights 2 and -3: R = 6, and each score is 6; an error as large as the weight:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    >>> _ = torch.nn.init.constant_(model[0].weight, 2.0), torch.nn.init.constant_(model[1].weight, -3.0)
    >>> mps.profile(model, [torch.zeros(1, 1)], Synflow(), mps.precisions("w4"), quantizer=lambda w, p: 2 * w).sensitivity
    array([[6.],
           [6.]])
    """

    takes_all_weights: ClassVar[bool] = True

    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise EstimatorError(f"reduction={self.reduction!r}: expected 'mean' or 'sum'")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone; the one run is counted as one batch."""
        return Passes(forward=1 / batches, backward=1 / batches)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the flow exceeds double precision, or the model cannot run in it.
        """
        weights = differentiable_weights(context)
        batch = ones_like_sample(context.batches[0], torch.float64)
        with replaced(_linearized(context.model)), torch.enable_grad():
            flow = call(context.model, batch).double().sum()
            if not torch.isfinite(flow.detach()):
                raise EstimatorError(f"the synaptic flow is {float(flow.detach())}, expected a finite number")
            gradients = gradient(flow, weights)
            sums = [float((g * w).detach().abs().sum()) for w, g in zip(weights, gradients, strict=True)]
        context.passes.add(len(context.batches), forward=1, backward=1)
        scores = {w: s / (w.numel() if self.reduction == "mean" else 1) for w, s in zip(weights, sums, strict=True)}
        return cells_from_scores(context, unit_scores(context, scores))


def _linearized(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """Absolute parameters and zero running means, in double precision."""
    values = {p: p.detach().double().abs() for p in model.parameters() if p.is_floating_point()}
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            wide = buffer.double()
            values[cast(nn.Parameter, buffer)] = (
                torch.zeros_like(wide) if name.rpartition(".")[2] == "running_mean" else wide
            )
    return values
