"""The angle between the output and the unquantized one."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.metrics.metric import Comparison, by_sample
from mpsearch.metrics.statistics import wide


@dataclass(frozen=True)
class Cosine(Comparison):
    """One minus the cosine between the output of a sample and the unquantized one, all its numbers taken as one vector.

    Blind to a change of length. Two zero vectors are at distance 0, one zero vector and another at 1.

    >>> values, _ = Cosine().terms(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.zeros(1).long(), 1)
    >>> round(float(values), 4)                                # 1 - 1 / sqrt(2)
    0.2929
    """

    name: ClassVar[str] = "cosine"
    unit: ClassVar[str] = "cosine distance"

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) shares of the distance of each sample, and shares of 1."""
        before, after = wide(reference), wide(rows)
        (a, zero), (b, gone) = _directions(before, index, count), _directions(after, index, count)
        share = (1 / torch.bincount(index, minlength=count).clamp(min=1).to(before))[index]
        # 1 - cos = |a - b|^2 / 2: no cancellation for small angles
        return torch.where((zero ^ gone)[index], share, (a - b).square().sum(-1) / 2), share

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """What is at right angles to the sample's output, over its length."""
        before = wide(reference)
        a, _ = _directions(before, index, count)
        along = by_sample((a * values).sum(-1), index, count)
        return (values - a * along[index, None]) / _length(before, index, count)[index, None]


def _length(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """(count,) length of the vector of each sample; tiny, not 0, for a zero vector."""
    return by_sample(rows.square().sum(-1), index, count).clamp(min=torch.finfo(rows.dtype).tiny).sqrt()


def _directions(rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N, C) rows over the length of their sample's vector, and (count,) whether that is zero."""
    return rows / _length(rows, index, count)[index, None], by_sample((rows != 0).sum(-1), index, count) == 0
