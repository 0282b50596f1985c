"""What a search will take."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mpsearch.calibration.calibration import Calibration
from mpsearch.calibration.plan_runs import unquantized_run
from mpsearch.core.forecast import Forecast
from mpsearch.estimation.estimator import Estimator
from mpsearch.estimation.surrogate import OutputShifts
from mpsearch.metrics.divergences import KL
from mpsearch.models.data.batches import leaves
from mpsearch.models.data.splitting import first_samples
from mpsearch.models.running import Batch, samples
from mpsearch.plan_search.evaluator import REFERENCE_BYTES
from mpsearch.plan_search.starting_tables import FEW
from mpsearch.sensitivity import FisherProjection, KLDivergence, OutputDamage, OutputGradient


def search_forecast(
    calibration: Calibration, passes: float, estimators: Sequence[Estimator] | None, select: Sequence[Batch]
) -> Forecast:
    """What a search will take at most.

    Args:
        calibration: the prepared model, on the score part.
        passes: that the search may take.
        estimators: of its own; None: the default ones.
        select: the part that plans are measured on.
    """
    measured: list[Estimator] = [KLDivergence() if isinstance(calibration.choice.comparison, KL) else OutputDamage()]
    defaults = [FisherProjection(2), OutputGradient(2), *(measured if passes >= FEW else [])]
    shifts = OutputShifts()
    numbers = len(calibration.decisions) * len(calibration.precisions) * shifts.predictions * shifts.classes
    parts = [leaf for batch in calibration.whole for leaf in leaves(batch) if isinstance(leaf, Tensor)]
    held = {"data in parts": sum(part.nbytes for part in parts), "references": _references(calibration, select)}
    if estimators is None and passes >= FEW:
        held["shifts of the output"] = 2 * 2 * numbers  # half precision, as they are stored and in one array
    return calibration.forecast_search(passes, defaults if estimators is None else estimators, select, held)


def _references(calibration: Calibration, select: Sequence[Batch]) -> int:
    """Bytes of what the unquantized model makes of a part, as it is held for the plans."""
    one = first_samples(select[0], 1)
    with torch.no_grad():
        reference = unquantized_run(
            calibration.model, one, calibration.choice.metric, "select part, batch 0", calibration.output_layer
        )
    return min(REFERENCE_BYTES, reference.bytes * sum(map(samples, select)) // max(samples(one), 1))
