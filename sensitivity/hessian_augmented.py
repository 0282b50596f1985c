"""Sensitivities with interactions between layers, from projections of per-sample gradients."""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mpsearch.core import amounts
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.averages import Averages, GradientEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.one_pass import Accumulator
from mpsearch.estimation.gradients.targets import TokenWeights

#: Cells beyond which the matrix of pairs would not fit.
MOST_CELLS = 8192


@dataclass(frozen=True)
class HessianAugmented(GradientEstimator):
    """The Hessian's blocks between layers, at the real perturbations (Augmenting Hessians, 2306.04879; CLADO, 2307.05657).

        p_n(l, o) = <grad_W T_n, Q_o(W_l) - W_l>,      G = mean over predictions of p p^T
        sensitivity(l, o) = 1/2 G[(l, o), (l, o)],    interactions[(l, o), (k, q)] = (1 - shrink) G[(l, o), (k, q)]   [nats]

    1/2 D^T F D for a perturbation D of all layers at once is the sum of both. CLADO measures each pair with a run of
    its own, (L P)^2 / 2 of them; here the pairs come with the gradients of one sweep. T is that of
    `FisherProjection`. G is positive semidefinite, of rank at most the number of samples x draws: entries between
    layers are mostly noise when those are few, hence `shrink`, which scales them towards 0 (CoopQ, 2509.15455, takes
    1/2). The published augmentation could not be checked; this is the form that follows from the same Taylor
    expansion. Of a group, its first layer carries the interactions.

    Attributes:
        draws: of random outputs for each prediction.
        seed: of the draws.
        shrink: 0 = trust all pairs, 1 = none.
        token_weights: `function(model, batch)` returns (B, T) importance of tokens of mean 1 (RSQ, 2503.01820), or
            None.

    Two weights in a row, logits (0, b a x): da and db do the same to the output, so half of the damage of both is
    interaction:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.ones_(model[0].weight), model[1].weight.data.copy_(torch.tensor([[0.0], [1.0]]))
    >>> shift = lambda weight, precision: weight + 0.1 * (weight == 1)
    >>> table = mps.profile(model, [torch.ones(4, 1)], HessianAugmented(shrink=0), mps.precisions("w4"), quantizer=shift)
    >>> s, pair = table.sensitivity[:, 0], table.interactions.value[0]
    >>> bool(abs(s[0] - s[1]) < 1e-9), round(float(pair / s.sum()), 6)
    (True, 1.0)
    """

    needs: ClassVar[frozenset[Quantity]] = frozenset({"projection"})

    draws: int = 2
    seed: int = 0
    shrink: float = 0.5
    token_weights: TokenWeights | None = None

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise EstimatorError(f"draws={self.draws}: expected 1 or more")
        if not 0 <= self.shrink <= 1:
            raise EstimatorError(f"shrink={self.shrink}: expected a number from 0 to 1")

    def accumulator(self, context: Context) -> Accumulator:
        """Means of squares, and of all products."""
        cells = len(context.decisions) * len(context.precisions)
        if cells > MOST_CELLS:
            raise EstimatorError(
                f"{len(context.decisions)} decisions x {len(context.precisions)} precisions are {cells} cells: the matrix of their pairs "
                f"takes {amounts.text('memory_bytes', 8 * cells**2)}, at most {MOST_CELLS} cells are taken; give fewer layers or precisions"
            )
        return _Pairs(context, self.gradient_target(context).draws, self.shrink)


@dataclass(eq=False)
class _Pairs:
    context: Context
    draws: int
    shrink: float
    predictions: float = 0.0
    products: Tensor = field(default_factory=lambda: torch.zeros(0))

    def __post_init__(self) -> None:
        self.squares = Averages(
            lambda gradients: 0.5 * gradients.projection.square(),
            lambda mean, se: Estimate(mean, se, self.context.unit),
            self.draws,
        )

    def add(self, gradients: Gradients) -> None:
        self.squares.add(gradients)
        p = gradients.projection.flatten(1)
        now = (p.T @ p / self.draws).cpu()
        self.products = self.products + now if self.products.numel() else now
        if gradients.draw == 0:
            self.predictions += float(gradients.counts.sum())

    def state(self) -> Any:
        return {"squares": self.squares.state(), "products": self.products, "predictions": self.predictions}

    def restore(self, state: Any) -> None:
        self.squares.restore(state["squares"])
        self.products, self.predictions = state["products"], state["predictions"]

    def finish(self) -> Estimate:
        plain = self.squares.finish()
        shape = (len(self.context.decisions), len(self.context.precisions))
        pairs = (1 - self.shrink) * self.products.double().numpy().reshape(*shape, *shape)
        pairs = pairs / (self.predictions or math.nan)
        return Estimate(plain.sensitivity, plain.sensitivity_se, plain.unit, {}, np.ascontiguousarray(pairs))
