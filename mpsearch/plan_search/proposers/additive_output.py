"""Plans whose layers' errors cancel at the output."""

from dataclasses import dataclass

import numpy as np

from mpsearch.estimation.surrogate import Surrogate
from mpsearch.plan_search.proposers.posterior import Posterior
from mpsearch.plan_search.proposers.record import Options, Record, changed

_MOST = 256  # neighbours looked at in one step


@dataclass(frozen=True, eq=False)
class AdditiveOutput:
    """Descends on the additive-output surrogate, from the best plan so far.

    Attributes:
        surrogate: damage from the summed shifts of the logits.
        steps: at most.
    """

    surrogate: Surrogate
    steps: int = 100

    def propose(self, record: Record, posterior: Posterior) -> Options | None:
        """See `Proposer.propose`."""
        options = record.best
        value = self.surrogate.damage(options)
        for _ in range(self.steps):
            moves = record.neighbours(options)
            if len(moves) > _MOST:
                moves = [moves[i] for i in record.generator.choice(len(moves), _MOST, replace=False)]
            if not moves:
                break
            values = self.surrogate.damage_of_changes(options, moves)
            least = int(np.argmin(values))
            if values[least] >= value:
                break
            options, value = changed(options, moves[least]), float(values[least])
        return options if record.new(options) else None
