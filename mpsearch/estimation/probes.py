"""One perturbation of a model, and what the model then says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mpsearch.metrics.runs import Rows


@dataclass(frozen=True, eq=False)
class Output(Rows):
    """What the model says of one batch."""

    @property
    def logits(self) -> Tensor:
        """(N, C), one row for each prediction that counts; with a head all of them are made, at each look."""
        return self.rows


@dataclass(frozen=True)
class Perturbation:
    """What is put into the model: weights, and functions through which inputs pass."""

    weights: Mapping[nn.Parameter, Tensor]
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
