"""The door from a model, data and a plan to measured damage."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from mpsearch.calibration.calibration import Calibration
from mpsearch.core.evaluation import Evaluation
from mpsearch.core.plan import Plan
from mpsearch.estimation.context import Loss
from mpsearch.metrics.metric import Metric
from mpsearch.models.free_memory import room
from mpsearch.models.named import opened
from mpsearch.models.running import Batch, collect
from mpsearch.quantizers.registry import AnyQuantizer


def evaluate(
    model: nn.Module | str,
    batches: Iterable[Batch] | str,
    plan: Plan,
    *,
    metric: str | Metric | Callable[..., Any] | None = None,
    loss: Loss | None = None,
    quantizer: AnyQuantizer | None = None,
    calibration: Iterable[Batch] | None = None,
    memory_bytes: float | str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure what a plan does to a model: fake-quantized, on held-out data.

    Args:
        model: any module, or its name (`mpsearch.models.named`); it comes back bit for bit as it went in, also after an exception.
        batches: held-out data, read once.
        plan: layer name -> precision; layers that it does not name are left alone.
        metric: a name (`mpsearch.metrics.registry.METRICS`); or a function `metric(model, batch)`, or `metric(output, reference,
            batch)` with all that the quantized and the unquantized model return, told apart by the number of parameters without a
            default; it gives the mean over the samples of the batch, or of the second form also (B,) numbers. By default what fits
            outputs and targets: `kl`, `bernoulli-kl` or `relative-error`; `measured` of the result tells which and why.
        loss: `loss(model, batch) -> scalar`; by default, where there are targets that fit, the cross-entropy (integer labels), the
            binary cross-entropy (0/1 labels) or the squared error (numbers).
        quantizer: a name of `mpsearch.quantizers.QUANTIZERS`, a quantizer, or a function `quantizer(weight, precision)`; by default
            `RoundToNearest()`.
        calibration: data for the ranges of quantized inputs, and for a quantizer that looks at inputs; by default the held-out
            inputs themselves.
        memory_bytes: the most that the work may hold, the weights included (`8GB`, `50%`): what needs more is refused before it starts;
            by default all that is free.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        Mean KL to the unquantized model (of class scores), loss, accuracy and metric with standard errors, and the same for the
        unquantized model under `reference`.

    Raises:
        PlanError: where the plan names a layer that the model does not have, or tied layers at two precisions.
        EstimatorError: for unusable data, a model whose output is random, an output that is not finite, or work that does not
            fit in memory.
    """
    limit = room(memory_bytes)
    model, batches = opened(model, batches, memory_bytes=None if limit is None else limit.bytes)
    data = collect(batches, model)
    with Calibration(
        model,
        data if calibration is None else calibration,
        quantizer=quantizer,
        metric=metric,
        loss=loss,
        memory_bytes=memory_bytes,
        progress=progress,
        whole=data,
        example=data[0],
    ) as prepared:
        return prepared.evaluate(plan, data)
