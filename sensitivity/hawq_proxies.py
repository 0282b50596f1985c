"""HAWQ and HAWQ-V2 as EMQ compares them: top eigenvalue and trace of the Hessian, not divided by the size of the layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.hessian import (
    Blocks,
    differentiable_weights,
    gradient,
    hessian_products,
    rademacher,
    top_eigenvalues,
)
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import cells_from_scores
from mpsearch.metrics.statistics import wide
from mpsearch.models.running import Batch, samples


@dataclass(frozen=True)
class HAWQProxy:
    """Largest eigenvalue of a layer's Hessian (`hawqv1` in EMQ, 2307.10554; HAWQ, 1905.03696, divides it by the number of weights).

        score(l) = |lambda_1(H_l)|,    mean over batches
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    By power iteration from a random direction; it finds the eigenvalue of the largest magnitude, whose sign is
    dropped, since a negative score would reward the coarser format. The reference takes one batch and stops when
    lambda changes by less than 0.1 %; here the number of iterations is fixed, so that the cost is known. A baseline:
    one direction of millions, in which rounding errors need not point. A group is one block. One forward pass, and
    backward passes worth 1 + 2 x iterations x decisions.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.91, 0.68 among plans of equal size; its own plans do 2.05 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        num_iterations: Hessian-vector products a decision and batch.
        seed: of the first directions.

    For the loss 3/2 w1^2 + 1/2 w2^2 the eigenvalues are 3 and 1; an error as large as the weights:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> loss = lambda model, batch: (torch.tensor([[1.5, 0.5]]) * model[0].weight ** 2).sum() + 0 * model(batch).sum()
    >>> table = mps.profile(model, [torch.ones(1, 2)], HAWQProxy(), mps.precisions("w4"), loss=loss, quantizer=lambda w, p: 2 * w)
    >>> table.sensitivity.round(6)
    array([[3.]])
    """

    takes_all_weights: ClassVar[bool] = True

    num_iterations: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise EstimatorError(f"num_iterations={self.num_iterations}: expected 1 or more")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone."""
        return Passes(forward=1, backward=1 + 2 * self.num_iterations * decisions)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the model cannot be differentiated twice, or an eigenvalue is not finite.
        """
        differentiable_weights(context)
        blocks = [list(context.parameters(decision)) for decision in context.decisions]
        generator = torch.Generator().manual_seed(self.seed)
        total = sum(samples(batch) for batch in context.batches)
        score = np.zeros(len(blocks))
        for number, batch in enumerate(context.progress(context.batches, len(context.batches), "HAWQ proxy")):
            gradients = _gradients(context, batch, [w for block in blocks for w in block])
            for u, block in enumerate(blocks):
                value = abs(self._eigenvalue([gradients[w] for w in block], block, generator))
                if not math.isfinite(value):
                    raise EstimatorError(
                        f"the eigenvalue of {context.decisions[u].name!r} is {value}, expected a finite number (batch {number})"
                    )
                score[u] += samples(batch) / total * value
            context.passes.add(
                len(context.batches), forward=1, backward=1 + 2 * self.num_iterations * len(context.decisions)
            )
        return cells_from_scores(context, score)

    def _eigenvalue(
        self, gradients: Sequence[Tensor], block: Sequence[nn.Parameter], generator: torch.Generator
    ) -> float:
        start = [wide(torch.randn(w.shape, generator=generator).to(w.device)) for w in block]

        def product(directions: Blocks) -> Blocks:
            return {b: hessian_products(gradients, block, vectors) for b, vectors in directions.items()}

        (value,) = top_eigenvalues(product, [start], range(self.num_iterations))
        return value


@dataclass(frozen=True)
class HAWQV2Proxy:
    """Trace of a layer's Hessian (`hawqv2` in EMQ, 2307.10554).

        score(l) = tr(H_l)
        sensitivity(l, p) = score(l) x relative squared error of p    [relative]

    HAWQ-V2 itself (1911.03852) divides by the number of weights and takes absolute errors: `HessianTrace`. By
    Hutchinson's estimator with Rademacher probes, one for all layers at once; the reference stops when the running
    mean changes by less than 0.1 %, which happens by chance, so the number of probes is fixed here. A baseline:
    relative errors favour no layer for its size, so a layer whose weights are few or small is scored too low. One
    forward pass, and backward passes worth 1 + 2 x probes.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.91, 0.68 among plans of equal size; its own plans do 2.54 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        num_samples: probes a batch, at least 2.
        seed: of the probes.

    For the loss 3/2 w1^2 + 1/2 w2^2 every probe gives the trace 4; an error as large as the weights:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> loss = lambda model, batch: (torch.tensor([[1.5, 0.5]]) * model[0].weight ** 2).sum() + 0 * model(batch).sum()
    >>> mps.profile(model, [torch.ones(1, 2)], HAWQV2Proxy(2), mps.precisions("w4"), loss=loss, quantizer=lambda w, p: 2 * w).sensitivity
    array([[4.]])
    """

    takes_all_weights: ClassVar[bool] = True

    num_samples: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_samples < 2:
            raise EstimatorError(f"num_samples={self.num_samples}: expected 2 or more, for a standard error")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data of precisions that leave inputs alone."""
        return Passes(forward=1, backward=1 + 2 * self.num_samples)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the model cannot be differentiated twice, or a trace is not finite.
        """
        weights = differentiable_weights(context)
        generator = torch.Generator().manual_seed(self.seed)
        total = sum(samples(batch) for batch in context.batches)
        mean, variance = np.zeros(len(weights)), np.zeros(len(weights))
        for number, batch in enumerate(context.progress(context.batches, len(context.batches), "HAWQ-V2 proxy")):
            gradients = list(_gradients(context, batch, weights).values())
            draws = np.zeros((self.num_samples, len(weights)))
            for draw in draws:
                signs = [rademacher(w, generator) for w in weights]
                products = hessian_products(gradients, weights, signs)
                draw[:] = [float((z * product).sum()) for z, product in zip(signs, products, strict=True)]
            if not np.isfinite(draws).all():
                raise EstimatorError(f"a Hessian trace is not finite in batch {number}")
            share = samples(batch) / total
            mean += share * draws.mean(axis=0)
            variance += share**2 * draws.var(axis=0, ddof=1) / self.num_samples
            context.passes.add(len(context.batches), forward=1, backward=1 + 2 * self.num_samples)
        place = {w: i for i, w in enumerate(weights)}
        rows = [[place[w] for w in context.parameters(decision)] for decision in context.decisions]
        score = np.array([mean[row].sum() for row in rows])
        return cells_from_scores(context, score, np.sqrt([variance[row].sum() for row in rows]))


def _gradients(context: Context, batch: Batch, weights: Sequence[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Gradients of the mean loss with their graph."""
    with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return dict(zip(weights, gradient(context.mean_loss(batch), weights, create_graph=True), strict=True))
