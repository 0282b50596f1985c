"""The door from a model and data to a cost table."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from mpsearch.allocation.ties import in_proportion
from mpsearch.checkpoints.checkpoint import Checkpoint, Counted, NoCheckpoint
from mpsearch.core.layer import Layer
from mpsearch.core.layer_options import Options, columns, with_options
from mpsearch.core.precision import Precision
from mpsearch.core.settings import check_kind, check_settings
from mpsearch.core.table import CostTable, Interactions
from mpsearch.core.wrapped_names import plain
from mpsearch.decisions.coverage import undecided
from mpsearch.decisions.finding import layers as find_layers
from mpsearch.decisions.mask import decidable, only_allowed, refused_options
from mpsearch.errors import EstimatorError, MpsearchWarning, TableError, nearest
from mpsearch.estimation.estimator import Context, Decision, Estimate, Estimator, Loss, Passes
from mpsearch.metrics.choice import MetricChoice, choose
from mpsearch.metrics.comparisons import KL, METRICS, Comparison, Metric, Own
from mpsearch.metrics.comparisons import Loss as TargetLoss
from mpsearch.models.data.batches import reading_of
from mpsearch.models.data.splitting import few
from mpsearch.models.determinism import PROBED, probed_output
from mpsearch.models.fingerprints import described, digest, output_identity
from mpsearch.models.modules.experts import filled, report, without_tokens
from mpsearch.models.modules.weights import layer_of, named_layers, weight_of
from mpsearch.models.peak_memory import peak_memory
from mpsearch.models.running import (
    Batch,
    collect,
    data_fingerprint,
    device_of,
    fingerprint,
    logits_of,
    preserved,
    state_fingerprint,
)
from mpsearch.quantizers.fake_quantization import Quantizer, checked_quantizer, input_ranges, quantized_weight
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources import RESOURCES, Resource
from mpsearch.resources.columns import (
    ResourceFunction,
    counted,
    measure_resources,
    named_functions,
    refused_cells,
    table_fields,
)

#: Most layers of a tie that are scored alone where that takes runs of the model.
_ALONE = 8


@overload
def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    estimator: Estimator,
    precisions: Sequence[Precision],
    *,
    metric: str | Metric | None = None,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    allow: Mapping[str, Options] | None = None,
    fixed: Any = None,
    quantizer: Quantizer | None = None,
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
) -> CostTable: ...


@overload
def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    estimator: Sequence[Estimator],
    precisions: Sequence[Precision],
    *,
    metric: str | Metric | None = None,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    allow: Mapping[str, Options] | None = None,
    fixed: Any = None,
    quantizer: Quantizer | None = None,
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
) -> list[CostTable]: ...


def profile(
    model: nn.Module,
    batches: Iterable[Batch],
    estimator: Estimator | Sequence[Estimator],
    precisions: Sequence[Precision],
    *,
    metric: str | Metric | None = None,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    allow: Mapping[str, Options] | None = None,
    fixed: Any = None,
    quantizer: Quantizer | None = None,
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
) -> CostTable | list[CostTable]:
    """Fill a cost table: the damage and the costs of every precision of every layer.

    Args:
        model: any module; it comes back bit for bit as it went in, also after an exception.
        batches: calibration data, read once: `(inputs, targets)`, tensors, dicts of keywords, or what else
            `mpsearch.models.data.batches.arranged` reads.
        estimator: scores the cells; a sequence of them gives a list of tables.
        precisions: the options, `mps.precisions("w2 w4 w8")`.
        metric: what estimators compare outputs with the unquantized model's by: `kl` (class scores, tokens), `bernoulli-kl` (0/1
            labels), `mse`, `relative-error`, `psnr`, `cosine`, which need no labels; or `loss` with the data's targets. By default
            what fits the outputs and targets (`mpsearch.metrics.choice`); `origin["measured"]` tells, and a warning what was assumed.
        loss: `loss(model, batch) -> scalar` of your own for estimators that differentiate; or `kl`, `cross-entropy`, in place of
            `metric`.
        layers: the decisions; by default all that `mps.layers` finds.
        exclude: names or patterns of layers to leave alone, for the default `layers`.
        groups: as for `mps.layers`.
        allow: options of single layers, `{"lm_head": "w8", "*.mlp.*": "w2 w3"}`, as for `mps.layers`; those that are not in
            `precisions` are columns that other layers may not have.
        fixed: what is decided already: a plan, its file, or name or pattern -> one precision.
        quantizer: `quantizer(weight, precision)`, the one that will ship; by default `RoundToNearest()`.
        resources: names of resources, or own functions by name.
        checkpoint: a file that finished work goes to as it is finished; a run that finds it there goes on. Refused where
            weights, output, data, quantizer, layers, precisions or loss are not those that it was written for; an output that differs
            by no more than rounding (another machine, another number of threads) is warned of. An open `Checkpoint` is
            written to as it is, and stays open.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        One table an estimator, with `origin` telling estimator, settings, passes, seconds, peak memory and fingerprints. `passes` are
        those of all runs that the table took; `passes_in_this_run` are fewer where a checkpoint had finished work.
        Estimators of one family (gradients; one unit at a time) run together and share passes: each of their tables
        tells the passes of them all, and under `shared_with` how many others they served. A group is scored as one; where a target ties
        it, its layers are scored alone too, where the estimator can, and share its score in proportion, so that the tie has a price
        (`tie_prices`); `origin["scored_together"]` names the other groups.

    Raises:
        EstimatorError: for unusable data, a model whose output is random, or a score that is not finite.
        TableError: for a model without quantizable layers, or a layer or resource that does not exist.
    """
    several = isinstance(estimator, Sequence)
    estimators: Sequence[Estimator] = estimator if isinstance(estimator, Sequence) else [estimator]
    tables = scored(
        model,
        batches,
        estimators,
        precisions,
        metric=metric,
        loss=loss,
        layers=layers,
        exclude=exclude,
        groups=groups,
        allow=allow,
        fixed=fixed,
        quantizer=quantizer,
        resources=resources,
        checkpoint=checkpoint,
        progress=progress,
        runs_for_members=True,
    )
    return tables if several else tables[0]


def scored(
    model: nn.Module,
    batches: Iterable[Batch],
    estimators: Sequence[Estimator],
    precisions: Sequence[Precision],
    *,
    metric: str | Metric | None = None,
    loss: Loss | Literal["kl", "cross-entropy"] | None = None,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    allow: Mapping[str, Options] | None = None,
    fixed: Any = None,
    quantizer: Quantizer | None = None,
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    checkpoint: str | Path | Checkpoint | None = None,
    progress: bool = True,
    runs_for_members: bool = False,
) -> list[CostTable]:
    """What `profile` does; `runs_for_members`: runs of the model may be spent on the layers of a tie alone."""
    data = collect(batches, model)
    if not estimators:
        raise EstimatorError("no estimator given")
    for part in estimators:
        if not callable(getattr(part, "estimate", None)):
            raise EstimatorError(f"{part!r} is no estimator: it has no method 'estimate'")
        check_settings(part, EstimatorError)
    own = checked_precisions(precisions)
    quantize = checked_quantizer(quantizer)
    before = state_fingerprint(model)
    with preserved(model, data[0]):
        found = find_layers(model, data[0], exclude=exclude, groups=groups) if layers is None else layers
        decided, options = columns(with_options(found, allow, fixed), own)
        check_layers(model, decided)
        check_caches(estimators, decided)
        decided, without = decidable(decided, options)
        decisions = decisions_of(decided)
        refused = refused_options(decided, options)
        allowed = only_allowed(quantize, decided, options, refused)
        usage = resource_columns(model, decided, options, resources, quantize, data[0])
        known = isinstance(checkpoint, Checkpoint) and isinstance(metric, Metric)  # a search has looked already
        output = None if known else probed_output(model, data[0])
        choice, chosen = _chosen(model, data, output, few(data[0], PROBED), metric, loss)
        ranges: dict[str, tuple[float, float]] = {}
        if any(option.quantizes_activation for option in options):
            ranges = input_ranges(model, data, [layer.name for layer in decided])
        unseen = without_tokens(model, decided, data)
        seen = data_fingerprint(data)
        undecided_facts = left_undecided(model, decided, exclude, without)
        keep: contextlib.AbstractContextManager[Checkpoint | NoCheckpoint] = NoCheckpoint()
        if isinstance(checkpoint, Checkpoint):
            keep = contextlib.nullcontext(checkpoint)
        elif checkpoint is not None and output is not None:
            identity = run_identity(model, logits_of(output), before, seen, decided, options, quantize, chosen)
            keep = Checkpoint(checkpoint, identity)
        with keep as kept:
            tables: dict[int, CostTable] = {}
            for members in families(estimators):
                family = [estimators[place] for place in members]
                alone = members_alone(family, decisions, runs=runs_for_members)
                passes = Passes()
                results = Counted(kept, functools.partial(dataclasses.astuple, passes))
                context = Context(
                    model,
                    data,
                    [*decisions, *alone],
                    options,
                    allowed,
                    ranges,
                    chosen,
                    _Progress(progress),
                    passes,
                    checkpoint=results,
                    beside=None if choice is None else choice.comparison,
                )
                start = time.perf_counter()
                with preserved(model), peak_memory(device_of(model)) as peak:
                    together = getattr(family[0], "together", None)
                    estimates = together(context, family) if together else [family[0].estimate(context)]
                seconds = time.perf_counter() - start
                for place, estimate in zip(members, estimates, strict=True):
                    origin = {
                        "estimator": repr(estimators[place]),
                        "quantizer": repr(quantize),
                        "loss": _title(chosen),
                        "measured": _title(chosen) if choice is None else choice.sentence,
                        "batches": len(data),
                        **reading_of(data[0]),
                        "passes": dataclasses.asdict(passes + Passes(*results.earlier)),
                        "passes_in_this_run": dataclasses.asdict(passes),
                        "shared_with": len(members) - 1,
                        "seconds": round(seconds, 3),
                        "peak_memory_bytes": peak.bytes,
                        "model_fingerprint": before,
                        "data_fingerprint": seen,
                        "undecided": undecided_facts,
                        "counted": counted(usage),
                        **estimate.facts,
                    }
                    tables[place] = _table(
                        estimators[place], estimate, decisions, alone, decided, options, usage, origin, refused, unseen
                    )
                    _tell_of_no_effect(context, estimate, unseen)
    if choice is not None and any(table.unit != "relative" for table in tables.values()):
        choice.warn(stacklevel=3)
        blind = [repr(estimators[place]) for place, table in tables.items() if table.unit == "nats"]
        if blind and choice.comparison.unit != "nats" and isinstance(chosen, Comparison):
            warnings.warn(
                f"{', '.join(blind)} takes a KL over a softmax, which does not see what all outputs have in common; {choice.sentence}; "
                "the estimator OutputDamage measures that",
                MpsearchWarning,
                stacklevel=3,
            )
    if state_fingerprint(model) != before:
        raise EstimatorError(f"{estimators!r} changed the model's parameters or buffers")
    return [tables[place] for place in range(len(estimators))]


def families(estimators: Sequence[Estimator]) -> list[list[int]]:
    """Places of estimators that run together: those with the same function `together`."""
    found: dict[Any, list[int]] = {}
    for place, one in enumerate(estimators):
        together = getattr(one, "together", None)
        found.setdefault(place if together is None else together, []).append(place)
    return list(found.values())


def members_alone(family: Sequence[Estimator], decisions: Sequence[Decision], *, runs: bool) -> list[Decision]:
    """Layers of groups that a target ties, each as a unit of its own, where the estimators score those too.

    Args:
        family: that runs together.
        decisions: the decisions.
        runs: for estimators that take runs of the model for each unit too, for groups of up to `_ALONE` layers.
    """
    kinds = {getattr(one, "scores_members", "no") for one in family}
    if kinds - {"free", "runs"} or ("runs" in kinds and not runs):
        return []
    most = _ALONE if "runs" in kinds else math.inf
    tied = [
        decision
        for decision in decisions
        if 1 < len(decision.layers) <= most and all(layer.target for layer in decision.layers)
    ]
    return [
        Decision(layer.name, (layer,))
        for decision in tied
        if "shared weight" not in decision.name
        for layer in decision.layers
    ]


def run_identity(
    model: nn.Module,
    output: Tensor,
    weights: str,
    data: str,
    decided: Sequence[Layer],
    options: Sequence[Precision],
    quantize: Quantizer,
    loss: Any,
) -> dict[str, str]:
    """What a score depends on: the model by its weights and by its output on a few samples.

    The quantizer is known by its settings and by what it does to the smallest layer.
    """
    quantizer = only_allowed(quantize, decided, options, refused_options(decided, options))
    sizes = {layer.name: layer.numel for layer in decided if not layer.is_cache}
    smallest = [(layer_of(model, name), name) for name in sorted(sizes, key=lambda name: sizes[name])[:1]]
    return {
        "weights": weights,
        "output": output_identity(model, output),
        "data": data,
        "layers": digest(*(_told_apart(layer) for layer in decided)),
        "precisions": " ".join(map(str, options)),
        "quantizer": digest(
            described(quantize),
            fingerprint(quantized_weight(*one, option, quantizer) for one in smallest for option in options),
        ),
        "loss": _title(loss) if loss in (KL(), TargetLoss()) else f"{_title(loss)} {digest(described(loss))}",
    }


def _told_apart(layer: Layer) -> str:
    """What of a layer a score depends on, besides its weight: what it may not have is never run."""
    return f"{plain(layer.name)} {plain(layer.group)}" + (
        f" {' '.join(map(str, layer.allowed))}" if layer.allowed else ""
    )


def _chosen(
    model: nn.Module,
    data: Sequence[Batch],
    output: Any,
    example: Batch,
    metric: str | Metric | None,
    loss: Loss | str | None,
) -> tuple[MetricChoice | None, Comparison | TargetLoss | Loss]:
    """What is measured, None where nobody looked, and what is differentiated."""
    if loss is not None and metric not in (None, "loss"):
        raise EstimatorError(f"metric={metric!r} and loss={loss!r} at once; give one of them")
    choice = None
    if output is not None:
        asked = "kl" if loss == "kl" else None if loss == "cross-entropy" else metric
        choice = choose(model, data, output, example, asked, loss=loss if callable(loss) else None)
    measured = metric if choice is None else choice.metric
    if loss == "cross-entropy":
        return choice, TargetLoss(probabilities=choice is not None and choice.reading.softmax)
    if callable(loss):
        return choice, loss
    if isinstance(measured, Own) and measured.title == "loss":
        return choice, measured.function
    if not isinstance(measured, Comparison | TargetLoss):
        raise EstimatorError(
            f"a table takes a metric that compares outputs ({', '.join(n for n, m in METRICS.items() if m.compares)}) or 'loss', not "
            f"{metric!r}; the estimator TaskMetric measures others"
        )
    return choice, measured


def _title(loss: Any) -> str:
    """Name of a loss for people."""
    if isinstance(loss, TargetLoss):
        return {"classes": "cross-entropy", "labels": "binary cross-entropy", "numbers": "squared error"}[loss.kind]
    return loss.name if isinstance(loss, Comparison) else _name(loss)


def _name(function: Any) -> str:
    """Name of a function, the same in every process."""
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def forecast(
    model: nn.Module,
    batches: Iterable[Batch],
    estimator: Estimator,
    precisions: Sequence[Precision],
    *,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    allow: Mapping[str, Options] | None = None,
    fixed: Any = None,
) -> Passes | None:
    """The passes over the data that `profile` will take with an estimator, at most; no more than one is run to tell.

    Args:
        model: as for `profile`.
        batches: as for `profile`.
        estimator: as for `profile`.
        precisions: as for `profile`.
        layers: as for `profile`.
        exclude: as for `profile`.
        groups: as for `profile`.
        allow: as for `profile`.
        fixed: as for `profile`.

    Returns:
        forward and backward passes, each over all batches; None for an estimator that does not tell (no method `cost`).

    >>> import torch
    >>> from mpsearch import precisions
    >>> from mpsearch.sensitivity import Fisher
    >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 2))
    >>> forecast(model, [torch.ones(1, 1)], Fisher(draws=3), precisions("w2 w4"))
    Passes(forward=2, backward=3)
    """
    data = collect(batches, model)
    with preserved(model, data[0]):
        found = find_layers(model, data[0], exclude=exclude, groups=groups) if layers is None else layers
    decided, options = columns(with_options(found, allow, fixed), checked_precisions(precisions))
    cost = getattr(estimator, "cost", None)
    decisions = decisions_of(decided)
    scored_units = len(decisions) + len(members_alone([estimator], decisions, runs=True))
    return None if cost is None else cost(len(data), scored_units, len(options))


class _Progress:
    """`progress(iterable, total, label)`: tqdm on stderr, off where that is no terminal."""

    def __init__(self, on: bool) -> None:
        self._disable = None if on else True  # None: tqdm looks at the terminal

    def __call__(self, iterable: Any, total: int, label: str) -> Any:
        return tqdm(iterable, total=total, desc=label, disable=self._disable, leave=False)


def checked_precisions(options: Sequence[Precision]) -> tuple[Precision, ...]:
    """The options as a tuple, refused where they are none or given twice."""
    check_kind(options, tuple | list, "precisions, mps.precisions('w2 w4 w8')", TableError)
    found = tuple(options)
    for place, option in enumerate(found):
        if not isinstance(option, Precision):
            raise TableError(f"precision {option!r} is a {type(option).__name__}; write mps.precisions('w2 w4 w8')")
        if option in found[:place]:
            raise TableError(f"precision {option} occurs twice")
    if not found:
        raise TableError("no precisions given; write mps.precisions('w2 w4 w8')")
    return found


def check_layers(model: nn.Module, decided: Sequence[Layer]) -> None:
    """Refuse decisions that the model does not hold as they are told."""
    modules = dict(model.named_modules()) | named_layers(model)
    seen: set[str] = set()
    for layer in decided:
        check_kind(layer, Layer, "layers, of mps.layers(model, batch)", TableError)
        if layer.name not in modules:
            raise TableError(f"the model has no layer {layer.name!r}{nearest(layer.name, modules)}")
        if layer.name in seen:
            raise TableError(f"layer {layer.name!r} occurs twice")
        if not isinstance(getattr(modules[layer.name], "weight", None), nn.Parameter):
            raise TableError(f"layer {layer.name!r} is a {type(modules[layer.name]).__name__} without a weight")
        seen.add(layer.name)
    if not decided:
        raise TableError("no layers to decide on")


def check_caches(estimators: Sequence[Estimator], decided: Sequence[Layer]) -> None:
    """Refuse estimators that would find nothing in a cache, and call it free."""
    names = [layer.name for layer in decided if layer.is_cache]
    for one in estimators:
        if names and not getattr(one, "scores_caches", False):
            raise EstimatorError(
                f"{type(one).__name__} looks at weights, and the cache {names[0]!r} has none; take an estimator that perturbs what goes "
                "into it, such as KLDivergence or FisherProjection, or leave out kv_cache=True"
            )


def decisions_of(decided: Sequence[Layer]) -> list[Decision]:
    """Layers by the precision that they share, in the order of the first of each."""
    members: dict[tuple[str, str], list[Layer]] = {}
    for layer in decided:
        members.setdefault(layer.decision, []).append(layer)
    return [Decision(name, tuple(found)) for (_, name), found in members.items()]


def resource_columns(
    model: nn.Module,
    decided: Sequence[Layer],
    options: Sequence[Precision],
    resources: Sequence[str] | Mapping[str, ResourceFunction],
    quantize: Quantizer,
    example: Batch,
) -> dict[str, Resource]:
    """What each option of each decision uses, by resource."""
    functions = named_functions(resources, RESOURCES, quantize)
    for function in functions.values():
        check_settings(function, TableError)
    return measure_resources(model, decided, options, functions, example)


def unscored(
    model: nn.Module,
    example: Batch,
    precisions: Sequence[Precision],
    decided: Sequence[Layer],
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    exclude: Sequence[str] = (),
) -> CostTable:
    """What every option costs, before any calibration: a table whose sensitivity is 0 where an option is allowed."""
    decided, options = columns(decided, checked_precisions(precisions))
    with preserved(model, example):
        check_layers(model, decided)
        decided, without = decidable(decided, options)
        usage = resource_columns(model, decided, options, resources, RoundToNearest(), example)
        origin = {"undecided": left_undecided(model, decided, exclude, without), "counted": counted(usage)}
    refused = refused_cells(usage) | refused_options(decided, options)
    sensitivity = np.where(refused, np.nan, 0.0)
    return CostTable(tuple(decided), options, sensitivity, unit="nats", origin=origin, **table_fields(usage))


def left_undecided(
    model: nn.Module, decided: Sequence[Layer], exclude: Sequence[str], without: Mapping[str, str]
) -> dict[str, Any]:
    """What no decision touches, for the origin of a table; `without` has the layers that no option fits, with the reasons."""
    weights = [weight_of(layer_of(model, layer.name)) for layer in decided if not layer.is_cache]
    return undecided(model, weights, exclude) | ({"without_option": dict(without)} if without else {})


def _tell_of_no_effect(context: Context, estimate: Estimate, unseen: set[str]) -> None:
    """Warn of layers that a rise of the loss calls free at every precision, though their weights change."""
    if estimate.unit == "relative":
        return
    free = dict.fromkeys(
        layer.name
        for decision, scores in zip(context.decisions, estimate.sensitivity, strict=True)
        if not scores.any()
        for layer in context.parameters(decision).values()
        if layer.name not in unseen and any(context.perturbation(layer, option).any() for option in context.precisions)
    )
    if free:
        shown = ", ".join(list(free)[:5]) + (f", ... ({len(free)} in all)" if len(free) > 5 else "")
        warnings.warn(
            f"the loss does not depend on {shown}: plans give them the fewest bits; exclude them if another output of the model counts, or "
            "if the model cuts their gradients off",
            MpsearchWarning,
            stacklevel=4,
        )


def _table(
    one: Estimator,
    estimate: Estimate,
    decisions: Sequence[Decision],
    alone: Sequence[Decision],
    decided: Sequence[Layer],
    options: tuple[Precision, ...],
    usage: Mapping[str, Resource],
    origin: Mapping[str, Any],
    refused: NDArray[np.bool_],
    idle: set[str],
) -> CostTable:
    shape = (len(decisions) + len(alone), len(options))
    for name, values in (("sensitivity", estimate.sensitivity), ("sensitivity_se", estimate.sensitivity_se)):
        if values is not None and np.shape(values) != shape:
            raise EstimatorError(f"{one!r} returned {name} of shape {np.shape(values)}, expected {shape}")
    if np.isinf(estimate.sensitivity).any():
        u, p = np.argwhere(np.isinf(estimate.sensitivity))[0]
        raise EstimatorError(
            f"sensitivity of layer {[*decisions, *alone][u].name!r} at {options[p]} is {estimate.sensitivity[u, p]}, "
            f"expected a finite number ({one!r})"
        )
    unit_of = {layer.name: u for u, decision in enumerate(decisions) for layer in decision.layers}
    rows = np.array([unit_of[layer.name] for layer in decided])
    own = {
        decision.name: np.maximum(row, 0.0)
        for decision, row in zip(alone, estimate.sensitivity[len(decisions) :], strict=True)
    }
    ones = np.ones(len(options))
    share = in_proportion(
        np.array([own.get(layer.name, ones) for layer in decided]), rows
    )  # the sum over a group is its score
    together = [
        decision.name for decision in decisions if len(decision.layers) > 1 and decision.layers[0].name not in own
    ]
    if together:
        origin = {**origin, "scored_together": together}
    scores = estimate.sensitivity[rows] * share
    se = None if estimate.sensitivity_se is None else estimate.sensitivity_se[rows] * share
    unseen = np.array([all(layer.name in idle for layer in decisions[u].layers) for u in rows])
    if unseen.any():
        names = [layer.name for layer, alone in zip(decided, unseen, strict=True) if alone]
        report(names)
        scores, origin = filled(scores, decided, unseen), {**origin, "scored_by_mean_of_experts": names}
        se = None if se is None else np.where(unseen[:, None], np.nan, se)
    return CostTable(
        tuple(decided),
        options,
        np.where(refused_cells(usage) | refused, np.nan, scores),
        se,
        unit=estimate.unit,
        origin=origin,
        interactions=None if estimate.pairs is None else _interactions(estimate.pairs, decisions, decided),
        **table_fields(usage),
    )


def _interactions(pairs: np.ndarray, decisions: Sequence[Decision], decided: Sequence[Layer]) -> Interactions:
    """Pairs of units as pairs of rows: of a group, the first member carries them."""
    row = {layer.name: number for number, layer in enumerate(decided)}
    rows = [row[decision.layers[0].name] for decision in decisions]
    count = pairs.shape[1]
    places = [
        (u, p, v, q) for u, v in itertools.combinations(range(len(decisions)), 2) for p, q in np.ndindex(count, count)
    ]
    kept = [place for place in places if pairs[place] != 0]
    return Interactions(
        np.array([(rows[u], p) for u, p, _, _ in kept], np.int64).reshape(-1, 2),
        np.array([(rows[v], q) for _, _, v, q in kept], np.int64).reshape(-1, 2),
        np.array([pairs[place] for place in kept], np.float64),
    )
