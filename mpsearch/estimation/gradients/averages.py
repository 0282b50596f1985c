"""What estimators have in common that read gradients at the unquantized model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate, SeededEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.one_pass import Accumulator, one_pass
from mpsearch.estimation.gradients.targets import GradientTarget, TokenWeights
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.statistics import ratio_of_sums, wide


class GradientEstimator:
    """An estimator that reads gradients at the unquantized model.

    Subclasses say what is differentiated (`gradient_target`), what is read of it (`needs`), and what a sample adds
    (`contribution`).

    Attributes:
        needs: quantities of `Gradients` that are read.
        unit: of the table, `relative` or `nats`, which stands for the unit of the loss.
        scores_members: `free` where decisions may overlap: layers of a tie are scored alone too, at no further pass.
    """

    needs: ClassVar[frozenset[Quantity]]
    unit: ClassVar[str] = "nats"
    scores_members: ClassVar[Literal["no", "free", "runs"]] = "no"

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise EstimatorError(f"draws={self.draws}: expected 1 or more")

    @property
    def draws(self) -> int:
        """Random outputs for each prediction: a setting of those that draw them."""
        return 1

    @property
    def token_weights(self) -> TokenWeights | None:
        """Weight of each token in the loss: a setting of those that weigh them."""
        return None

    @property
    def scores_caches(self) -> bool:
        """True where it reads what a perturbed input does: a cache of keys or values has nothing else."""
        return bool(self.needs & {"projection", "output", "input_squared_norm"})

    @staticmethod
    def together(context: Context, estimators: Sequence[Any]) -> list[Estimate]:
        """Score for several estimators of this kind in one sweep."""
        return one_pass(context, estimators)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where labels that are needed are missing, the model cannot be differentiated, or a
                gradient is not finite.
        """
        return one_pass(context, [self])[0]

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward and backward passes over the data, at most, whatever the number of decisions and precisions.

        The second forward pass is taken only where a precision quantizes activations and its noise has to be
        measured. Not counted: the one backward pass that tells samples from tokens where shapes leave doubt.
        """
        noise = "input_squared_norm" in self.needs or self.unit == "relative"
        return Passes(2 if noise else 1, self.draws)

    def gradient_target(self, context: Context) -> GradientTarget:
        """What is differentiated: by default random outputs for a metric that compares outputs, else the loss itself."""
        if isinstance(context.loss, Comparison):
            seed = self.seed if isinstance(self, SeededEstimator) else 0
            return GradientTarget("gauss-newton", self.draws, seed, self.token_weights)
        return GradientTarget("given", token_weights=self.token_weights)

    def accumulator(self, context: Context) -> Accumulator:
        """By default the means of the contributions with their standard errors."""
        return Averages(
            self.contribution(context),
            lambda mean, se: self.finish(context, mean, se),
            self.gradient_target(context).draws,
        )

    def contribution(self, context: Context) -> Callable[[Gradients], Tensor]:
        """A function that gives (N, D, ...), what each sample adds, summed over its predictions."""
        raise NotImplementedError

    def finish(self, context: Context, mean: NDArray[np.float64], se: NDArray[np.float64]) -> Estimate:
        """By default the mean contribution of a prediction is the score."""
        return Estimate(mean, se, "relative" if self.unit == "relative" else context.unit)


@dataclass(eq=False)
class Averages:
    """Means a prediction, with standard errors that take the draws and predictions of one sample as one (see `measure.Mean`)."""

    contribution: Callable[[Gradients], Tensor]
    conclude: Callable[[NDArray[np.float64], NDArray[np.float64]], Estimate]
    draws: int
    samples: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))
    pending: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, gradients: Gradients) -> None:
        """Add what one backward pass gives; the draws of a sample are averaged before they are squared."""
        added = wide(self.contribution(gradients))
        self.pending = added if gradients.draw == 0 else self.pending + added
        if gradients.draw + 1 < self.draws:
            return
        s = self.pending / self.draws
        c = gradients.counts.to(s).reshape(-1, *[1] * (s.ndim - 1)).expand_as(s)
        self.samples += int((gradients.counts > 0).sum())
        new = torch.stack([term.sum(0) for term in (s, s * s, s * c, c, c * c)]).cpu()
        self.sums = self.sums + new if self.sums.numel() else new

    def state(self) -> Any:
        """The sums."""
        return {"samples": self.samples, "sums": self.sums}

    def restore(self, state: Any) -> None:
        """The sums."""
        self.samples, self.sums = state["samples"], state["sums"]

    def finish(self) -> Estimate:
        """The estimate from means and standard errors: see `mpsearch.metrics.statistics.ratio_of_samples`."""
        return self.conclude(*ratio_of_sums(self.samples, *self.sums.numpy()))
