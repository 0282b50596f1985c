"""The door from a model, data and many plans to the damage of each."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mpsearch.calibration.evaluating import _check_plan as check_plan
from mpsearch.calibration.evaluating import named_in, named_weights
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.decisions.coverage import tell_unnamed
from mpsearch.errors import EstimatorError, PlanError
from mpsearch.estimation.estimator import Loss
from mpsearch.metrics.choice import check_metric, choose
from mpsearch.metrics.metric import Metric
from mpsearch.metrics.runs import run
from mpsearch.metrics.statistics import Mean
from mpsearch.models.data.splitting import few
from mpsearch.models.determinism import PROBED, probed_output
from mpsearch.models.modules.weights import holds_weight, layer_of, weight_of
from mpsearch.models.running import Batch, collect, data_fingerprint, preserved, samples, state_fingerprint
from mpsearch.quantizers.fake_quantization import (
    Quantizer,
    checked_quantizer,
    input_quantizers,
    input_ranges,
    inputs,
    quantized_weights,
    weights,
)


def measure_plans(
    model: nn.Module,
    batches: Iterable[Batch],
    plans: Sequence[Plan],
    *,
    metric: str | Metric | Callable[..., Any] | None = None,
    higher_is_better: bool = False,
    loss: Loss | None = None,
    quantizer: Quantizer | None = None,
    calibration: Iterable[Batch] | None = None,
    progress: bool = True,
) -> MeasuredPlans:
    """Measure many plans on common data: by how much each is worse than the unquantized model, in what `evaluate` measures.

    The unquantized model runs once, and a layer is quantized once for each precision that any plan gives it; `evaluate` in a
    loop would do both for every plan. The quantized weights are held together: at most one copy of the weights for each
    precision in use.

    Args:
        model: any module; it comes back bit for bit as it went in, also after an exception.
        batches: held-out data, read once.
        plans: over the same layers.
        metric: as for `evaluate`; by default what fits outputs and targets.
        higher_is_better: direction of a function.
        loss: of one's own, for `metric="loss"`.
        quantizer: of the weights; by default `RoundToNearest()`.
        calibration: data for the ranges of quantized inputs; by default the held-out inputs themselves.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        The plans in their order, by the names of the model, with damage and standard error over samples, in the unit of the metric
        (nats a prediction for the KL);
        `origin["measured"]` tells the metric and why it is that one.

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
    quantize = checked_quantizer(quantizer)
    check_metric(metric)
    before = state_fingerprint(model)
    means = [Mean() for _ in plans]
    with preserved(model, data[0]), torch.no_grad():
        plans = [named_in(model, plan) for plan in plans]
        unmeasured = MeasuredPlans(tuple(plans), np.zeros(len(plans)))
        for number, plan in enumerate(plans):
            try:
                check_plan(model, plan)
            except PlanError as error:
                raise PlanError(f"plan {number}: {error}") from None
        tell_unnamed(model, named_weights(model, plans[0]), len(plans[0]))
        output = probed_output(model, data[0])
        example = few(data[0], PROBED)
        choice = choose(model, data, output, example, metric, loss=loss, higher_is_better=higher_is_better)
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
                reference = run(model, batch)
                unquantized, _ = choice.metric.of(model, batch, reference, None)
                for plan_number, mean in enumerate(means):
                    with weights(values[plan_number]), inputs(functions[plan_number]):
                        found = None if choice.metric.runs_model else run(model, batch)
                        sums, counts = choice.metric.of(model, batch, found, reference)
                    damage = choice.metric.damage(sums, unquantized)
                    if not np.isfinite(damage).all():
                        raise EstimatorError(f"the damage of plan {plan_number} is not finite in batch {number}")
                    mean.add_samples(torch.from_numpy(damage), torch.from_numpy(counts))
                    bar.update()
    choice.warn(stacklevel=2)
    origin = {
        "metric": choice.metric.name,
        "measured": choice.sentence,
        "quantizer": repr(quantize),
        "samples": sum(samples(batch) for batch in data),
        "model_fingerprint": before,
        "data_fingerprint": data_fingerprint(data),
    }
    values_of, ses = np.array([(mean.value, mean.se) for mean in means]).T
    return replace(unmeasured, damage=values_of, damage_se=ses, unit=choice.metric.unit, origin=origin)


def _cells(
    model: nn.Module, plans: Sequence[Plan], quantize: Quantizer
) -> dict[tuple[nn.Parameter, Precision], Tensor]:
    """Quantized value of each weight at each weight precision that any plan gives it."""
    found: dict[tuple[nn.Parameter, Precision], Tensor] = {}
    for plan in plans:
        for name, precision in plan.items():
            key = weight_of(layer_of(model, name)), replace(precision, activation="16")
            if _changes_weight(model, name, precision) and key not in found:
                found[key] = quantized_weights(model, {name: precision}, quantize)[key[0]]
    return found


def _chosen(
    model: nn.Module, plan: Plan, cells: dict[tuple[nn.Parameter, Precision], Tensor]
) -> dict[nn.Parameter, Tensor]:
    keys = [
        (weight_of(layer_of(model, name)), replace(precision, activation="16"))
        for name, precision in plan.items()
        if _changes_weight(model, name, precision)
    ]
    return {key[0]: cells[key] for key in keys}


def _changes_weight(model: nn.Module, name: str, precision: Precision) -> bool:
    return precision.quantizes_weight and holds_weight(layer_of(model, name))
