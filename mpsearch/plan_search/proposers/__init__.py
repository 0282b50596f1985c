"""What a search measures next: each proposer a file with one class and one method, `propose` (`Proposer`).

>>> PROPOSERS["moves"]()
Moves()
"""

from mpsearch.plan_search.proposers.additive_output import AdditiveOutput as AdditiveOutput
from mpsearch.plan_search.proposers.crossing import Crossing as Crossing
from mpsearch.plan_search.proposers.moves import Moves as Moves
from mpsearch.plan_search.proposers.posterior import Posterior as Posterior
from mpsearch.plan_search.proposers.proposer import Proposer as Proposer
from mpsearch.plan_search.proposers.record import Columns as Columns
from mpsearch.plan_search.proposers.record import Record as Record
from mpsearch.plan_search.proposers.thompson import Thompson as Thompson

PROPOSERS: dict[str, type[Proposer]] = {
    "additive-output": AdditiveOutput,
    "crossing": Crossing,
    "moves": Moves,
    "thompson": Thompson,
}
