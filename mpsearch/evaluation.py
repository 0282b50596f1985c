"""What `evaluate` measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """Measured quality of a plan on held-out data, each mean with its standard error over samples.

    Attributes:
        kl: mean KL divergence from the unquantized model, nats a prediction.
        kl_se: its standard error.
        loss: mean loss (cross-entropy, nats a prediction, or the user's own); None without labels and loss.
        loss_se: its standard error.
        accuracy: share of predictions equal to their label; None without labels.
        accuracy_se: its standard error.
        metric: mean of the user's metric; None without one.
        metric_se: its standard error.
        num_samples: samples measured.
        reference: the same for the unquantized model; None in the reference itself.
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

    def _repr_html_(self) -> str:
        from mpsearch.html import display

        return display.evaluation(self)
