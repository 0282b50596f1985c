"""Metrics with the targets of the data: the loss, and the accuracy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError
from mpsearch.metrics.divergences import KL, BernoulliKL, logits
from mpsearch.metrics.metric import Comparison, Floats, Kind, Metric, summed
from mpsearch.metrics.pieces import by_pieces
from mpsearch.metrics.runs import Run, target_rows
from mpsearch.metrics.squared_errors import MSE
from mpsearch.metrics.statistics import cross_entropy, wide
from mpsearch.models.data.batches import missing_labels
from mpsearch.models.running import Batch, device_of, inputs_of, moved


@dataclass(frozen=True)
class Loss(Metric):
    """The loss with the targets of the data, by what they are.

    The cross-entropy of integer labels; the sum over labels of the binary cross-entropy of 0/1 labels; the mean squared error of
    floating-point targets of the output's shape.

    Attributes:
        kind: of the rows.
        probabilities: the network ends in a softmax or sigmoid.
    """

    kind: Kind = "classes"
    probabilities: bool = False
    name: ClassVar[str] = "loss"

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        """True for classes, whose labels come with their rows."""
        return self.kind == "classes"

    @property
    def unit(self) -> str:  # type: ignore[override]
        """`mse` for numbers, nats for classes and labels."""
        return "mse" if self.kind == "numbers" else "nats"

    def rows(self, rows: Tensor) -> Tensor:
        """(N, C) logits, or the numbers."""
        return logits(self.kind, rows) if self.probabilities else rows

    @property
    def comparison(self) -> Comparison:
        """With the unquantized output: what the loss rises by where the targets are drawn from the model's own predictions."""
        if self.kind == "numbers":
            return MSE()
        return KL(self.probabilities) if self.kind == "classes" else BernoulliKL(self.probabilities)

    def targets(self, model: nn.Module, batch: Batch, run: Run) -> Tensor | None:
        """(N,) integer labels, or (N, C) numbers; None where the batch has none that fit."""
        return run.labels if self.kind == "classes" else target_rows(model, batch, run)

    def values(self, rows: Tensor, targets: Tensor) -> Tensor:
        """(N,) loss of each prediction from what `rows` and `targets` give; can be differentiated."""
        if self.kind == "classes":
            return cross_entropy(rows, targets)
        if self.kind == "labels":
            return by_pieces(_binary_cross_entropy, rows, targets)
        return by_pieces(lambda y, target: (wide(y) - wide(target)).square().mean(-1), rows, targets)

    def of(self, model: nn.Module, batch: Batch, run: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """See `Metric.of`."""
        assert run is not None
        values = self.values(self.rows(run.rows), _needed(self.targets(model, batch, run), batch, "loss"))
        return summed(values, torch.ones_like(values), run.index, run.samples)


@dataclass(frozen=True)
class Accuracy(Metric):
    """The share of predictions that are right; of 0/1 labels, the mean share of labels that are. Shown as it is, measured as its drop.

    Attributes:
        kind: of the rows.
        probabilities: the network ends in a sigmoid: a label is told at one half.
    """

    kind: Kind = "classes"
    probabilities: bool = False
    name: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "relative"

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        """True for classes, whose labels come with their rows."""
        return self.kind == "classes"

    def of(self, model: nn.Module, batch: Batch, run: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """See `Metric.of`."""
        assert run is not None
        if self.kind == "labels":
            targets = _needed(target_rows(model, batch, run), batch, "accuracy")
            least = 0.5 if self.probabilities else 0.0
            right = by_pieces(lambda y, target: ((y > least) == (target > 0.5)).double().mean(-1), run.rows, targets)
        else:
            right = (run.rows.argmax(-1) == _needed(run.labels, batch, "accuracy")).double()
        return summed(-right, torch.ones_like(right), run.index, run.samples)

    @property
    def shown_unit(self) -> str:
        """`accuracy`, a share of predictions."""
        return "accuracy"

    def shown(self, value: float) -> float:
        """The share that is right: the mean is that of its negative."""
        return 0.0 - value


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model of transformers computes itself from the batch's `labels`.

    Raises:
        EstimatorError: where it returns none.
    """
    inputs = {**inputs_of(batch), "labels": batch["labels"]}
    loss = getattr(model(**moved(inputs, device_of(model))), "loss", None)
    if not isinstance(loss, Tensor):
        raise EstimatorError(f"{type(model).__name__} returns no loss for batches with labels")
    return loss


def _binary_cross_entropy(rows: Tensor, targets: Tensor) -> Tensor:
    binary = torch.nn.functional.binary_cross_entropy_with_logits
    return binary(wide(rows), wide(targets), reduction="none").sum(-1)


def _needed(targets: Tensor | None, batch: Batch, metric: str) -> Tensor:
    if targets is None:
        raise EstimatorError(
            f"the {metric} needs labels that fit the output, the batch has {missing_labels(batch)}; give (inputs, targets), or the "
            "metric 'kl'"
        )
    return targets
