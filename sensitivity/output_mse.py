"""Squared error of the output when one layer is quantized."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.pieces import by_pieces
from mpsearch.metrics.statistics import wide


@dataclass(frozen=True)
class OutputMSE(OneAtATime):
    """Mean squared error of the logits, one decision quantized and all else left alone.

        sensitivity(l, o) = mean over predictions and classes of (z_with l at o - z)^2   [relative]

    Noise powers of independent errors add, so the sum over layers means something. Cost as `KLDivergence`.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = torch.nn.init.constant_(model[0].weight, 1.0)
    >>> shift = lambda weight, precision: weight + torch.tensor([[2.0], [0.0]])
    >>> mps.profile(model, [torch.ones(1, 1)], OutputMSE(), mps.precisions("w4"), quantizer=shift).sensitivity  # (2^2 + 0) / 2
    array([[2.]])
    """

    scores_members: ClassVar[Literal["no", "free", "runs"]] = "runs"
    unit: ClassVar[str] = "relative"

    def by_rows(self, context: Context) -> bool:
        """True."""
        return True

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) squared error of each prediction."""
        return by_pieces(
            lambda before, after: (wide(after) - wide(before)).square().mean(-1), reference.logits, output.logits
        )
