"""Small changes of the best plan."""

from dataclasses import dataclass

import numpy as np

from mpsearch.plan_search.proposers.neighbours import changed
from mpsearch.plan_search.proposers.posterior import Posterior
from mpsearch.plan_search.proposers.record import Columns, Record


@dataclass(frozen=True)
class Moves:
    """The neighbour of the best plan that the posterior likes best: one decision changed, or two where one pays for the other."""

    def propose(self, record: Record, posterior: Posterior) -> Columns | None:
        """See `Proposer.propose`."""
        best = record.best
        if best is None:
            return None
        expected = posterior.expected()
        gains = expected - expected[np.arange(len(best)), best][:, None]
        for changes in record.neighbours(best).best(gains):
            neighbour = changed(best, changes)
            if record.new(neighbour) and record.fits(neighbour):
                return neighbour
        return None
