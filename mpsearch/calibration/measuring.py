"""The door from a model, data and many plans to the damage of each."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from mpsearch.calibration.calibration import Calibration
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.estimation.context import Loss
from mpsearch.metrics.metric import Metric
from mpsearch.models.free_memory import room
from mpsearch.models.named import opened
from mpsearch.models.running import Batch, collect
from mpsearch.quantizers.registry import AnyQuantizer


def measure_plans(
    model: nn.Module | str,
    batches: Iterable[Batch] | str,
    plans: Sequence[Plan],
    *,
    metric: str | Metric | Callable[..., Any] | None = None,
    higher_is_better: bool = False,
    loss: Loss | None = None,
    quantizer: AnyQuantizer | None = None,
    calibration: Iterable[Batch] | None = None,
    memory_bytes: float | str | None = None,
    progress: bool = True,
) -> MeasuredPlans:
    """Measure many plans on common data: by how much each is worse than the unquantized model, in what `evaluate` measures.

    The unquantized model runs once, and a layer is quantized once for each precision that any plan gives it; `evaluate` in a
    loop would do both for every plan. The quantized weights are held together: at most one copy of the weights for each
    precision in use.

    Args:
        model: any module, or its name (`mpsearch.models.named`); it comes back bit for bit as it went in, also after an exception.
        batches: held-out data, read once.
        plans: over the same layers.
        metric: as for `evaluate`; by default what fits outputs and targets.
        higher_is_better: direction of a function.
        loss: of one's own, for `metric="loss"`.
        quantizer: a name of `mpsearch.quantizers.QUANTIZERS`, a quantizer, or a function `quantizer(weight, precision)`; by default
            `RoundToNearest()`.
        calibration: data for the ranges of quantized inputs, and for a quantizer that looks at inputs; by default the held-out
            inputs themselves.
        memory_bytes: the most that the work may hold, the weights included (`8GB`, `50%`): what needs more is refused before it starts;
            by default all that is free.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        The plans in their order, by the names of the model, with damage and standard error over samples, in the unit of the metric
        (nats a prediction for the KL);
        `origin["measured"]` tells the metric and why it is that one.

    Raises:
        PlanError: for no plans, plans over different layers, or one that does not fit the model.
        EstimatorError: for unusable data, a model whose output is random, an output that is not finite, or work that does not
            fit in memory.

    >>> import torch
    >>> from mpsearch import Precision
    >>> _ = torch.manual_seed(0)
    >>> plans = [Plan({"0": Precision(bits)}) for bits in ("2", "8", "16")]
    >>> measured = measure_plans(nn.Sequential(nn.Linear(4, 3)), [torch.randn(8, 4)], plans)
    >>> bool(measured.damage[0] > measured.damage[1] > measured.damage[2] == 0)
    True
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
        higher_is_better=higher_is_better,
    ) as prepared:
        return prepared.measure(plans, data)
