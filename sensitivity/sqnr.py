"""Quantization noise relative to the signal in the output when one layer is quantized."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.statistics import wide


@dataclass(frozen=True)
class SQNR(OneAtATime):
    """Noise-to-signal power ratio of the logits, one decision quantized (AIMET AMP; MixDQ, 2405.17873, section 3.2).

        sensitivity(l, o) = mean over predictions of |z_with l at o - z|^2 / mean over the batch of |z|^2   [relative]

    It is 10^(-SQNR/10) with the SQNR in decibels that those tools maximize: decibels cannot be added over layers,
    powers can. Cost as `KLDivergence`.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    >>> _ = torch.nn.init.constant_(model[0].weight, 10.0)
    >>> shift = lambda weight, precision: weight + 1
    >>> mps.profile(model, [torch.ones(1, 1)], SQNR(), mps.precisions("w4"), quantizer=shift).sensitivity  # 1 / 100: 20 dB
    array([[0.01]])
    """

    unit: ClassVar[str] = "relative"

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) noise of each prediction over the signal of the batch."""
        signal = wide(reference.logits)
        power = signal.square().sum(-1).mean()
        return (wide(output.logits) - signal).square().sum(-1) / power.clamp(min=1e-300)
