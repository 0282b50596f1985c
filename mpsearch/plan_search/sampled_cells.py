"""One perturbation at a time on a part of the samples, so that what the cells take does not grow with their number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.perturbation import OneAtATime, one_at_a_time
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.statistics import Mean
from mpsearch.models.data.splitting import first_samples
from mpsearch.models.running import Batch, samples


@dataclass(frozen=True)
class SampledCells(OneAtATime):
    """What an estimator of one perturbation at a time says of the first samples alone.

    All cells see the same samples, so that most of what these have of their own cancels where cells are compared.

    Attributes:
        estimator: of one perturbation at a time.
        samples: so many are run.
        total: of so many.
    """

    estimator: OneAtATime
    samples: int
    total: int

    @property
    def share(self) -> float:
        """Of the samples."""
        return self.samples / self.total

    @staticmethod
    def together(context: Context, estimators: Sequence[Any]) -> list[Estimate]:
        """Score for several estimators with the same samples, running each probe once."""
        first = estimators[0]
        batches = leading_samples(context.batches, first.samples)
        return one_at_a_time(
            replace(context, batches=batches, passes=_PassesOverPart(share=first.share, over_all=context.passes)),
            estimators,
        )

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`."""
        return self.together(context, [self])[0]

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Forward passes over all samples, at most."""
        # batches of which the samples are a part: one at least, which the estimator runs once more
        return Passes(self.share * self.estimator.cost(1, decisions, precisions).forward, 0)

    def probes(self, context: Context) -> list[Probe]:
        """Those of the estimator."""
        return self.estimator.probes(context)

    def damage(self, context: Context, probe: Probe, reference: Output, output: Output) -> Tensor:
        """See `OneAtATime.damage`."""
        return self.estimator.damage(context, probe, reference, output)

    def by_rows(self, context: Context) -> bool:
        """See `OneAtATime.by_rows`."""
        return self.estimator.by_rows(context)

    def weights(self, context: Context, reference: Output) -> Tensor | None:
        """See `OneAtATime.weights`."""
        return self.estimator.weights(context, reference)

    def finish(self, context: Context, means: Mapping[tuple[int, str], Mean]) -> Estimate:
        """See `OneAtATime.finish`."""
        return self.estimator.finish(context, means)


@dataclass
class _PassesOverPart(Passes):
    """Passes over a part of the data, counted as passes over all of it."""

    share: float = 1.0
    over_all: Passes = field(default_factory=Passes)

    def add(self, batches: int, *, forward: float = 0.0, backward: float = 0.0) -> None:
        """Count runs over one of `batches` batches of the part."""
        self.over_all.add(batches, forward=self.share * forward, backward=self.share * backward)


def leading_samples(batches: Sequence[Batch], count: int) -> list[Batch]:
    """The first samples of some batches.

    >>> import torch
    >>> leading_samples([torch.arange(3), torch.arange(3, 6)], 4)
    [tensor([0, 1, 2]), tensor([3])]
    """
    chosen: list[Batch] = []
    for batch in batches:
        left = count - sum(map(samples, chosen))
        if left <= 0:
            break
        chosen.append(batch if samples(batch) <= left else first_samples(batch, left))
    return chosen
