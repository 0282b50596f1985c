"""What every strategy works with."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsearch.core.budget import Budget
from mpsearch.core.plan import Plan
from mpsearch.core.problem import Problem, named, uniform_options
from mpsearch.errors import SolverError
from mpsearch.plan_search.loop import PlanSearch
from mpsearch.plan_search.plan_usage import with_usage
from mpsearch.plan_search.proposers import Columns, Record
from mpsearch.plan_search.starting_tables import FEW, Scores
from mpsearch.plan_search.strategies.evaluators import Evaluators
from mpsearch.plan_search.task import SearchTask


@dataclass(frozen=True, eq=False)
class SearchContext:
    """The task, where its plans are measured, and what the tables say.

    Attributes:
        task: what is asked, and on what.
        evaluators: where plans are measured.
        scores: what the tables say.
        rows: (L,) decision of each layer.
        uniforms: name of a precision -> (D,) the plan that has it in every layer that may.
        generator: of all draws.
    """

    task: SearchTask
    evaluators: Evaluators
    scores: Scores
    rows: NDArray[np.int64]
    uniforms: Mapping[str, Columns]
    generator: np.random.Generator

    @classmethod
    def of(cls, task: SearchTask, evaluators: Evaluators, scores: Scores) -> "SearchContext":
        """The same, with what follows from it."""
        allowed = ~np.isnan(Problem.of(task.base, Budget()).objective)
        uniforms = uniform_options(allowed, task.context.precisions)
        return cls(task, evaluators, scores, decision_of_layers(task), uniforms, np.random.default_rng(task.seed))

    def record(self, budget: Budget) -> Record:
        """A record without a plan."""
        problem = Problem.of(self.task.base, budget)
        return Record(problem, self.scores.costs, self.generator, surrogate=self.scores.surrogate)

    def open(self, budget: Budget, *, uniforms: bool = True) -> PlanSearch:
        """A search within a budget, begun with the plans that the tables propose.

        Args:
            budget: its limits.
            uniforms: measure the best uniform precisions that fit too.

        Raises:
            SolverError: where the tables lead to no plan within the limits.
        """
        record = self.record(budget)
        search = PlanSearch(record, self.scores.prior, self.evaluators.select)
        starts = (self.scores.prior, self.scores.together, *self.scores.costs.values())
        optima = [record.exact(costs) for costs in starts]
        plans = [columns for columns in optima if columns is not None]
        if not plans:
            raise SolverError("no plan was found within the limits, and no proof that there is none")
        if uniforms:
            fitting = [columns for columns in self.uniform_plans() if record.fits(columns)]
            plans += fitting[-1:] if self.task.passes.limit < FEW else fitting[-2:]
        search.open(plans, self.evaluators.spent)
        return search

    def known(self, search: PlanSearch) -> list[Columns]:
        """Plans that were measured in other searches and fit this one."""
        plans = map(np.array, self.evaluators.select.known)
        return [columns for columns in plans if search.record.fits(columns)]

    def uniform_plans(self) -> list[Columns]:
        """Uniform plans, the least damaging last by what is expected."""
        rows = np.arange(len(self.scores.prior))
        return sorted(self.uniforms.values(), key=lambda columns: -float(self.scores.prior[rows, columns].sum()))

    def uniform_name(self, columns: Columns) -> str:
        """The precision of a uniform plan."""
        return next(name for name, plan in self.uniforms.items() if np.array_equal(plan, columns))

    def measure_uniform_plans(self) -> None:
        """All of them, those that are expected to be best first, as far as the passes go."""
        for columns in reversed(self.uniform_plans()):
            if not self.evaluators.spent():
                self.evaluators.select.measure(columns)

    def plan(self, columns: Columns) -> Plan:
        """A plan by the names of layers, with its use of every resource."""
        return with_usage(Plan(named(self.task.base, columns[self.rows])), self.task.base)

    def use(self, resource: str, columns: Columns) -> float:
        """What a plan uses of a resource."""
        return self.plan(columns).usage[resource]


def decision_of_layers(task: SearchTask) -> NDArray[np.int64]:
    """(L,) decision of each layer of the base table."""
    place = {layer.name: d for d, decision in enumerate(task.context.decisions) for layer in decision.layers}
    return np.array([place[layer.name] for layer in task.base.layers])
