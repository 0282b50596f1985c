"""The metric of the run when one layer is quantized."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.statistics import Mean


@dataclass(frozen=True)
class OutputDamage(OneAtATime):
    """Measured damage of the output by the metric of the run, one decision quantized, all else left alone (as ZeroQ, 2001.00281).

        sensitivity(l, o) = sum over samples of damage(output with l at o, output) / sum of weights   [unit of the metric]

    The metric is that of `mps.profile(metric=)`, by default what fits the output: for class scores this is `KLDivergence`, with
    `metric="mse"` it is `OutputMSE`, with `relative-error` noise over signal. Cost as `KLDivergence`. The standard error is over samples.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.constant_(model[0].weight, 1.0)
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.5], [0.0]])
    >>> batch = (torch.ones(1, 1), torch.tensor([[1.1, 0.9]]))          # floating-point targets: relative error
    >>> table = mps.profile(model, [batch], OutputDamage(), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity, table.unit                                     # 0.5^2 / (1 + 1)
    (array([[0.125]]), 'relative error')
    """

    def by_rows(self, context: Context) -> bool:
        """As the metric is."""
        return _comparison(context).by_rows

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) damage of each prediction."""
        return self._terms(context, reference, output)[0]

    def weights(self, context: Context, reference: Output) -> Tensor:
        """(N,) weights of the predictions."""
        return self._terms(context, reference, reference)[1]

    def _terms(self, context: Context, reference: Output, output: Output) -> tuple[Tensor, Tensor]:
        return _comparison(context).terms(reference.logits, output.logits, reference.index, reference.samples)

    def finish(self, context: Context, means: Mapping[tuple[int, str], Mean]) -> Estimate:
        """The mean damage of each cell, in the unit of the metric."""
        return replace(super().finish(context, means), unit=_comparison(context).unit)


def _comparison(context: Context) -> Comparison:
    if context.comparison is None:
        raise EstimatorError(
            "OutputDamage compares with the unquantized output, which a loss of one's own does not; take TaskMetric"
        )
    return context.comparison
