"""Means with standard errors over samples, and the divergence of two predictions."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.metrics.pieces import by_pieces

Floats = NDArray[np.float64]


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(p_reference || p) of each prediction, in nats: sum_c p_ref (log p_ref - log p).

    Args:
        reference: (N, C) logits of the unquantized model.
        logits: (N, C) logits to compare.

    Returns:
        (N,) float64 on the CPU and CUDA, float32 where the device has no float64; 0 exactly for equal logits.

    >>> kl_divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]]))  # ln 2 - ln(3) / 2
    tensor([0.1438], dtype=torch.float64)
    """
    return by_pieces(_kl_divergence, reference, logits)


def _kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    log_p, log_q = log_softmax(reference), log_softmax(logits)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of each prediction, in nats.

    Args:
        logits: (N, C).
        labels: (N,) int64, 0 to C - 1.

    Returns:
        (N,) in the widest float of the device.

    Raises:
        EstimatorError: for labels that are no output of the model.
    """
    outputs = logits.shape[-1]
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= outputs):
        raise EstimatorError(
            f"labels from {int(labels.min())} to {int(labels.max())}, but the model has {outputs} outputs: expected 0 to {outputs - 1}"
        )
    return by_pieces(lambda rows, right: -log_softmax(rows).gather(-1, right[:, None])[:, 0], logits, labels)


def wide(x: Tensor) -> Tensor:
    """A tensor in the widest float of its device: float64, but float32 where there is none."""
    return x.float() if x.device.type == "mps" else x.double()


def log_softmax(logits: Tensor) -> Tensor:
    """Log softmax over the last dimension in the widest float of the device.

    Raises:
        EstimatorError: for one number a prediction, as of regression, whose softmax is 1 whatever the model says.
    """
    if logits.shape[-1] == 1:
        raise EstimatorError(
            "the model gives one number a prediction, where the KL and the cross-entropy are always 0; give loss=function(model, batch) "
            "to an estimator that differentiates, or take one that compares outputs, such as OutputMSE"
        )
    return torch.log_softmax(wide(logits), -1)


def ratio_of_samples(s: Floats, c: Floats) -> tuple[float, float]:
    """Mean of a quantity over predictions, and a standard error that treats the predictions of one sample as one draw.

    With sums s_i and counts c_i of the predictions of sample i (ratio estimator; Cochran 1977, section 6.3)

        mean = sum s / sum c,   se = sqrt(n / (n - 1) sum (s_i - mean c_i)^2) / sum c

    Args:
        s: (n,).
        c: (n,); a sample without a prediction and with a sum of 0 does not count.

    Returns:
        The mean, nan without any prediction; and its standard error, nan with fewer than two samples.

    >>> ratio_of_samples(np.array([1.0, 3.0]), np.array([1.0, 1.0]))
    (2.0, 1.0)
    """
    if not c.any():
        return math.nan, math.nan
    total = c.sum()
    mean = s.sum() / total
    used = (c > 0) | (s != 0)
    squares = ((s - mean * c)[used] ** 2).sum()
    return float(mean), float(_ratio_se(int(used.sum()), squares, total))


def ratio_of_sums(samples: int, s: Any, ss: Any, sc: Any, c: Any, cc: Any) -> tuple[Floats, Floats]:
    """`ratio_of_samples` from sums over the samples, where these are not kept; of many quantities at once where the sums are arrays.

    sum (s_i - mean c_i)^2 = sum s^2 - 2 mean sum s c + mean^2 sum c^2, which loses digits where samples are nearly alike.

    Args:
        samples: n, those with a prediction.
        s: sum of s_i, a number or an array.
        ss: sum of s_i^2.
        sc: sum of s_i c_i.
        c: sum of c_i.
        cc: sum of c_i^2.

    >>> mean, se = ratio_of_sums(2, 4.0, 10.0, 4.0, 2.0, 2.0)     # of the samples 1 and 3
    >>> float(mean), float(se)
    (2.0, 1.0)
    """
    s, c = np.asarray(s, np.float64), np.asarray(c, np.float64)
    mean = np.divide(s, c, out=np.full(s.shape, math.nan), where=c != 0)
    squares = np.maximum(ss - 2 * mean * sc + mean * mean * cc, 0.0)
    return mean, np.asarray(_ratio_se(samples, squares, c))


def _ratio_se(samples: int, squares: Any, count: Any) -> Any:
    """Standard error from the sum of squared residuals."""
    if samples < 2:
        return np.full(np.shape(squares), math.nan)
    return np.sqrt(samples / (samples - 1) * squares) / count


@dataclass
class Mean:
    """Mean of a quantity over predictions, added up batch by batch, with its standard error: see `ratio_of_samples`.

    >>> m = Mean()
    >>> m.add(torch.tensor([1.0, 3.0]), torch.tensor([0, 1]), 2)
    >>> m.value, m.se
    (2.0, 1.0)
    """

    samples: int = 0
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def add(self, values: Tensor, index: Tensor, samples: int, weights: Tensor | None = None) -> None:
        """Add the predictions of one batch.

        Args:
            values: (N,) the quantity at each prediction.
            index: (N,) sample of each prediction, 0 to samples - 1.
            samples: number of samples of the batch.
            weights: (N,) what takes the place of the count of predictions; by default 1 each.
        """
        weights = torch.ones_like(values) if weights is None else weights
        index = index.to("cpu")
        s, c = (
            torch.zeros(samples, dtype=torch.float64).index_add_(0, index, part.detach().to("cpu", torch.float64))
            for part in (values, weights)
        )
        self.add_samples(s, c)

    def add_samples(self, s: Tensor, c: Tensor) -> None:
        """Add samples by their sums (n,) and counts (n,), float64 on the CPU."""
        self.samples += int(((c > 0) | (s != 0)).sum())
        for place, term in enumerate((s, s * s, s * c, c, c * c)):
            self._sums[place] += float(term.sum())

    def merge(self, other: "Mean") -> None:
        """Add all that another mean has seen."""
        self.samples += other.samples
        self._sums = [a + b for a, b in zip(self._sums, other._sums, strict=True)]

    @property
    def value(self) -> float:
        """The mean over all predictions; nan without any."""
        return self._ratio()[0]

    @property
    def se(self) -> float:
        """Standard error of the mean; nan with fewer than two samples."""
        return self._ratio()[1]

    def _ratio(self) -> tuple[float, float]:
        if not self._sums[3]:
            return math.nan, math.nan
        mean, se = ratio_of_sums(self.samples, *self._sums)
        return float(mean), float(se)

    def state(self) -> list[float]:
        """The sums, to write to a file and read back by `restored`."""
        return [float(self.samples), *self._sums]

    @classmethod
    def restored(cls, state: list[float]) -> "Mean":
        """The mean that `state` was taken from."""
        return cls(int(state[0]), list(state[1:]))
