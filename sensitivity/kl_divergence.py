"""ZeroQ: divergence of the output when one layer is quantized."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.statistics import kl_divergence


@dataclass(frozen=True)
class KLDivergence(OneAtATime):
    """Measured divergence of the output with one decision quantized and all else left alone (ZeroQ, 2001.00281, equation 2).

        sensitivity(l, o) = mean over predictions of KL(p_unquantized || p_with l at o)   [nats]

    A prediction is a sample, or a token of a language model. No labels, no gradients; at most one forward pass a
    cell, none for a cell whose weights already lie on the grid: there the value is 0 exactly. The standard error is
    over samples.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[0.0], [0.0]]))
    >>> shift = lambda weight, precision: weight + torch.tensor([[1.0], [0.0]])   # logits (1, 0)
    >>> table = mps.profile(model, [torch.ones(1, 1)], KLDivergence(), mps.precisions("w4 w16"), quantizer=shift)
    >>> table.sensitivity.round(4)    # ln((1 + e) / 2) - 1/2
    array([[0.1201, 0.    ]])
    """

    scores_members: ClassVar[Literal["no", "free", "runs"]] = "runs"
    unit: ClassVar[str] = "nats"

    def by_rows(self, context: Context) -> bool:
        """True."""
        return True

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) divergence of each prediction."""
        return kl_divergence(reference.logits, output.logits)
