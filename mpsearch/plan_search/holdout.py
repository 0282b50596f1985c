"""Plans measured on data that the search never saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpsearch.calibration.plan_runs import Damage, plan_runs
from mpsearch.calibration.tally import Tally
from mpsearch.core.evaluation import Evaluation
from mpsearch.estimation.context import Context
from mpsearch.metrics.choice import MetricChoice
from mpsearch.models.running import Batch, samples
from mpsearch.plan_search.evaluator import Measurement, PlanEvaluator


@dataclass(frozen=True, eq=False)
class Reported:
    """One plan on the report part.

    Attributes:
        evaluation: KL, loss, accuracy, as `mps.evaluate` gives them.
        measurement: of the damage that was searched for, sample by sample.
    """

    evaluation: Evaluation
    measurement: Measurement


def report_on(
    context: Context,
    batches: Sequence[Batch],
    plans: Mapping[str, NDArray[np.int64]],
    choice: MetricChoice,
    meter: PlanEvaluator,
) -> dict[str, Reported]:
    """Measure plans on common samples: the unquantized model runs once a batch, and each plan once.

    Args:
        context: the model.
        batches: of the report part.
        plans: name -> (U,) options.
        choice: of what was searched for.
        meter: of the report part; makes the plans and counts the passes.

    Returns:
        name -> what was measured.

    Raises:
        EstimatorError: where the damage of a plan is not finite.
    """
    tallies = {name: Tally(choice) for name in plans}
    plain = Tally(choice)
    in_model = []
    for name, options in plans.items():
        in_model.append(replace(meter.in_model(options), name=name))
    damages: dict[str, list[Damage]] = {name: [] for name in plans}
    names = list(plans)
    runs = 2 if choice.metric.runs_model else 1
    blocks = None if choice.metric.runs_model else context.blocks
    for number, plan_number, damage in plan_runs(
        context.model, batches, in_model, plain, list(tallies.values()), context.output_layer, blocks
    ):
        meter.count(runs * samples(batches[number]))
        if plan_number is not None and damage is not None:
            damages[names[plan_number]].append(damage)
    reference = plain.result(None)
    return {
        name: Reported(
            tallies[name].result(reference),
            Measurement(np.concatenate([part.sums for part in parts]), np.concatenate([part.counts for part in parts])),
        )
        for name, parts in damages.items()
    }
