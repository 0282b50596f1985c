"""The door from a model, data and many plans to the damage of each."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mpsearch._evaluate import _check_plan as check_plan
from mpsearch._evaluate import named_weights
from mpsearch.determinism import probed_output
from mpsearch.errors import EstimatorError, PlanError
from mpsearch.measure import Mean, kl_divergence
from mpsearch.measured_plans import MeasuredPlans
from mpsearch.model import Batch, call, collect, data_fingerprint, predictions, preserved, samples, state_fingerprint
from mpsearch.modules import holds_weight, weight_of
from mpsearch.perturb import Quantizer, input_quantizers, input_ranges, inputs, quantized_weights, weights
from mpsearch.plan import Plan
from mpsearch.precision import Precision
from mpsearch.quantize import RoundToNearest
from mpsearch.undecided import tell_unnamed


def measure_plans(
    model: nn.Module,
    batches: Iterable[Batch],
    plans: Sequence[Plan],
    *,
    quantizer: Quantizer | None = None,
    calibration: Iterable[Batch] | None = None,
    progress: bool = True,
) -> MeasuredPlans:
    """Measure many plans on common data: the mean KL to the unquantized model that `evaluate` gives for each.

    The unquantized model runs once, and a layer is quantized once for each precision that any plan gives it; `evaluate` in a
    loop would do both for every plan. The quantized weights are held together: at most one copy of the weights for each
    precision in use.

    Args:
        model: any module; it comes back bit for bit as it went in, also after an exception.
        batches: held-out data, read once.
        plans: over the same layers.
        quantizer: of the weights; by default `RoundToNearest()`.
        calibration: data for the ranges of quantized inputs; by default the held-out inputs themselves.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        The plans in their order, with damage and standard error over samples in nats a prediction.

    Raises:
        PlanError: for no plans, plans over different layers, or one that does not fit the model.
        EstimatorError: for unusable data, a model whose output is random, or an output that is not finite.

    >>> _ = torch.manual_seed(0)
    >>> plans = [Plan({"0": Precision(bits)}) for bits in ("2", "8", "16")]
    >>> measured = measure_plans(nn.Sequential(nn.Linear(4, 3)), [torch.randn(8, 4)], plans)
    >>> bool(measured.damage[0] > measured.damage[1] > measured.damage[2] == 0)
    True
    """
    data = collect(batches, model)
    quantize: Quantizer = RoundToNearest() if quantizer is None else quantizer
    unmeasured = MeasuredPlans(tuple(plans), np.zeros(len(plans)), unit="nats")
    before = state_fingerprint(model)
    means = [Mean() for _ in plans]
    with preserved(model), torch.no_grad():
        for number, plan in enumerate(plans):
            try:
                check_plan(model, plan)
            except PlanError as error:
                raise PlanError(f"plan {number}: {error}") from None
        tell_unnamed(model, named_weights(model, plans[0]), len(plans[0]))
        probed_output(model, data[0])
        names = sorted({name for plan in plans for name, option in plan.items() if option.quantizes_activation})
        ranges = (
            input_ranges(model, data if calibration is None else collect(calibration, model), names) if names else {}
        )
        cells = _cells(model, plans, quantize)
        values = [_chosen(model, plan, cells) for plan in plans]
        functions = [input_quantizers(model, plan, quantize, ranges) for plan in plans]
        bar = tqdm(total=len(data) * len(plans), desc="measure plans", disable=None if progress else True, leave=False)
        with bar:
            for number, batch in enumerate(data):
                reference, _, index = predictions(model, call(model, batch), batch)
                for plan_number, mean in enumerate(means):
                    with weights(values[plan_number]), inputs(functions[plan_number]):
                        logits, _, _ = predictions(model, call(model, batch), batch)
                    divergence = kl_divergence(reference, logits)
                    if not torch.isfinite(divergence).all():
                        raise EstimatorError(f"the damage of plan {plan_number} is not finite in batch {number}")
                    mean.add(divergence, index, samples(batch))
                    bar.update()
    origin = {
        "quantizer": repr(quantize),
        "samples": sum(samples(batch) for batch in data),
        "model_fingerprint": before,
        "data_fingerprint": data_fingerprint(data),
    }
    damage, damage_se = np.array([(mean.value, mean.se) for mean in means]).T
    return replace(unmeasured, damage=damage, damage_se=damage_se, origin=origin)


def _cells(
    model: nn.Module, plans: Sequence[Plan], quantize: Quantizer
) -> dict[tuple[nn.Parameter, Precision], Tensor]:
    """Quantized value of each weight at each weight precision that any plan gives it."""
    found: dict[tuple[nn.Parameter, Precision], Tensor] = {}
    for plan in plans:
        for name, precision in plan.items():
            key = weight_of(model.get_submodule(name)), replace(precision, activation="16")
            if _changes_weight(model, name, precision) and key not in found:
                found[key] = quantized_weights(model, {name: precision}, quantize)[key[0]]
    return found


def _chosen(
    model: nn.Module, plan: Plan, cells: dict[tuple[nn.Parameter, Precision], Tensor]
) -> dict[nn.Parameter, Tensor]:
    keys = [
        (weight_of(model.get_submodule(name)), replace(precision, activation="16"))
        for name, precision in plan.items()
        if _changes_weight(model, name, precision)
    ]
    return {key[0]: cells[key] for key in keys}


def _changes_weight(model: nn.Module, name: str, precision: Precision) -> bool:
    return precision.quantizes_weight and holds_weight(model.get_submodule(name))
