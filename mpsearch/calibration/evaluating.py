"""The door from a model, data and a plan to measured damage."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from mpsearch.core.evaluation import Evaluation
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.core.settings import check_kind
from mpsearch.core.wrapped_names import by_names_of
from mpsearch.decisions.coverage import tell_unnamed
from mpsearch.errors import EstimatorError, PlanError, nearest
from mpsearch.estimation.estimator import Loss
from mpsearch.metrics.choice import MetricChoice, check_metric, choose
from mpsearch.metrics.divergences import KL
from mpsearch.metrics.metric import Floats, Metric
from mpsearch.metrics.own import Own
from mpsearch.metrics.runs import Run, run
from mpsearch.metrics.statistics import Mean
from mpsearch.metrics.targets import Loss as TargetLoss
from mpsearch.models.data.splitting import few
from mpsearch.models.determinism import PROBED, probed_output
from mpsearch.models.modules.weights import holds_weight, layer_of, named_layers, operands_of, weight_of
from mpsearch.models.running import Batch, collect, preserved, state_fingerprint
from mpsearch.quantizers.fake_quantization import (
    Quantizer,
    checked_quantizer,
    input_quantizers,
    input_ranges,
    inputs,
    quantized_weights,
    weights,
)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: Plan,
    *,
    metric: str | Metric | Callable[..., Any] | None = None,
    loss: Loss | None = None,
    quantizer: Quantizer | None = None,
    calibration: Iterable[Batch] | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure what a plan does to a model: fake-quantized, on held-out data.

    Args:
        model: any module; it comes back bit for bit as it went in, also after an exception.
        batches: held-out data, read once.
        plan: layer name -> precision; layers that it does not name are left alone.
        metric: a name (`mpsearch.metrics.registry.METRICS`); or a function `metric(model, batch)`, or `metric(output, reference,
            batch)` with all that the quantized and the unquantized model return, told apart by the number of parameters without a
            default; it gives the mean over the samples of the batch, or of the second form also (B,) numbers. By default what fits
            outputs and targets: `kl`, `bernoulli-kl` or `relative-error`; `measured` of the result tells which and why.
        loss: `loss(model, batch) -> scalar`; by default, where there are targets that fit, the cross-entropy (integer labels), the
            binary cross-entropy (0/1 labels) or the squared error (numbers).
        quantizer: of the weights; by default `RoundToNearest()`.
        calibration: data for the ranges of quantized inputs; by default the held-out inputs themselves.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        Mean KL to the unquantized model (of class scores), loss, accuracy and metric with standard errors, and the same for the
        unquantized model under `reference`.

    Raises:
        PlanError: where the plan names a layer that the model does not have, or tied layers at two precisions.
        EstimatorError: for unusable data, a model whose output is random, or an output that is not finite.
    """
    data = collect(batches, model)
    check_metric(metric)
    quantize = checked_quantizer(quantizer)
    before = state_fingerprint(model)
    with preserved(model, data[0]), torch.no_grad():
        plan = named_in(model, plan)
        _check_plan(model, plan)
        tell_unnamed(model, named_weights(model, plan), len(plan))
        choice = choose(model, data, probed_output(model, data[0]), few(data[0], PROBED), metric, loss=loss)
        ranges = {}
        names = [name for name, precision in plan.items() if precision.quantizes_activation]
        if names:
            ranges = input_ranges(model, data if calibration is None else collect(calibration, model), names)
        values = quantized_weights(model, plan, quantize)
        functions = input_quantizers(model, plan, quantize, ranges)
        tallies = (Tally(choice, loss), Tally(choice, loss))
        bar = tqdm(data, desc="evaluate", disable=None if progress else True, leave=False)
        for number, batch in enumerate(bar):
            plain = run(model, batch)
            tallies[0].add(model, batch, plain, None, number)
            with weights(values), inputs(functions):
                tallies[1].add(model, batch, run(model, batch), plain, number)
    if state_fingerprint(model) != before:
        raise EstimatorError("the metric or the loss changed the model's parameters or buffers")
    choice.warn(stacklevel=2)
    return tallies[1].result(tallies[0].result(None))


def named_in(model: nn.Module, plan: Plan) -> Plan:
    """The plan by the names of the model, of which one may be wrapped (torch.compile, data parallelism) and the other not."""
    check_kind(plan, Mapping, "a plan, layer -> precision", PlanError)
    return by_names_of(plan, named_layers(model))


def named_weights(model: nn.Module, plan: Plan) -> list[nn.Parameter]:
    """Weights of the layers that a plan names."""
    modules = [layer_of(model, name) for name in plan]
    return [weight_of(module) for module in modules if holds_weight(module)]


class Tally:
    """Means over batches of one model, quantized or not.

    Args:
        choice: of the metric; those that go with it (KL of class scores, loss and accuracy where there are targets) are measured too.
        loss: of one's own, in place of that with the data's targets.
    """

    def __init__(self, choice: MetricChoice, loss: Loss | None = None) -> None:
        self._choice = choice
        along = [
            KL(choice.reading.softmax) if choice.reading.kind == "classes" else None,
            choice.loss if loss is None else Own(loss, title="loss"),
            choice.accuracy,
        ]
        self._metrics: dict[str, Metric] = {metric.title: metric for metric in along if metric is not None}
        title = choice.metric.title
        self._metrics[title if title in ("kl", "loss", "accuracy") else "metric"] = choice.metric
        self._means = {name: Mean() for name in self._metrics}
        self._samples = 0

    def add(
        self, model: nn.Module, batch: Batch, found: Run, reference: Run | None, number: int
    ) -> tuple[Floats, Floats]:
        """Add one batch.

        Args:
            model: as it stands; run again for a metric or a loss of one's own.
            batch: the batch.
            found: what the model makes of it.
            reference: what the unquantized model makes of it; None where this is it.
            number: of the batch.

        Returns:
            (n,) sums and (n,) weights of the samples by the chosen metric.
        """
        if not torch.isfinite(found.rows).all():
            what = "unquantized" if reference is None else "quantized"
            raise EstimatorError(f"the output of the {what} model is not finite in batch {number}")
        for name, metric in list(self._metrics.items()):
            along = name in ("loss", "accuracy") and metric is not self._choice.metric and not isinstance(metric, Own)
            if along and self._missing(model, batch, found):  # in some batches: then there is no mean
                del self._metrics[name], self._means[name]
                continue
            sums, counts = metric.of(model, batch, found, reference)
            self._means[name].add_samples(torch.from_numpy(sums), torch.from_numpy(counts))
            if metric is self._choice.metric:
                chosen = sums, counts
        self._samples += found.samples
        return chosen

    def _missing(self, model: nn.Module, batch: Batch, found: Run) -> bool:
        with_targets = self._choice.loss
        return not isinstance(with_targets, TargetLoss) or with_targets.targets(model, batch, found) is None

    def result(self, reference: Evaluation | None) -> Evaluation:
        """The means."""
        values: dict[str, tuple[float, float]] = {}
        for name, metric in self._metrics.items():
            mean = self._means[name]
            values[name] = metric.shown(mean.value), metric.shown_se(mean.value, mean.se)
        absent: tuple[float | None, float | None] = (None, None)
        kl, kl_se = values.get("kl", (math.nan, math.nan))
        loss, loss_se = values.get("loss", absent)
        accuracy, accuracy_se = values.get("accuracy", absent)
        shown, shown_se = values.get("metric", absent)
        other = self._metrics.get("metric")
        return Evaluation(
            kl,
            kl_se,
            loss,
            loss_se,
            accuracy,
            accuracy_se,
            self._samples,
            shown,
            shown_se,
            reference,
            None if other is None else other.title,
            None if other is None else other.shown_unit,
            self._choice.sentence,
        )


def _check_plan(model: nn.Module, plan: Plan) -> None:
    for precision in plan.values():
        check_kind(precision, Precision, "precisions in the plan, mps.Precision('4')", PlanError)
    modules = dict(model.named_modules()) | named_layers(model)
    if not plan:
        raise PlanError("the plan has no layers")
    at: dict[nn.Parameter, str] = {}
    within = operands_of(model).within
    for name, precision in plan.items():
        if name not in modules:
            raise PlanError(f"the plan names {name!r}, which the model does not have{nearest(name, modules)}")
        weight: Any = getattr(modules[name], "weight", None)
        if name in within and within[name] not in plan:
            raise PlanError(f"the weight of {name!r} lies in that of {within[name]!r}: the plan must name that")
        if name not in within and not isinstance(weight, nn.Parameter):
            raise PlanError(f"the plan names {name!r}, a {type(modules[name]).__name__} without a weight")
        first = within.get(name) or at.setdefault(weight, name)
        if (plan[first].weight, plan[first].group_size) != (precision.weight, precision.group_size):
            raise PlanError(f"{first!r} and {name!r} share a weight, but the plan has {plan[first]} and {precision}")
