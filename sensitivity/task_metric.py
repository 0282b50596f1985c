"""Any metric of the task, measured with one layer quantized."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.perturbation import OneAtATime
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.pieces import by_pieces
from mpsearch.metrics.statistics import log_softmax
from mpsearch.models.loading import load

#: `metric(logits, labels)`: (N, C) and (N,) or None to (N,) values, one a prediction, or one number for the batch.
Metric = Callable[[Tensor, Tensor | None], Tensor]


def accuracy(logits: Tensor, labels: Tensor | None) -> Tensor:
    """1 where the largest logit is the label's, else 0; (N,)."""
    assert labels is not None
    return (logits.argmax(-1) == labels).double()


def cross_entropy(logits: Tensor, labels: Tensor | None) -> Tensor:
    """-log p(label), in nats; (N,)."""
    assert labels is not None
    return by_pieces(lambda rows, right: -log_softmax(rows).gather(-1, right[:, None])[:, 0], logits, labels)


_NAMED: dict[str, tuple[Metric, bool]] = {"accuracy": (accuracy, True), "cross-entropy": (cross_entropy, False)}


@dataclass(frozen=True)
class TaskMetric(OneAtATime):
    """How much worse a metric of the task gets with one decision quantized and all else left alone (as AIMET AMP, AdaQuant 2006.10518).

        sensitivity(l, o) = mean over predictions of +-(metric(z) - metric(z_with l at o))   [nats for cross-entropy, else relative]

    Signed: a cell that happens to improve the metric is negative, not set to a small positive number as in AdaQuant's
    code. On a trained network such luck does not hold on other data, and plans from signed task losses are among the
    worst measured; prefer `KLDivergence`. The standard error is over samples, or over batches for a metric of a whole
    batch.

    Attributes:
        metric: `accuracy`, `cross-entropy`, `file.py:function`, `module:function`, or `metric(logits, labels)`, which gets (N, C) logits
            and (N,) labels (None without labels) and returns (N,) values or one number for the batch.
        higher_is_better: direction of an own metric; the named ones know theirs.

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [0.0]]))
    >>> flip = lambda weight, precision: weight.flip(0)
    >>> batch = (torch.ones(2, 1), torch.tensor([0, 0]))
    >>> mps.profile(model, [batch], TaskMetric("accuracy"), mps.precisions("w4"), quantizer=flip).sensitivity   # from 1 to 0
    array([[1.]])
    """

    metric: str | Metric = "cross-entropy"
    higher_is_better: bool = False

    def __post_init__(self) -> None:
        self._resolved()

    @property
    def unit(self) -> str:  # type: ignore[override]
        """Nats for the cross-entropy."""
        return "nats" if self.metric == "cross-entropy" else "relative"

    @property
    def needs_labels(self) -> bool:  # type: ignore[override]
        """True for the named metrics."""
        return self.metric in _NAMED

    def _resolved(self) -> tuple[Metric, bool]:
        if callable(self.metric):
            return self.metric, self.higher_is_better
        if self.metric in _NAMED:
            return _NAMED[self.metric]
        return load(self.metric, "metric"), self.higher_is_better

    def by_rows(self, context: Context) -> bool:
        """True for the named metrics."""
        return self.metric in _NAMED

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) or () loss of the metric."""
        metric, higher = self._resolved()
        if self.needs_labels and reference.labels is None:
            raise EstimatorError(
                f"the {self.metric} needs one integer label a prediction; give a function metric(logits, labels)"
            )
        before, after = (
            torch.as_tensor(metric(run.logits, run.labels), dtype=torch.float64) for run in (reference, output)
        )
        if after.shape not in (torch.Size(), torch.Size([len(output.logits)])):
            raise EstimatorError(
                f"the metric returned shape {tuple(after.shape)}, expected () or ({len(output.logits)},)"
            )
        return before - after if higher else after - before
