"""|gradient x weight| of a layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.averages import GradientEstimator
from mpsearch.estimation.gradients.backward_pass import Gradients, Quantity
from mpsearch.estimation.gradients.targets import TokenWeights
from mpsearch.estimation.relative_error import cells_from_scores


@dataclass(frozen=True)
class GradientImportance(GradientEstimator):
    """Importance |g w| of the weights of a layer, times its relative quantization error (gradient-based PTQ, 2308.07662).

        sensitivity(l, o) = mean over predictions of sum over elements |grad_w T w|  x  ||Q_o(W) - W||^2 / ||W||^2   [relative]

    T is that of `FisherProjection`: <u, logits> with random u for the loss `kl`, else the loss. The paper ranks
    channels and neurons; the sum over the layer and the bit axis are choices made here (its criterion could not be
    checked). One forward and `draws` backward passes; the standard error is over samples and their draws.

    Attributes:
        draws: of u for each prediction.
        seed: of the draws.
        token_weights: `function(model, batch)` returns (B, T) importance of tokens of mean 1 (RSQ, 2503.01820), or
            None.

    Two equal logits w x: p = 1/2, the cross-entropy's gradients are +-1/2 whatever the label:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [1.0]]))
    >>> double = lambda weight, precision: 2 * weight                    # relative error 1
    >>> batch = (torch.ones(2, 1), torch.tensor([0, 1]))
    >>> mps.profile(model, [batch], GradientImportance(), mps.precisions("w4"), quantizer=double, loss="cross-entropy").sensitivity
    array([[1.]])
    """

    needs: ClassVar[frozenset[Quantity]] = frozenset({"importance"})
    unit: ClassVar[str] = "relative"

    draws: int = 1
    seed: int = 0
    token_weights: TokenWeights | None = None

    def contribution(self, context: Context) -> Callable[[Gradients], Tensor]:
        """(N, D)."""
        return lambda gradients: gradients.importance

    def finish(self, context: Context, mean: NDArray[np.float64], se: NDArray[np.float64]) -> Estimate:
        """The importance of each decision times the relative error of each precision."""
        return cells_from_scores(context, mean, se)
