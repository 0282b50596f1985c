"""Where plans are measured, and what these measurements will take."""

from dataclasses import dataclass

from mpsearch.models.data.mixup import mixup
from mpsearch.models.data.splitting import cut
from mpsearch.models.running import Batch
from mpsearch.plan_search.evaluator import PlanEvaluator
from mpsearch.plan_search.passes import PassBudget
from mpsearch.plan_search.starting_tables import FEW
from mpsearch.plan_search.task import SearchTask, size

#: The select part is measured in at least so many batches, so that a poor plan is dropped after a quarter.
_PIECES = 4
#: Plans that are measured on the score part too, where few passes are spent.
_FINALISTS = 2
#: Draws of partners for the samples between the samples, and the share of the passes that go to the last of them.
_DRAWS, _LAST = 3, 0.1
#: Plans that the report compares, with the unquantized model.
_REPORTED = 5


@dataclass(frozen=True, eq=False)
class Evaluators:
    """The evaluators of a search, one for each set of data that plans are measured on.

    Attributes:
        select: every plan; on the select part, and where passes are not few on the score part too.
        report: the plans that are compared at the end; on the report part, which nothing else sees.
        score: the finalists, where passes are few; on the score part.
        between: good plans, where passes are not few; on samples between those of `select` (`mixup.mixed`).
        drawn: samples of `between` that count while plans are looked for, as many as `select` has.
        finalists: plans that are measured on `score`, or on all of `between`.
        passes: what may be spent.
        report_passes: passes that the report takes.
    """

    select: PlanEvaluator
    report: PlanEvaluator
    score: PlanEvaluator | None
    between: PlanEvaluator | None
    drawn: int
    finalists: int
    passes: PassBudget
    report_passes: float

    @classmethod
    def of(cls, task: SearchTask, *, mixes: bool) -> "Evaluators":
        """The evaluators that the passes allow.

        Args:
            task: model, data, metric and passes.
            mixes: whether plans are measured between the samples too, where the metric and the data have that.
        """
        few = task.passes.limit < FEW
        metric = task.choice.metric

        def evaluator(name: str, batches: list[Batch]) -> PlanEvaluator:
            return PlanEvaluator(name, task.context, batches, metric, task.total, task.passes)

        pieces = cut(task.parts["select"], _PIECES)
        if not few:
            pieces += task.parts["score"]
        samples_between = mixup(pieces, task.seed, _DRAWS) if mixes and metric.compares and not few else []
        between, finalists = None, _FINALISTS if few else 0
        if samples_between:
            between = evaluator("mixup", samples_between)
            finalists = int(_LAST * task.passes.limit / _later_draws(between))
            if finalists < 2:
                between = None
        return cls(
            select=evaluator("select", pieces),
            report=evaluator("report", task.parts["report"]),
            score=evaluator("score", task.parts["score"]) if few else None,
            between=between,
            drawn=size(samples_between) // _DRAWS,
            finalists=finalists,
            passes=task.passes,
            report_passes=_REPORTED * task.share("report") * (2 if metric.runs_model else 1),
        )

    @property
    def reserve(self) -> float:
        """Passes that the finalists and the report, for four plans and the unquantized model, will take."""
        finalists = 0.0
        if self.score is not None:
            finalists = self.score.share * (1 + self.finalists * self.select.price / self.select.share)
        elif self.between is not None:
            finalists = _later_draws(self.between) * self.finalists + self.between.share
        return self.report_passes + finalists

    @property
    def price(self) -> float:
        """Passes that a plan takes at most while plans are looked for."""
        return self.select.price + (0.0 if self.between is None else self.between.price / _DRAWS)

    @property
    def free(self) -> float:
        """Passes left for looking for plans."""
        return self.passes.left - self.reserve

    def spent(self) -> bool:
        """True where no further plan can be measured."""
        return self.passes.left < self.reserve + self.price


def _later_draws(between: PlanEvaluator) -> float:
    """Passes for a plan on the draws of partners that are left out while plans are looked for."""
    return between.price * (_DRAWS - 1) / _DRAWS
