"""PuLP's HiGHS on an object that never prints."""

from typing import Any

import pulp

from mpsearch.solvers.highs import silent_highs


class SilentHiGHS(pulp.HiGHS):  # type: ignore[misc]  # PuLP has no types
    """`pulp.HiGHS` whose settings are `solverParams` of HiGHS alone."""

    def createAndConfigureSolver(self, lp: Any) -> None:
        """PuLP's name for the step that makes the solver's object."""
        lp.solverModel = silent_highs(**self.optionsDict)
