"""What `evaluate` measures."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from mpsearch.core import printing, shown


@dataclass(frozen=True)
class Evaluation:
    """Measured quality of a plan on held-out data, each mean with its standard error over samples.

    Attributes:
        kl: mean KL divergence from the unquantized model, nats a prediction; nan where the output is no scores of classes.
        kl_se: its standard error.
        loss: mean loss (by the targets, or the user's own); None without targets that fit and loss.
        loss_se: its standard error.
        accuracy: share of predictions equal to their label; None without labels.
        accuracy_se: its standard error.
        metric: mean of another metric, or of the user's; None without one. One that compares with the unquantized model is 0
            (`psnr`: infinite) for the unquantized model.
        metric_se: its standard error.
        num_samples: samples measured.
        reference: the same for the unquantized model; None in the reference itself.
        metric_name: `relative-error`, `mse`, ... or `metric` for one's own; None without one.
        metric_unit: its unit.
        measured: the metric and why it is that one, in words.
    """

    kl: float
    kl_se: float
    loss: float | None
    loss_se: float | None
    accuracy: float | None
    accuracy_se: float | None
    num_samples: int
    metric: float | None = None
    metric_se: float | None = None
    reference: "Evaluation | None" = None
    metric_name: str | None = None
    metric_unit: str | None = None
    measured: str = ""

    @property
    def kinds(self) -> list[tuple[str, str, Callable[..., str]]]:
        """What was measured, what plans are judged by first: its attribute, its title with unit, and how a value of it is written."""
        name, unit = self.metric_name or "metric", self.metric_unit
        title = (
            name
            if unit in (None, name)
            else str(unit)
            if unit.startswith(name.replace("-", " "))
            else f"{name} [{unit}]"
        )
        kl = [] if math.isnan(self.kl) else [("kl", "KL [nats]", printing.damage)]
        others = [("loss", "loss", printing.damage), ("accuracy", "accuracy", printing.percent)]
        own = [("metric", title, printing.damage)]
        every = kl + others + own if kl else own + others
        return [kind for kind in every if getattr(self, kind[0]) is not None]

    def _repr_html_(self) -> str:
        return shown.html().evaluation(self)
