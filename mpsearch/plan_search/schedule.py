"""Which proposers are asked for plans, and when."""

from collections.abc import Sequence
from dataclasses import dataclass

from mpsearch.core.settings import check_settings
from mpsearch.errors import EstimatorError, nearest
from mpsearch.plan_search.proposers import PROPOSERS, AdditiveOutput, Crossing, Moves, Proposer, Thompson


@dataclass(frozen=True)
class Schedule:
    """The proposers of each part of a search, asked in turn; an empty part is left out.

    Attributes:
        first: asked for the first few plans, before all others.
        early: until a third of the passes for plans is left.
        late: in that last third, and between the samples.
        at_limits: in the short searches at one of several limits, of a goal that looks at many.
    """

    first: tuple[Proposer, ...]
    early: tuple[Proposer, ...]
    late: tuple[Proposer, ...]
    at_limits: tuple[Proposer, ...]

    @classmethod
    def of(cls, proposers: Sequence[str | Proposer] | None) -> "Schedule":
        """The default one, or one of your own proposers in all parts.

        Args:
            proposers: names in `PROPOSERS`, or objects; None for the default.

        Raises:
            EstimatorError: for an unknown name, something that is no proposer, or none at all.

        >>> Schedule.of(["moves"]).late
        (Moves(),)
        >>> Schedule.of(["move"])
        Traceback (most recent call last):
        mpsearch.errors.EstimatorError: unknown proposer 'move'; did you mean 'moves'?
        """
        if proposers is None:
            return cls((AdditiveOutput(),), (Thompson(),), (Thompson(), Moves(), Crossing()), (Thompson(), Moves()))
        if isinstance(proposers, str) or not isinstance(proposers, Sequence) or not proposers:
            raise EstimatorError(
                f"proposers={proposers!r}, expected a list of names or objects, such as ['thompson', 'moves']"
            )
        own = tuple(_proposer(part) for part in proposers)
        return cls((), own, own, own)


def _proposer(part: str | Proposer) -> Proposer:
    if isinstance(part, str):
        if part not in PROPOSERS:
            raise EstimatorError(f"unknown proposer {part!r}{nearest(part, PROPOSERS)}")
        return PROPOSERS[part]()
    if isinstance(part, type) or not isinstance(part, Proposer):
        raise EstimatorError(f"{part!r} is no proposer: expected a name or an object with the method 'propose'")
    check_settings(part, EstimatorError)
    return part
