"""Plans measured on data that the search never saw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from mpsearch._evaluate import Tally
from mpsearch.estimator import Setting
from mpsearch.evaluation import Evaluation
from mpsearch.model import Batch, call, predictions, samples
from mpsearch.perturb import inputs, weights
from mpsearch.plan_meter import Damage, Measurement, PlanMeter

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
    made = {name: meter.made(options) for name, options in plans.items()}
    plain, tallies = Tally(None, None), {name: Tally(None, None) for name in plans}
    reference, scores = _Scores(), {name: _Scores() for name in plans}
    runs = 2 if damage.own else 1  # a metric of one's own runs the model itself
    model = setting.model
    with torch.no_grad():
        for number, batch in enumerate(batches):
            before = predictions(model, call(model, batch), batch)
            plain.add(model, batch, before, None, number)
            reference.add(*damage.of(model, batch, before, None))
            meter.count(runs * samples(batch))
            for name in plans:
                with weights(made[name].values), inputs(made[name].functions):
                    after = predictions(model, call(model, batch), batch)
                    tallies[name].add(model, batch, after, before[0], number)
                    scores[name].add(*damage.of(model, batch, after, before))
                meter.count(runs * samples(batch))
    unquantized = _evaluation(plain.result(None), reference.measurement, damage)
    return {
        name: Reported(
            _evaluation(tallies[name].result(unquantized), found.measurement, damage), found.over(reference, damage)
        )
        for name, found in scores.items()
    }


@dataclass(eq=False)
class _Scores:
    """What is searched for, batch by batch."""

    sums: list[Floats] = field(default_factory=list)
    counts: list[Floats] = field(default_factory=list)

    def add(self, sums: Floats, counts: Floats) -> None:
        """Of one batch."""
        self.sums.append(sums)
        self.counts.append(counts)

    @property
    def measurement(self) -> Measurement:
        """Of all batches."""
        return Measurement(np.concatenate(self.sums), np.concatenate(self.counts))

    def over(self, reference: "_Scores", damage: Damage) -> Measurement:
        """The rise over the unquantized model."""
        found = self.measurement
        if damage.metric == "kl":
            return found
        return Measurement(found.sums - reference.measurement.sums, found.counts)


def _evaluation(found: Evaluation, score: Measurement, damage: Damage) -> Evaluation:
    """With the mean of a metric of one's own."""
    if not damage.own:
        return found
    return replace(found, metric=-score.value if damage.higher_is_better else score.value, metric_se=score.se)
