"""GraSP: what removing weights does to the gradient flow."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.hessian import differentiable_weights, gradient, mean_gradient, supervised_loss
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import cells_from_scores, unit_scores
from mpsearch.metrics.statistics import wide
from mpsearch.models.running import samples


@dataclass(frozen=True)
class GraSP:
    """Change of the squared gradient norm when a layer is scaled (GraSP, 2002.07376; a proxy in EMQ, 2307.10554).

        score(l) = |sum over weights of w (H g)|,    g = d mean loss / d w and H its Hessian over all scored weights together
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    The paper keeps the sign of -w H g, and later ports turn it round; here it is dropped after the sum over the layer,
    since a negative score would reward the coarser format. A baseline: it was made for untrained networks, and both g
    and the score vanish at a trained optimum. Labels as in `SNIP`. Two forward passes, and backward passes worth four
    (a double backward counts as two).

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.90, 0.65 among plans of equal size; its own plans do 2.59 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        seed: of the drawn labels.

    For the loss w1^2 / 2 + w2^2 at weights (1, 1), g = (1, 2) and H g = (1, 4); an error as large as the weights:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> _ = torch.nn.init.ones_(model[0].weight)
    >>> loss = lambda model, batch: (torch.tensor([[0.5, 1.0]]) * model[0].weight ** 2).sum() + 0 * model(batch).sum()
    >>> mps.profile(model, [torch.ones(1, 2)], GraSP(), mps.precisions("w4"), loss=loss, quantizer=lambda w, p: 2 * w).sensitivity
    array([[5.]])
    """

    takes_all_weights: ClassVar[bool] = True

    seed: int = 0

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone."""
        return Passes(forward=2, backward=4)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the model cannot be differentiated twice, or a product is not finite.
        """
        weights = differentiable_weights(context)
        mean = mean_gradient(context, weights, self.seed)
        total = sum(samples(batch) for batch in context.batches)
        generator = torch.Generator().manual_seed(self.seed)  # the same labels again
        scores = dict.fromkeys(weights, 0.0)
        for number, batch in enumerate(context.progress(context.batches, len(context.batches), "GraSP")):
            with (
                torch.enable_grad(),
                torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            ):
                parts = gradient(supervised_loss(context, batch, generator), weights, create_graph=True)
                dot = torch.stack([(wide(part) * g).sum().cpu() for part, g in zip(parts, mean, strict=True)]).sum()
                products = gradient(dot, weights) if dot.requires_grad else [torch.zeros_like(w) for w in weights]
            for weight, product in zip(weights, products, strict=True):
                value = float((wide(weight.detach()) * product).sum())
                if not torch.isfinite(product).all():
                    raise EstimatorError(f"a Hessian-vector product is not finite in batch {number}")
                scores[weight] += samples(batch) / total * value
            context.passes.add(len(context.batches), forward=1, backward=3)
        return cells_from_scores(context, unit_scores(context, {w: abs(score) for w, score in scores.items()}))
