"""What a proposer promises."""

from typing import Protocol, runtime_checkable

from mpsearch.plan_search.proposers.posterior import Posterior
from mpsearch.plan_search.proposers.record import Columns, Record


@runtime_checkable
class Proposer(Protocol):
    """Names plans that are worth measuring.

    A proposer is one file with one class of frozen settings that all have a default, and one method. What it remembers from turn to turn
    is what stands in the record. To add one, write the file, name it in `PROPOSERS`, and run `mpsearch.testing.proposer_checks` over it.

    - The plan keeps the limits and takes no option that is refused: `record.fits(plan)`.
    - It is new: `record.new(plan)`. One that was measured before is asked for again, and after a few of them the proposer counts as out
      of plans.
    - All draws come from `record.generator`, so that the same seed gives the same plans.
    - It copes with a record that holds no plan yet, and leaves the record as it is.
    """

    def propose(self, record: Record, posterior: Posterior) -> Columns | None:
        """The next plan to measure.

        Args:
            record: limits, tables, and the plans that were measured.
            posterior: what these say of each cell.

        Returns:
            (D,) int64, the column of each decision; None where it has nothing to propose.
        """
        ...
