"""A plan on the report part, beside others."""

from collections.abc import Mapping
from dataclasses import dataclass

from mpsearch.core.evaluation import Evaluation


@dataclass(frozen=True)
class Compared:
    """One plan on the report part, as a row of the comparison.

    Attributes:
        name: `plan`, `w4` (a uniform precision), `best of kl-divergence` (the exact plan of one table).
        role: `plan`, `uniform`, `uniform above` (the next larger one, beyond the budget), `table`.
        usage: of every resource.
        evaluation: on the report part.
        damage: that was searched for, on the report part.
        damage_se: its standard error.
        difference: damage less that of the plan, on common samples.
        difference_se: its standard error.
    """

    name: str
    role: str
    usage: Mapping[str, float]
    evaluation: Evaluation
    damage: float
    damage_se: float
    difference: float
    difference_se: float
