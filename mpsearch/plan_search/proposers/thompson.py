"""Optimal plans of what the costs may be."""

from dataclasses import dataclass

from mpsearch.plan_search.proposers.posterior import Posterior
from mpsearch.plan_search.proposers.record import Columns, Record


@dataclass(frozen=True)
class Thompson:
    """The exact optimum of a draw of the posterior (Thompson sampling); every few turns that of its mean.

    A draw that leads to a plan measured before is followed by wider ones.

    Attributes:
        every: turns from one optimum of the mean to the next.
        tries: draws before it gives up.
        wider: growth of the spread with each draw.
    """

    every: int = 4
    tries: int = 8
    wider: float = 0.3

    def propose(self, record: Record, posterior: Posterior) -> Columns | None:
        """See `Proposer.propose`."""
        for attempt in range(self.tries):
            if attempt == 0 and len(record.measured) % self.every == 0:
                costs = posterior.expected()
            else:
                costs = posterior.sample(record.generator, 1 + self.wider * attempt)
            optimum = record.exact(costs)
            if optimum is not None and record.new(optimum):
                return optimum
        return None
