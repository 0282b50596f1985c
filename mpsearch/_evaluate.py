"""The door from a model, data and a plan to measured damage."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mpsearch.batches import given_of
from mpsearch.determinism import probed_output
from mpsearch.errors import EstimatorError, PlanError, nearest
from mpsearch.estimator import Loss
from mpsearch.evaluation import Evaluation
from mpsearch.measure import Mean, cross_entropy, kl_divergence
from mpsearch.model import Batch, call, collect, predictions, preserved, samples, state_fingerprint
from mpsearch.modules import holds_weight, weight_of
from mpsearch.perturb import Quantizer, input_quantizers, input_ranges, inputs, quantized_weights, weights
from mpsearch.plan import Plan
from mpsearch.quantize import RoundToNearest
from mpsearch.undecided import tell_unnamed


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    plan: Plan,
    *,
    metric: Callable[[nn.Module, Batch], float] | None = None,
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
        metric: `metric(model, batch) -> float`, the mean over the samples of the batch.
        loss: `loss(model, batch) -> scalar`; by default the cross-entropy, where there are labels.
        quantizer: of the weights; by default `RoundToNearest()`.
        calibration: data for the ranges of quantized inputs; by default the held-out inputs themselves.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        Mean KL to the unquantized model, loss, accuracy and metric with standard errors, and the same for the
        unquantized model under `reference`.

    Raises:
        PlanError: where the plan names a layer that the model does not have, or tied layers at two precisions.
        EstimatorError: for unusable data, a model whose output is random, or an output that is not finite.
    """
    data = collect(batches, model)
    quantize: Quantizer = RoundToNearest() if quantizer is None else quantizer
    before = state_fingerprint(model)
    with preserved(model), torch.no_grad():
        _check_plan(model, plan)
        tell_unnamed(model, named_weights(model, plan), len(plan))
        probed_output(model, data[0])
        ranges = {}
        names = [name for name, precision in plan.items() if precision.quantizes_activation]
        if names:
            ranges = input_ranges(model, data if calibration is None else collect(calibration, model), names)
        values = quantized_weights(model, plan, quantize)
        functions = input_quantizers(model, plan, quantize, ranges)
        tallies = (Tally(metric, loss), Tally(metric, loss))
        bar = tqdm(data, desc="evaluate", disable=None if progress else True, leave=False)
        for number, batch in enumerate(bar):
            plain = predictions(model, call(model, batch), batch)
            tallies[0].add(model, batch, plain, None, number)
            with weights(values), inputs(functions):
                tallies[1].add(model, batch, predictions(model, call(model, batch), batch), plain[0], number)
    if state_fingerprint(model) != before:
        raise EstimatorError("the metric or the loss changed the model's parameters or buffers")
    return tallies[1].result(tallies[0].result(None))


def named_weights(model: nn.Module, plan: Plan) -> list[nn.Parameter]:
    """Weights of the layers that a plan names."""
    modules = [model.get_submodule(name) for name in plan]
    return [weight_of(module) for module in modules if holds_weight(module)]


class Tally:
    """Sums over batches of one model, quantized or not."""

    def __init__(self, metric: Callable[[nn.Module, Batch], float] | None, loss: Loss | None) -> None:
        self._metric, self._loss_function = metric, loss
        self._kl, self._loss, self._hits, self._score = Mean(), Mean(), Mean(), Mean()
        self._labels = True
        self._samples = 0

    def add(
        self,
        model: nn.Module,
        batch: Batch,
        predicted: tuple[Tensor, Tensor | None, Tensor],
        reference: Tensor | None,
        number: int,
    ) -> None:
        """Add one batch.

        Args:
            model: as it stands; run again for a metric or a loss of one's own.
            batch: the batch.
            predicted: what `predictions` makes of its output.
            reference: (N, C) logits of the unquantized model; None where this is it.
            number: of the batch.
        """
        count = samples(batch)
        logits, labels, index = predicted
        if not torch.isfinite(logits).all():
            what = "unquantized" if reference is None else "quantized"
            raise EstimatorError(f"the output of the {what} model is not finite in batch {number}")
        if logits.shape[-1] > 1:  # of one number a prediction there is none
            self._kl.add(kl_divergence(logits if reference is None else reference, logits), index, count)
        self._labels &= labels is not None
        if labels is not None:
            self._hits.add((logits.argmax(-1) == labels).double(), index, count)
            if self._loss_function is None:
                self._loss.add(cross_entropy(logits, labels), index, count)
        every = torch.arange(count)
        if self._loss_function is not None:
            value = float(self._loss_function(model, given_of(batch)))
            self._loss.add(torch.full((count,), value, dtype=torch.float64), torch.zeros_like(every), 1)
        if self._metric is not None:
            self._score.add(
                torch.full((count,), float(self._metric(model, given_of(batch))), dtype=torch.float64),
                torch.zeros_like(every),
                1,
            )
        self._samples += count

    def result(self, reference: Evaluation | None) -> Evaluation:
        """The means."""
        scored = self._labels or self._loss_function is not None
        return Evaluation(
            self._kl.value,
            self._kl.se,
            self._loss.value if scored else None,
            self._loss.se if scored else None,
            self._hits.value if self._labels else None,
            self._hits.se if self._labels else None,
            self._samples,
            self._score.value if self._metric is not None else None,
            self._score.se if self._metric is not None else None,
            reference,
        )


def _check_plan(model: nn.Module, plan: Plan) -> None:
    modules = dict(model.named_modules())
    if not plan:
        raise PlanError("the plan has no layers")
    at: dict[nn.Parameter, str] = {}
    for name, precision in plan.items():
        if name not in modules:
            raise PlanError(f"the plan names {name!r}, which the model does not have{nearest(name, modules)}")
        weight: Any = getattr(modules[name], "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise PlanError(f"the plan names {name!r}, a {type(modules[name]).__name__} without a weight")
        first = at.setdefault(weight, name)
        if (plan[first].weight, plan[first].group_size) != (precision.weight, precision.group_size):
            raise PlanError(f"{first!r} and {name!r} share a weight, but the plan has {plan[first]} and {precision}")
