"""Divergences between two predictions: of classes that exclude each other, and of 0/1 labels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.metrics.metric import Comparison, Kind
from mpsearch.metrics.pieces import by_pieces
from mpsearch.metrics.seeds import Draw
from mpsearch.metrics.statistics import cross_entropy, kl_divergence, log_softmax, wide


def logits(kind: Kind, rows: Tensor) -> Tensor:
    """(N, C) logits of rows of probabilities: their logarithm, or that of p / (1 - p); extremes are moved by one rounding.

    >>> logits("labels", torch.tensor([[0.5, 0.75]])).exp().round(decimals=6)
    tensor([[1., 3.]], dtype=torch.float64)
    """
    p = wide(rows)
    tiny = torch.finfo(rows.dtype).tiny
    if kind == "classes":
        return p.clamp(min=tiny).log()
    return p.clamp(min=tiny).log() - (1 - p).clamp(min=torch.finfo(rows.dtype).eps / 2).log()


@dataclass(frozen=True)
class Divergence(Comparison):
    """A Kullback-Leibler divergence from the unquantized prediction, in nats.

    Attributes:
        probabilities: the network returns probabilities already; their logits are taken.
        taken: what those logits are called.
    """

    probabilities: bool = False
    unit: ClassVar[str] = "nats"
    by_rows: ClassVar[bool] = True
    taken: ClassVar[str]

    def rows(self, rows: Tensor) -> Tensor:
        """(N, C) logits."""
        return logits(self.kind, rows) if self.probabilities else rows

    def weights(self, reference: Tensor, index: Tensor, count: int) -> Tensor:
        """(N,) of 1."""
        return wide(reference.new_ones(len(index)))


@dataclass(frozen=True)
class KL(Divergence):
    """KL divergence from the unquantized prediction over classes that exclude each other.

        sum_c p_c (log p_c - log q_c),   p = softmax(unquantized), q = softmax(output)   [nats]

    Blind to a common shift of all outputs, as the predictions are.

    Of a network that ends in a softmax the logarithm is taken.
    """

    name: ClassVar[str] = "kl"
    kind: ClassVar[Kind] = "classes"
    taken: ClassVar[str] = "logarithms"

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) divergences."""
        values = kl_divergence(reference, rows)
        return values, torch.ones_like(values)

    def _random_rows(self, rows: Tensor, index: Tensor, count: int, draw: Draw) -> Tensor:
        """sqrt(p) z - p <sqrt(p), z> with random signs z, of covariance diag(p) - p p^T."""
        p = log_softmax(rows).exp()
        noise = p.sqrt() * draw.signs(draw.own, *p.shape).to(p)
        return noise - p * noise.sum(1, keepdim=True)

    def drawn(self, rows: Tensor, index: Tensor, count: int, draw: Draw) -> Tensor:
        """-log p(y), labels y drawn from the model's own predictions."""
        uniform = torch.rand(len(rows), 1, generator=draw.own, dtype=torch.float64)
        labels = by_pieces(_labels, rows.detach(), uniform.to(wide(rows[:1])))
        return cross_entropy(rows, labels).sum()


def _labels(rows: Tensor, uniform: Tensor) -> Tensor:
    """(N,) classes that (N, 1) numbers from 0 to 1 pick from softmax(rows)."""
    p = log_softmax(rows).exp()
    return (p.cumsum(1) < uniform * p.sum(1, keepdim=True)).sum(1).clamp(max=p.shape[1] - 1)


@dataclass(frozen=True)
class BernoulliKL(Divergence):
    """KL divergence of 0/1 labels that do not exclude each other: the sum over the labels of a prediction.

        sum_c p_c log(p_c / q_c) + (1 - p_c) log((1 - p_c) / (1 - q_c)),   p = sigmoid(unquantized)   [nats]

    Of a network that ends in a sigmoid the logits are taken.

    >>> values, _ = BernoulliKL().terms(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), torch.zeros(1).long(), 1)
    >>> values                                                  # ln 2 - ln(3) / 2, as of two classes
    tensor([0.1438], dtype=torch.float64)
    """

    name: ClassVar[str] = "bernoulli-kl"
    kind: ClassVar[Kind] = "labels"
    taken: ClassVar[str] = "logits"

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) divergences."""
        values = by_pieces(_bernoulli_divergence, reference, rows)
        return values, torch.ones_like(values)

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """sqrt(p (1 - p)) times values."""
        a = wide(reference)
        return (a.sigmoid() * (-a).sigmoid()).sqrt() * values

    def drawn(self, rows: Tensor, index: Tensor, count: int, draw: Draw) -> Tensor:
        """-log p(y), labels y drawn from the model's own predictions."""
        a = wide(rows)
        uniform = torch.rand(a.shape, generator=draw.own, dtype=torch.float64).to(a)
        labels = (uniform < a.detach().sigmoid()).to(a)
        return torch.nn.functional.binary_cross_entropy_with_logits(a, labels, reduction="sum")


def _bernoulli_divergence(reference: Tensor, rows: Tensor) -> Tensor:
    a, b = wide(reference), wide(rows)
    log = torch.nn.functional.logsigmoid
    return (a.sigmoid() * (log(a) - log(b)) + (-a).sigmoid() * (log(-a) - log(-b))).sum(-1)
