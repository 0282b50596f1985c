"""Divergences between two predictions: of classes that exclude each other, and of 0/1 labels."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.metrics.metric import Comparison, Kind, drawn_by
from mpsearch.metrics.statistics import kl_divergence, log_softmax, wide


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
    taken: ClassVar[str]

    def rows(self, rows: Tensor) -> Tensor:
        """(N, C) logits."""
        return logits(self.kind, rows) if self.probabilities else rows


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

    def random_output(self, rows: Tensor, index: Tensor, count: int, seed: tuple[int, int], draw: int) -> Tensor:
        """sqrt(p) z - p <sqrt(p), z> with random signs z, of covariance diag(p) - p p^T."""
        p = log_softmax(rows).exp()
        signs = (2 * torch.randint(0, 2, p.shape, generator=drawn_by(seed, draw)) - 1).to(p)
        noise = p.sqrt() * signs
        return noise - p * noise.sum(1, keepdim=True)

    def drawn(self, rows: Tensor, index: Tensor, count: int, seed: tuple[int, int], draw: int) -> Tensor:
        """-log p(y), labels y drawn from the model's own predictions."""
        log_p = log_softmax(rows)
        p = log_p.detach().exp()
        uniform = torch.rand(len(p), 1, generator=drawn_by(seed, draw), dtype=torch.float64).to(p)
        labels = (p.cumsum(1) < uniform * p.sum(1, keepdim=True)).sum(1, keepdim=True).clamp(max=p.shape[1] - 1)
        return -log_p.gather(1, labels).sum()


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
        a, b = wide(reference), wide(rows)
        log = torch.nn.functional.logsigmoid
        values = (a.sigmoid() * (log(a) - log(b)) + (-a).sigmoid() * (log(-a) - log(-b))).sum(-1)
        return values, torch.ones_like(values)

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """sqrt(p (1 - p)) times values."""
        a = wide(reference)
        return (a.sigmoid() * (-a).sigmoid()).sqrt() * values

    def drawn(self, rows: Tensor, index: Tensor, count: int, seed: tuple[int, int], draw: int) -> Tensor:
        """-log p(y), labels y drawn from the model's own predictions."""
        a = wide(rows)
        uniform = torch.rand(a.shape, generator=drawn_by(seed, draw), dtype=torch.float64).to(a)
        labels = (uniform < a.detach().sigmoid()).to(a)
        return torch.nn.functional.binary_cross_entropy_with_logits(a, labels, reduction="sum")
