"""Small changes of the best plan."""

from dataclasses import dataclass

import numpy as np

from mpsearch.plan_search.proposers.posterior import Posterior
from mpsearch.plan_search.proposers.record import Columns, Record, changed


@dataclass(frozen=True)
class Moves:
    """The neighbour of the best plan that the posterior likes best: one decision changed, or two where one pays for the other."""

    def propose(self, record: Record, posterior: Posterior) -> Columns | None:
        """See `Proposer.propose`."""
        best = record.best
        if best is None:
            return None
        expected = posterior.expected()
        moves = record.neighbours(best)
        gains = np.array(
            [sum(expected[row, column] - expected[row, best[row]] for row, column in move) for move in moves]
        )
        for number in np.argsort(gains, kind="stable"):
            neighbour = changed(best, moves[number])
            if record.new(neighbour) and record.fits(neighbour):
                return neighbour
        return None
