"""Plans measured on data that the search never saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mpsearch._evaluate import Tally
from mpsearch.estimator import Setting
from mpsearch.evaluation import Evaluation
from mpsearch.model import Batch, call, predictions, samples
from mpsearch.perturb import inputs, weights
from mpsearch.plan_meter import Damage, Measurement, PlanMeter


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
    setting: Setting, batches: Sequence[Batch], plans: Mapping[str, NDArray[np.int64]], damage: Damage, meter: PlanMeter
) -> dict[str, Reported]:
    """Measure plans on common samples: the unquantized model runs once a batch, and each plan once.

    Args:
        setting: the model.
        batches: of the report part.
        plans: name -> (U,) options.
        damage: what was searched for.
        meter: of the report part; makes the plans and counts the passes.

    Returns:
        name -> what was found.
    """
    metric = damage.metric if callable(damage.metric) else None
    made = {name: meter.made(options) for name, options in plans.items()}
    plain, tallies = Tally(metric, None), {name: Tally(metric, None) for name in plans}
    found: dict[str, list[tuple[NDArray[np.float64], NDArray[np.float64]]]] = {name: [] for name in plans}
    model = setting.model
    with torch.no_grad():
        for number, batch in enumerate(batches):
            reference = predictions(model, call(model, batch), batch)
            plain.add(model, batch, reference, None, number)
            before, counts = damage.of(model, batch, reference, None)
            meter.count(samples(batch))
            for name in plans:
                with weights(made[name].values), inputs(made[name].functions):
                    predicted = predictions(model, call(model, batch), batch)
                    tallies[name].add(model, batch, predicted, reference[0], number)
                    after, _ = damage.of(model, batch, predicted, reference)
                meter.count(samples(batch))
                found[name].append((after if damage.metric == "kl" else after - before, counts))
    unquantized = plain.result(None)
    return {
        name: Reported(
            tallies[name].result(unquantized),
            Measurement(np.concatenate([s for s, _ in parts]), np.concatenate([c for _, c in parts])),
        )
        for name, parts in found.items()
    }
