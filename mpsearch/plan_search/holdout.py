"""Plans measured on data that the search never saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mpsearch.calibration.evaluating import Tally
from mpsearch.core.evaluation import Evaluation
from mpsearch.estimation.estimator import Context
from mpsearch.metrics.choice import MetricChoice
from mpsearch.metrics.runs import run
from mpsearch.models.running import Batch, samples
from mpsearch.plan_search.evaluator import Measurement, PlanEvaluator
from mpsearch.quantizers.fake_quantization import inputs, weights

Floats = NDArray[np.float64]


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
        name -> what was found.
    """
    metric = choice.metric
    made = {name: meter.made(options) for name, options in plans.items()}
    plain, tallies = Tally(choice), {name: Tally(choice) for name in plans}
    damages: dict[str, list[tuple[Floats, Floats]]] = {name: [] for name in plans}
    runs = 2 if metric.runs_model else 1
    model = context.model
    with torch.no_grad():
        for number, batch in enumerate(batches):
            before = run(model, batch)
            unquantized, _ = plain.add(model, batch, before, None, number)
            meter.count(runs * samples(batch))
            for name in plans:
                with weights(made[name].values), inputs(made[name].functions):
                    sums, counts = tallies[name].add(model, batch, run(model, batch), before, number)
                damages[name].append((metric.damage(sums, unquantized), counts))
                meter.count(runs * samples(batch))
    reference = plain.result(None)
    return {
        name: Reported(tallies[name].result(reference), Measurement(*map(np.concatenate, zip(*parts, strict=True))))
        for name, parts in damages.items()
    }
