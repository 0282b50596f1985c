"""Evolutionary search with Optuna's NSGA-II, for damage that has to be measured."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mpsearch.core.solution import Choice, SolverCapabilities, Status
from mpsearch.solvers.feasibility import Floats, Options, reachable, shifted, total
from mpsearch.solvers.lagrangian import dual
from mpsearch.solvers.moves import Moves

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Evolutionary:
    """Genetic search (NSGA-II, Deb et al., IEEE Trans. Evol. Comput. 6 (2002) 182-197, as in Optuna).

    On a table any exact solver is better and faster; this one is for an `objective` that measures plans. It
    never starts cold: the first generation holds the plans of the Lagrangian relaxation on either side of the
    limits, repaired, which are points of the exact front or next to it. Each child is repaired to keep the
    limits and filled up before it is scored; no plan is scored twice.

    Attributes:
        generations: of `population` children each.
        population: parents kept.
        seed: of Optuna's sampler; the same seed gives the same plan.
        objective: measured damage of the options (L,) of one plan; None scores by the table.

    >>> choice = Evolutionary(generations=2, population=4).choose(
    ...     np.array([[4.0, 1.0], [2.0, 0.0]]), np.array([[[1.0, 2.0], [1.0, 2.0]]]), np.array([3.0])
    ... )
    >>> choice.options.tolist()
    [1, 0]
    """

    capabilities: ClassVar[SolverCapabilities] = SolverCapabilities()

    generations: int = 20
    population: int = 50
    seed: int = 0
    objective: Callable[[Options], float] | None = None

    def choose(self, sensitivity: Floats, usage: Floats, limits: Floats) -> Choice:
        """See `Solver.choose`."""
        usage, limits = shifted(sensitivity, usage, limits)
        allowed = reachable(sensitivity, usage, limits)
        if not allowed.any(axis=1).all():
            return Choice(None, Status.INFEASIBLE, math.inf)
        relaxed = dual(sensitivity, usage, limits, allowed)
        if relaxed.bound == math.inf:
            return Choice(None, Status.INFEASIBLE, math.inf, relaxed.multipliers)
        moves = Moves(sensitivity, usage, limits, allowed, relaxed.multipliers)
        scores: dict[bytes, float] = {}
        plans: dict[bytes, Options] = {}

        def score(plan: Options) -> float:
            options = moves.within(plan)
            if options is None:
                return math.inf
            key = options.tobytes()
            if key not in scores:
                value = total(sensitivity, options) if self.objective is None else float(self.objective(options))
                scores[key], plans[key] = (math.inf if math.isnan(value) else value), options
            return scores[key]

        columns = [np.flatnonzero(row).tolist() for row in allowed]
        starts = [*relaxed.plans[: -1 - self.population // 2 : -1], moves.cheapest()]
        self._search(columns, starts, score)
        multipliers = relaxed.multipliers if self.objective is None else None
        bound = relaxed.bound if self.objective is None else -math.inf
        stats = {"evaluations": len(scores)}
        if not scores:
            return Choice(None, Status.UNSOLVED, bound, multipliers, stats)
        best = min(scores, key=scores.__getitem__)
        if self.objective is not None:
            return Choice(plans[best], Status.FEASIBLE, bound, stats=stats | {"measured": scores[best]})
        status = Status.OPTIMAL if scores[best] <= bound else Status.FEASIBLE
        return Choice(plans[best], status, min(scores[best], bound), multipliers, stats)

    def _search(self, columns: list[list[int]], starts: list[Options], score: Callable[[Options], float]) -> None:
        """One study, in memory; Optuna's verbosity is put back."""
        import optuna

        def measure(trial: "optuna.Trial") -> float:
            chosen = [trial.suggest_categorical(str(row), allowed) for row, allowed in enumerate(columns)]
            return score(np.array(chosen, np.int64))

        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            sampler = optuna.samplers.NSGAIISampler(population_size=self.population, seed=self.seed)
            study = optuna.create_study(sampler=sampler)
            for start in starts:
                study.enqueue_trial({str(row): option for row, option in enumerate(start.tolist())})
            study.optimize(measure, n_trials=self.generations * self.population)
        finally:
            optuna.logging.set_verbosity(verbosity)
