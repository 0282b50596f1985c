"""Plans whose layers' errors cancel at the output."""

from dataclasses import dataclass

import numpy as np

from mpsearch.plan_search.proposers.neighbours import changed
from mpsearch.plan_search.proposers.posterior import Posterior
from mpsearch.plan_search.proposers.record import Columns, Record

_MOST = 256  # neighbours looked at in one step


@dataclass(frozen=True)
class AdditiveOutput:
    """Descent from the best plan on the sum of the shifts that single perturbations make at the output (`mpsearch.estimation.surrogate`).

    It has nothing to propose in a search that made no runs of one perturbation at a time, where passes are few.

    Attributes:
        steps: at most.
    """

    steps: int = 100

    def propose(self, record: Record, posterior: Posterior) -> Columns | None:
        """See `Proposer.propose`."""
        surrogate, columns = record.surrogate, record.best
        if surrogate is None or columns is None:
            return None
        damage = surrogate.damage(columns)
        for _ in range(self.steps):
            moves = record.neighbours(columns).drawn(_MOST, record.generator)
            if not moves:
                break
            damages = surrogate.damage_of_changes(columns, moves)
            least = int(np.argmin(damages))
            if damages[least] >= damage:
                break
            columns, damage = changed(columns, moves[least]), float(damages[least])
        return columns if record.new(columns) and record.fits(columns) else None
