"""Small changes of the best plan."""

from dataclasses import dataclass

import numpy as np

from mpsearch.plan_search.proposers.posterior import Posterior
from mpsearch.plan_search.proposers.record import Options, Record, changed


@dataclass(frozen=True)
class Moves:
    """The neighbour of the best plan (one unit changed, or two where one pays for the other) that the posterior likes best."""

    def propose(self, record: Record, posterior: Posterior) -> Options | None:
        """See `Proposer.propose`."""
        best = record.best
        expected = posterior.expected()
        moves = record.neighbours(best)
        gains = np.array([sum(expected[u, p] - expected[u, best[u]] for u, p in move) for move in moves])
        for number in np.argsort(gains, kind="stable"):
            found = changed(best, moves[number])
            if record.new(found):
                return found
        return None
