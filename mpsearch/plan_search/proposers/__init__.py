"""What a search measures next: each proposer a file, with one method, `propose`."""

from typing import Protocol

from mpsearch.plan_search.proposers.additive_output import AdditiveOutput as AdditiveOutput
from mpsearch.plan_search.proposers.crossing import Crossing as Crossing
from mpsearch.plan_search.proposers.moves import Moves as Moves
from mpsearch.plan_search.proposers.posterior import Posterior as Posterior
from mpsearch.plan_search.proposers.record import Options as Options
from mpsearch.plan_search.proposers.record import Record as Record
from mpsearch.plan_search.proposers.thompson import Thompson as Thompson


class Proposer(Protocol):
    """Names plans that are worth measuring."""

    def propose(self, record: Record, posterior: Posterior) -> Options | None:
        """A plan (U,) within the limits that nobody has measured yet; None where it knows of none."""
        ...
