"""The door from a model and data to a cost table."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Unpack, overload

from torch import nn

from mpsearch.calibration.calibration import Calibration, LayerKeywords, ProfileKeywords, check_keywords
from mpsearch.calibration.deciding import Resources
from mpsearch.calibration.families import checked_estimators
from mpsearch.checkpoints.store import Store
from mpsearch.core.forecast import Forecast
from mpsearch.core.layer import Layer
from mpsearch.core.layer_options import LayerOptions
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.core.table import CostTable
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Loss
from mpsearch.estimation.estimator import Estimator
from mpsearch.metrics.metric import Metric
from mpsearch.models.running import Batch
from mpsearch.quantizers.registry import AnyQuantizer


@overload
def profile(
    model: nn.Module | str,
    batches: Iterable[Batch] | str,
    estimator: Estimator,
    precisions: Sequence[Precision],
    *,
    metric: str | Metric | None = None,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | LayerOptions | None = None,
    quantizer: AnyQuantizer | None = None,
    resources: Resources = ("memory_bytes", "bitops"),
    checkpoint: str | Path | Store | None = None,
    progress: bool = True,
    **options: Unpack[ProfileKeywords],
) -> CostTable: ...


@overload
def profile(
    model: nn.Module | str,
    batches: Iterable[Batch] | str,
    estimator: Sequence[Estimator],
    precisions: Sequence[Precision],
    *,
    metric: str | Metric | None = None,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | LayerOptions | None = None,
    quantizer: AnyQuantizer | None = None,
    resources: Resources = ("memory_bytes", "bitops"),
    checkpoint: str | Path | Store | None = None,
    progress: bool = True,
    **options: Unpack[ProfileKeywords],
) -> list[CostTable]: ...


def profile(
    model: nn.Module | str,
    batches: Iterable[Batch] | str,
    estimator: Estimator | Sequence[Estimator],
    precisions: Sequence[Precision],
    *,
    metric: str | Metric | None = None,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | LayerOptions | None = None,
    quantizer: AnyQuantizer | None = None,
    resources: Resources = ("memory_bytes", "bitops"),
    checkpoint: str | Path | Store | None = None,
    progress: bool = True,
    **options: Unpack[ProfileKeywords],
) -> CostTable | list[CostTable]:
    """Fill a cost table: the damage and the costs of every precision of every layer.

    For several tables one after the other, or tables and then plans, prepare the model once: `mps.Calibration`.

    Args:
        model: any module, or its name (`mpsearch.models.named`); it comes back bit for bit as it went in, also after an exception.
        batches: calibration data, read once: `(inputs, targets)`, tensors, dicts of keywords, or what else
            `mpsearch.models.data.batches.arranged` reads.
        estimator: scores the cells; a sequence of them gives a list of tables.
        precisions: the options, `mps.precisions("w2 w4 w8")`.
        metric: what estimators compare outputs with the unquantized model's by: `kl` (class scores, tokens), `bernoulli-kl` (0/1
            labels), `mse`, `relative-error`, `psnr`, `cosine`, which need no labels; or `loss` with the data's targets. By default
            what fits the outputs and targets (`mpsearch.metrics.choice`); `origin["measured"]` tells, and a warning what was assumed.
        loss: `loss(model, batch) -> scalar` of your own for estimators that differentiate; or `kl`, `cross-entropy`, in place of
            `metric`.
        layers: the decisions, or `mps.LayerOptions` to find them by; by default all that `mps.layers` finds.
        quantizer: the one that will ship: a name of `mpsearch.quantizers.QUANTIZERS`, a quantizer, or a function
            `quantizer(weight, precision)`; by default `RoundToNearest()`.
        resources: names of resources, or own functions by name.
        checkpoint: a file that finished work goes to as it is finished; a run that finds it there goes on. Refused where
            weights, output, data, quantizer, layers, precisions or loss are not those that it was written for; an output that differs
            by no more than rounding (another machine, another number of threads) is warned of. An open `Store` is
            written to as it is, and stays open.
        progress: show a bar on stderr where that is a terminal.
        **options: `exclude`, names or patterns of layers to leave alone, and `groups`, as for `mps.layers`, both for the default
            `layers`; `allow`, options of single layers, `{"lm_head": "w8", "*.mlp.*": "w2 w3"}`, as for `mps.layers`, where those that
            are not in `precisions` are columns that other layers may not have; `fixed`, what is decided already: a plan, its file, or
            name or pattern -> one precision; `memory_bytes`, the most that the work may hold, the weights included (`8GB`, `50%`): what
            needs more is refused before it starts; by default all that is free.

    Returns:
        One table an estimator, with `origin` telling estimator, settings, passes, seconds, peak memory and fingerprints. `passes` are
        those of all runs that the table took; `passes_in_this_run` are fewer where a checkpoint had finished work.
        Estimators of one family (gradients; one decision at a time) run together and share passes: each of their tables
        tells the passes of them all, and under `shared_with` how many others they served. A group is scored as one; where a target ties
        it, its layers are scored alone too, where the estimator can, and share its score in proportion, so that the tie has a price
        (`tie_prices`); `origin["scored_together"]` names the other groups.

    Raises:
        EstimatorError: for unusable data, a model whose output is random, a score that is not finite, or work that does not fit in memory.
        TableError: for a model without quantizable layers, or a layer or resource that does not exist.
        TypeError: for a keyword that is none of these.
    """
    check_keywords("profile", options, ProfileKeywords)
    checked_estimators(estimator if isinstance(estimator, Sequence) else [estimator])
    if loss is not None and metric not in (None, "loss"):
        raise EstimatorError(f"metric={metric!r} and loss={loss!r} at once; give one of them")
    with Calibration(
        model,
        batches,
        precisions,
        layers=layers,
        quantizer=quantizer,
        metric=metric,
        loss=loss,
        resources=resources,
        checkpoint=checkpoint,
        progress=progress,
        **options,
    ) as calibration:
        return calibration.profile(estimator)


def forecast(
    model: nn.Module | str,
    batches: Iterable[Batch] | str,
    work: Estimator | Plan | Sequence[Estimator] | Sequence[Plan],
    precisions: Sequence[Precision] | None = None,
    *,
    metric: str | Metric | None = None,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | LayerOptions | None = None,
    quantizer: AnyQuantizer | None = None,
    **options: Unpack[LayerKeywords],
) -> Forecast:
    """What `profile` will take with an estimator, `evaluate` with a plan, or `measure_plans` with several, told before the work.

    Runs the same work on one sample, then on one batch where that is sure to fit in the memory that is free; of estimators that run
    each decision, six of these. A part of one weight is rounded at each precision.

    Args:
        model: as for `profile`.
        batches: as for `profile`.
        work: what is to be done: estimators, a plan, or plans.
        precisions: as for `profile`; of plans none.
        metric: as for `profile`.
        loss: as for `profile`.
        layers: as for `profile`.
        quantizer: as for `profile`.
        **options: `exclude`, `groups`, `allow`, `fixed`, as for `profile`.

    Returns:
        Passes, each over all batches, at most; seconds; the most memory that is held at one time, and by what. Nothing of an estimator
        that does not tell its passes (no method `cost`).

    Raises:
        TypeError: for a keyword that is none of these.

    >>> import torch
    >>> from mpsearch import precisions
    >>> from mpsearch.sensitivity import Fisher
    >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2))
    >>> told = forecast(model, [torch.ones(1, 1)], Fisher(draws=3), precisions("w2 w4"))
    >>> told.forward, told.backward, told.memory["weights"]     # 3 weights and 3 biases in float32
    (2.0, 3.0, 24)
    """
    check_keywords("forecast", options, LayerKeywords)
    return Calibration(
        model, batches, precisions, metric=metric, loss=loss, layers=layers, quantizer=quantizer, **options
    ).forecast(work)
