"""HAWQ: the largest eigenvalue of a layer's Hessian."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.hessian import (
    Blocks,
    differentiable_weights,
    gradient,
    hessian_products,
    top_eigenvalues,
)
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.statistics import wide
from mpsearch.models.running import Batch, samples


@dataclass(frozen=True)
class HessianTopEigenvalue:
    """Largest eigenvalue of the Hessian block of a layer times its squared perturbation (HAWQ, 1905.03696, section 3).

        v <- H_l v / |H_l v|,   lambda_l = v^T H_l v,   sensitivity(l, o) = 1/2 |lambda_l| ||Q_o(W_l) - W_l||^2   [relative]

    An upper bound of the second-order term, reached only by a perturbation along one direction. HAWQ orders layers by
    lambda / n, which has no bit axis; the product with the perturbation is its Omega. Power iteration finds the
    eigenvalue of largest absolute value, which may be negative for a loss with labels (it is kept with its sign in
    the table's origin); the default loss, the KL to the unquantized model, has none below 0. Of a group, members'
    scores are added. Weights only.

    With `slices` the eigenvalue is taken on each batch alone, and the score is |mean| + standard deviation over
    batches (Q-BERT, 1909.05840, equation 2).

    Each iteration takes, for each batch, one forward, one backward and one double backward pass for each layer that
    has not settled: the most expensive of the curvature signals.

    Attributes:
        iterations: at most, for each layer.
        tolerance: relative change of lambda at which a layer has settled.
        slices: Q-BERT's mean and deviation over batches.
        seed: of the starting directions.

    For the loss 1/2 (w1^2 + 3 w2^2) the largest eigenvalue is 3:

    >>> import mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> loss = lambda model, batch: 0.5 * (torch.tensor([[1.0, 3.0]]) * model[0].weight ** 2).sum() + 0 * model(batch).sum()
    >>> table = mps.profile(model, [torch.ones(1, 2)], HessianTopEigenvalue(), mps.precisions("w4"), loss=loss,
    ...                     quantizer=lambda weight, precision: weight + 0.5)
    >>> table.sensitivity.round(3)    # 1/2 * 3 * (0.5^2 + 0.5^2)
    array([[0.75]])
    """

    takes_all_weights: ClassVar[bool] = True

    iterations: int = 100
    tolerance: float = 1e-3
    slices: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise EstimatorError(f"iterations={self.iterations}: expected 1 or more")
        if not self.tolerance > 0:
            raise EstimatorError(f"tolerance={self.tolerance}: expected a number above 0")

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the model cannot be differentiated twice, or a precision quantizes activations.
        """
        for precision in context.precisions:
            if precision.quantizes_activation:
                raise EstimatorError(
                    f"HessianTopEigenvalue scores weights, not inputs: {precision} quantizes activations"
                )
        names = {p: layer.name for decision in context.decisions for p, layer in context.parameters(decision).items()}
        weights = differentiable_weights(context)
        batches = dict(enumerate(context.batches))
        groups = [{number: batch} for number, batch in batches.items()] if self.slices else [batches]
        eigenvalues = np.array([self._eigenvalues(context, names, group) for group in groups])
        mean = eigenvalues.mean(axis=0)
        deviation = eigenvalues.std(axis=0, ddof=1) if len(groups) > 1 else np.zeros(len(weights))
        score = dict(zip(weights, np.abs(mean) + deviation, strict=True))
        spread = dict(zip(weights, deviation / math.sqrt(len(groups)), strict=True))
        sensitivity = np.zeros((len(context.decisions), len(context.precisions)))
        variance = np.zeros_like(sensitivity)
        for u, p in context.cells():
            for parameter, layer in context.parameters(context.decisions[u]).items():
                squared = float(wide(context.perturbation(layer, context.precisions[p])).square().sum())
                sensitivity[u, p] += 0.5 * score[parameter] * squared
                variance[u, p] += (0.5 * spread[parameter] * squared) ** 2
        place = {parameter: i for i, parameter in enumerate(weights)}
        facts = {
            "eigenvalues": {
                decision.name: [float(mean[place[parameter]]) for parameter in context.parameters(decision)]
                for decision in context.decisions
            }
        }
        return Estimate(sensitivity, np.sqrt(variance) if self.slices else None, "relative", facts)

    def _eigenvalues(
        self, context: Context, names: Mapping[nn.Parameter, str], batches: Mapping[int, Batch]
    ) -> list[float]:
        weights = list(names)
        generator = torch.Generator().manual_seed(self.seed)
        starts = [[torch.randn(w.shape, generator=generator).to(w.device)] for w in weights]
        steps = context.progress(range(self.iterations), self.iterations, "Power iteration")

        def product(directions: Blocks) -> Blocks:
            return self._products(context, names, directions, batches)

        return top_eigenvalues(product, starts, steps, self.tolerance)

    def _products(
        self, context: Context, names: Mapping[nn.Parameter, str], directions: Blocks, batches: Mapping[int, Batch]
    ) -> Blocks:
        """H_l v_l of each layer that has a direction, mean over the samples of batches."""
        weights = list(names)
        points = [weights[i] for i in directions]
        total = sum(map(samples, batches.values()))
        means = {i: wide(torch.zeros_like(v)) for i, (v,) in directions.items()}
        for number, batch in batches.items():
            with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                gradients = gradient(context.mean_loss(batch), points, create_graph=True)
                products = [
                    hessian_products([g], [w], v)
                    for g, w, v in zip(gradients, points, directions.values(), strict=True)
                ]
            for i, (product,) in zip(directions, products, strict=True):
                if not torch.isfinite(product).all():
                    name = names[weights[i]]
                    raise EstimatorError(f"the Hessian of layer {name!r} times a vector is not finite (batch {number})")
                means[i] += product * samples(batch) / total
            context.passes.add(len(context.batches), forward=1, backward=1 + 2 * len(directions))
        return {i: [mean] for i, mean in means.items()}

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward and backward passes over the data, at most: as if no layer settled early; a decision counts one weight."""
        return Passes(self.iterations, self.iterations * (1 + 2 * decisions))
