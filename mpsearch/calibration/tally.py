"""All that `mps.evaluate` tells of one model, added up batch by batch."""

import math

import torch
from torch import nn

from mpsearch.core.evaluation import Evaluation
from mpsearch.estimation.context import Loss
from mpsearch.metrics.choice import MetricChoice
from mpsearch.metrics.divergences import KL
from mpsearch.metrics.metric import Floats, Metric, measured
from mpsearch.metrics.own import Own
from mpsearch.metrics.runs import Run
from mpsearch.metrics.statistics import Mean
from mpsearch.metrics.targets import Loss as TargetLoss
from mpsearch.models.running import Batch


class Tally:
    """Means over batches of one model, quantized or not: what a loop over plans reads (`mpsearch.calibration.plan_runs.Reader`).

    Args:
        choice: of the metric; those that go with it (KL of class scores, loss and accuracy where there are targets) are measured too.
        loss: of one's own, in place of that with the data's targets.
    """

    def __init__(self, choice: MetricChoice, loss: Loss | None = None) -> None:
        self._choice = choice
        along = [
            KL(choice.reading.softmax) if choice.reading.kind == "classes" else None,
            choice.loss if loss is None else Own(loss, title="loss"),
            choice.accuracy,
        ]
        self._metrics: dict[str, Metric] = {metric.title: metric for metric in along if metric is not None}
        title = choice.metric.title
        self._metrics[title if title in ("kl", "loss", "accuracy") else "metric"] = choice.metric
        self._means = {name: Mean() for name in self._metrics}
        self._samples = 0

    @property
    def runs_model(self) -> bool:
        """False: runs are handed in, also where the metric makes further ones itself."""
        return False

    @property
    def reads_output(self) -> bool:
        """True where a metric looks at all that the model returns."""
        return any(metric.reads_output for metric in self._metrics.values())

    def damage(self, sums: Floats, unquantized: Floats) -> Floats:
        """(n,) the rise of the chosen metric over the unquantized model."""
        return self._choice.metric.damage(sums, unquantized)

    def read(
        self, model: nn.Module, batch: Batch, outcome: Run | None, reference: Run | None
    ) -> tuple[Floats, Floats] | None:
        """Add one batch.

        Args:
            model: as it stands; run again for a metric or a loss of one's own.
            batch: the batch.
            outcome: what the model makes of it.
            reference: what the unquantized model makes of it; None where this is it.

        Returns:
            (n,) sums and (n,) weights of the samples by the chosen metric; None where the output is not finite.
        """
        assert outcome is not None
        for name, metric in list(self._metrics.items()):
            along = name in ("loss", "accuracy") and metric is not self._choice.metric and not isinstance(metric, Own)
            if along and self._missing(model, batch, outcome):  # in some batches: then there is no mean
                del self._metrics[name], self._means[name]
        found = measured(list(self._metrics.values()), model, batch, outcome, reference)
        if found is None:
            return None
        for name, (sums, counts) in zip(self._metrics, found, strict=True):
            self._means[name].add_samples(torch.from_numpy(sums), torch.from_numpy(counts))
        self._samples += outcome.samples
        return found[[metric is self._choice.metric for metric in self._metrics.values()].index(True)]

    def _missing(self, model: nn.Module, batch: Batch, outcome: Run) -> bool:
        with_targets = self._choice.loss
        return not isinstance(with_targets, TargetLoss) or with_targets.targets(model, batch, outcome) is None

    def result(self, reference: Evaluation | None) -> Evaluation:
        """The means."""
        values: dict[str, tuple[float, float]] = {}
        for name, metric in self._metrics.items():
            mean = self._means[name]
            values[name] = metric.shown(mean.value), metric.shown_se(mean.value, mean.se)
        absent: tuple[float | None, float | None] = (None, None)
        kl, kl_se = values.get("kl", (math.nan, math.nan))
        loss, loss_se = values.get("loss", absent)
        accuracy, accuracy_se = values.get("accuracy", absent)
        shown, shown_se = values.get("metric", absent)
        other = self._metrics.get("metric")
        return Evaluation(
            kl,
            kl_se,
            loss,
            loss_se,
            accuracy,
            accuracy_se,
            self._samples,
            shown,
            shown_se,
            reference,
            None if other is None else other.title,
            None if other is None else other.shown_unit,
            self._choice.sentence,
        )
