"""The core of a table: the few rows on which a Lagrangian solution is in doubt."""

from dataclasses import dataclass

from mpsearch.solvers.feasibility import Floats, Options


@dataclass(frozen=True, eq=False)
class Core:
    """Rows in doubt and what may change in them, the likeliest first; all other rows stay at the base plan.

    Attributes:
        base: (L,) the base plan of the whole table.
        rows: (K,) rows in doubt, by the least reduced cost of a change.
        columns: for each row, (O,) its options that are possible; the first is that of the base plan.
        shifts: for each row, (O, R) change of use; the first is 0.
        costs: for each row, (O,) reduced costs >= 0; the first is 0.
    """

    base: Options
    rows: Options
    columns: list[Options]
    shifts: list[Floats]
    costs: list[Floats]

    def changed(self, moves: list[tuple[int, int]]) -> Options:
        """The base plan after changes, given as (number of the row in `rows`, number of the option in `columns`)."""
        options = self.base.copy()
        for row, option in moves:
            options[self.rows[row]] = self.columns[row][option]
        return options


@dataclass(frozen=True, eq=False)
class Found:
    """Outcome of a search of the core.

    Attributes:
        options: (L,) the best plan found within the limits, or None.
        bound: no plan that changes core rows alone has less excess over the Lagrangian bound; inf where there is none.
        size: partial plans held at once, or nodes of the search tree.
    """

    options: Options | None
    bound: float
    size: int
