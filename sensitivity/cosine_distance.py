"""Angle between the outputs before and after quantizing one layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.pieces import by_pieces
from mpsearch.metrics.statistics import wide


@dataclass(frozen=True)
class CosineDistance(OneAtATime):
    """One minus the cosine between the logits before and after, one decision quantized (as in Sony MCT and NNCF).

        sensitivity(l, o) = mean over predictions of 1 - <z, z'> / (|z| |z'|)   [relative]

    Blind to a change of length. Two zero vectors are at distance 0, one zero vector and another at 1. Cost as
    `KLDivergence`.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [0.0]]))
    >>> shift = lambda weight, precision: weight + torch.tensor([[0.0], [1.0]])   # (1, 0) becomes (1, 1)
    >>> table = mps.profile(model, [torch.ones(1, 1)], CosineDistance(), mps.precisions("w4"), quantizer=shift)
    >>> table.sensitivity.round(4)     # 1 - 1 / sqrt(2)
    array([[0.2929]])
    """

    unit: ClassVar[str] = "relative"

    def by_rows(self, context: Context) -> bool:
        """True: the angle is that of a prediction."""
        return True

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) distance of each prediction."""
        return by_pieces(_distance, reference.logits, output.logits)


def _distance(reference: Tensor, logits: Tensor) -> Tensor:
    before, after = wide(reference), wide(logits)
    # 1 - cos = |a/|a| - b/|b||^2 / 2: no cancellation for small angles
    a, b = (z / z.norm(dim=-1, keepdim=True).clamp(min=1e-300) for z in (before, after))
    distance = (a - b).square().sum(-1) / 2
    zeros = (before == 0).all(-1) ^ (after == 0).all(-1)
    return torch.where(zeros, torch.ones_like(distance), distance)
