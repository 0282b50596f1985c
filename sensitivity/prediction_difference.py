"""PD-Quant: divergence of the softened output when one layer is quantized."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.statistics import kl_divergence


@dataclass(frozen=True)
class PredictionDifference(OneAtATime):
    """Divergence of the predictions at a temperature, one decision quantized (PD-Quant, 2212.07048, section 3.2).

        sensitivity(l, o) = mean over predictions of KL(softmax(z / T) || softmax(z_with l at o / T))   [relative]

    The paper uses it to choose scales inside a unit, with T = 4 for ResNets and 1 for MobileNetV2; here it is the
    signal itself. A high temperature looks at all logits alike; at T = 1 it is `KLDivergence`. Cost as there.

    Attributes:
        temperature: T > 0.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0], [0.0]]))
    >>> shift = lambda weight, precision: weight + torch.tensor([[4.0], [0.0]])   # logits (4, 0) / 4 = (1, 0)
    >>> table = mps.profile(model, [torch.ones(1, 1)], PredictionDifference(4.0), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(4)    # ln((1 + e) / 2) - 1/2
    array([[0.1201]])
    """

    unit: ClassVar[str] = "relative"

    temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise EstimatorError(f"temperature={self.temperature}: expected a finite number above 0")

    def by_rows(self, context: Context) -> bool:
        """True."""
        return True

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) divergence of each prediction."""
        return kl_divergence(reference.logits / self.temperature, output.logits / self.temperature)
