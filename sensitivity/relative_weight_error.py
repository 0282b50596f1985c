"""Relative quantization error: the baseline that needs no data."""

from dataclasses import dataclass

from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.relative_error import relative_error


@dataclass(frozen=True)
class RelativeWeightError:
    """Squared quantization error over squared size (as NNCF's data-free criterion; the t^2 of HIGGS, 2411.17525).

        sensitivity(l, o) = ||Q(W) - W||^2 / ||W||^2   [relative]

    Knows nothing of what a layer does for the output: a baseline that any other signal must beat. Precisions that
    quantize activations add ||Q(a) - a||^2 / ||a||^2, at one forward pass.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    >>> _ = torch.nn.init.constant_(model[0].weight, 2.0)
    >>> add = lambda weight, precision: weight + 1
    >>> mps.profile(model, [torch.ones(1, 1)], RelativeWeightError(), mps.precisions("w4"), quantizer=add).sensitivity  # 1 / 4
    array([[0.25]])
    """

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`."""
        return Estimate(relative_error(context), None, "relative")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """No passes; one forward where activations are quantized."""
        return Passes(1.0, 0.0)
