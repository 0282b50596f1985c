"""Plans that take after two good ones."""

from dataclasses import dataclass

import numpy as np

from mpsearch.plan_search.proposers.posterior import Posterior
from mpsearch.plan_search.proposers.record import Columns, Record


@dataclass(frozen=True)
class Crossing:
    """Evolution on measured plans: the best child of two of the best plans, by a draw of the posterior.

    Each decision takes the column of one of its parents, or mutates to any column that is allowed. The child is the exact optimum among
    all that these columns make within the limits, so none has to be repaired (optimal recombination, as in Eremeev, 2008, for
    genetic algorithms on problems with limits; its citation is from memory).

    Attributes:
        parents: so many of the best plans are crossed.
        mutation: expected number of decisions that mutate.
        tries: pairs of parents before it gives up.
    """

    parents: int = 10
    mutation: float = 2.0
    tries: int = 8

    def propose(self, record: Record, posterior: Posterior) -> Columns | None:
        """See `Proposer.propose`."""
        draw = record.generator
        best = np.array(sorted(record.fitting, key=record.measured.__getitem__)[: self.parents])
        if len(best) < 2:
            return None
        rows = np.arange(best.shape[1])
        for _ in range(self.tries):
            first, second = best[draw.choice(len(best), 2, replace=False)]
            open_to = np.zeros_like(record.allowed)
            open_to[rows, first] = open_to[rows, second] = True
            open_to[draw.random(len(rows)) < self.mutation / len(rows)] = True
            child = record.exact(np.where(open_to, posterior.sample(draw), np.nan))
            if child is not None and record.new(child):
                return child
        return None
