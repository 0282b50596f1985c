"""One perturbation of a model, and what the model then says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from mpsearch.metrics.runs import Rows

#: Number of a decision, and name of a perturbation of it.
ProbeKey = tuple[int, str]


@dataclass(frozen=True, eq=False)
class Output(Rows):
    """What the model says of one batch."""

    @property
    def logits(self) -> Tensor:
        """(N, C), one row for each prediction that counts; with a head all of them are made, at each look."""
        return self.rows


@dataclass(frozen=True)
class Perturbation:
    """What is put into the model: weights, and functions through which inputs pass.

    Attributes:
        weights: parameter -> makes what is put in its place; called while the parameter holds its values.
        inputs: module -> function of its input.
    """

    weights: Mapping[nn.Parameter, Callable[[], Tensor]]
    inputs: Mapping[nn.Module, Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Probe:
    """One perturbation of one decision.

    Attributes:
        decision: number of the decision.
        name: of the perturbation, unique within the decision: `w4`, `masked`.
        perturbation: makes it; called when its turn comes, so that one is held at a time.
    """

    decision: int
    name: str
    perturbation: Callable[[], Perturbation]


class ProbeReader(Protocol):
    """Reads probes: an estimator of one perturbation at a time (`mpsearch.estimation.perturbation.OneAtATime`)."""

    def by_rows(self, context: Any) -> bool:
        """True where damage and weight of a prediction come from its own row alone."""
        ...

    def damage(self, context: Any, probe: Probe, reference: Output, output: Output) -> Tensor:
        """(N,) damage of each prediction, or one number for the batch."""
        ...

    def weights(self, context: Any, reference: Output) -> Tensor | None:
        """(N,) what each prediction weighs in the mean; None: alike."""
        ...
