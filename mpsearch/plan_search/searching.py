"""The door from a model, data and a budget to the best plan that can be found, measured."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from torch import nn
from tqdm.auto import tqdm

from mpsearch.calibration.calibration import Calibration
from mpsearch.calibration.families import check_caches
from mpsearch.checkpoints.memory import MemoryStore
from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.core.budget import Budget
from mpsearch.core.layer import Layer
from mpsearch.core.layer_options import LayerOptions
from mpsearch.core.precision import Precision
from mpsearch.core.settings import checked_number
from mpsearch.errors import EstimatorError, nearest
from mpsearch.metrics.choice import check_metric
from mpsearch.metrics.metric import Metric
from mpsearch.metrics.registry import METRICS
from mpsearch.models.data.batches import reading_of
from mpsearch.models.data.splitting import few_tokens
from mpsearch.models.determinism import PROBED
from mpsearch.models.fingerprints import described, difference, digest
from mpsearch.models.free_memory import room
from mpsearch.models.named import opened
from mpsearch.models.running import (
    Batch,
    samples,
)
from mpsearch.plan_search.data_parts import FEW_SHARES, SHARES, DataParts
from mpsearch.plan_search.environment import environment
from mpsearch.plan_search.forecasting import search_forecast
from mpsearch.plan_search.goals import Goal, goal_of
from mpsearch.plan_search.options import SearchOptions, with_defaults
from mpsearch.plan_search.outdone import without_outdone
from mpsearch.plan_search.passes import Effort, PassBudget, passes_of
from mpsearch.plan_search.planning import searched
from mpsearch.plan_search.results.measured_front import measured_front
from mpsearch.plan_search.results.result import SearchResult
from mpsearch.plan_search.schedule import Schedule
from mpsearch.plan_search.starting_tables import FEW
from mpsearch.plan_search.task import SearchTask, size
from mpsearch.quantizers.registry import AnyQuantizer

#: Metrics as they are by default: known by their name.
_KNOWN = [metric() for metric in METRICS.values()]


def search(
    model: nn.Module | str,
    batches: Iterable[Batch] | str,
    budget: Budget | Goal | None,
    precisions: Sequence[Precision],
    *,
    effort: Effort = "default",
    max_passes: float | None = None,
    metric: str | Metric | Callable[..., Any] | None = None,
    layers: Sequence[Layer] | LayerOptions | None = None,
    quantizer: AnyQuantizer | None = None,
    seed: int = 0,
    **options: Unpack[SearchOptions],
) -> SearchResult:
    """Find the best plan within a budget, measured on data that the search never saw, and compare it with uniform precision.

    Tables propose, measurement decides. The data is split in three.

    1. Score: cells are scored by one sweep of gradients and, as the effort allows, one perturbation at a time.
    2. Select: the optima of these tables, uniform precisions, and plans whose layers' errors cancel at the output
       (`mpsearch.estimation.surrogate`) are measured; a Bayesian linear model of the damage learns from each and proposes the next
       (Thompson sampling), and moves around the best plan close the search. Plans are compared on common samples and dropped as soon as
       they are clearly worse; those that are not are measured on the first part too (with few passes, only the best two). Where the
       metric is the KL and the inputs are numbers, the best of them are measured between the samples too (`mixup.mixed`).
    3. Report: the last part, which the search never saw, judges.

    Args:
        model: any module; it comes back bit for bit as it went in, also after an exception.
        batches: data, read once; targets are needed only for `metric="loss"` or `"accuracy"`, and tell what metric fits.
        budget: limits of the whole model; or a goal, `mps.WithinBudget(budget)`, `mps.LeastResource(resource, tolerance=...)`,
            `mps.WholeFront(over=...)`; None with `tolerance` or `front` alone.
        precisions: the options, `mps.precisions("w2 w4 w8")`.
        effort: `fast` (8 passes), `default` (40 + one for each cell of the table, 120 at most, which it is from 16 layers x 5 precisions
            on) or `thorough` (four times that). A pass is one forward run over all data; a backward pass counts 2.
        max_passes: a number of your own instead.
        metric: what is measured. Against the unquantized output: `kl` (class scores, tokens), `bernoulli-kl` (0/1 labels), `mse`,
            `relative-error` (noise over signal), `psnr`, `cosine`. Rise of the `loss` (cross-entropy of integer labels, binary
            cross-entropy of 0/1 labels, squared error of numbers, a model's own), or drop of the `accuracy`. Or a function
            `metric(model, batch)` or `metric(output, reference, batch)`, told apart by the number of parameters without a default
            (`mpsearch.metrics.own.Own`). By default what fits: `relative-error` for numbers (targets that are floats, images,
            signals, embeddings, one output a sample), `bernoulli-kl` for 0/1 labels, else `kl`; the result tells which and why, and a
            warning what was assumed. Tables compare outputs by the metric, or where it does not by the default one.
        layers: the decisions; or which there are to be, `mps.LayerOptions(...)`; by default all that `mps.layers` finds.
        quantizer: the one that will ship: a name of `mpsearch.quantizers.QUANTIZERS`, a quantizer, or a function
            `quantizer(weight, precision)`; by default `RoundToNearest()`.
        seed: of the split and of all draws.
        **options: `SearchOptions`: data of your own for the parts, loss, tolerance, front, estimators, proposers, single layers, resources,
            checkpoint, an earlier search.

    Returns:
        The plan, a verdict on mixed precision, the comparison on the third part, and all that was measured.

    Raises:
        InfeasibleError: where no plan meets the budget, or no measured plan stays within the tolerance.
        EstimatorError: for too little data, too few passes, or an output that is not finite.
        BudgetError: for a budget or goal that does not fit the resources.
        PlanError: for a plan that a proposer of your own names outside the budget.
        TableError: for a model without quantizable layers.
        TypeError: for an unknown keyword.
    """
    own = ("effort", "max_passes", "metric", "layers", "quantizer", "seed")
    settings = with_defaults(options, own)
    seed = checked_number(seed, "seed", int, 0, EstimatorError)  # numpy's whole numbers are none of JSON
    goal = goal_of(budget, tolerance=settings["tolerance"], minimize=settings["minimize"], front=settings["front"])
    schedule = Schedule.of(settings["proposers"])
    check_metric(metric)
    loss, estimators = settings["loss"], settings["estimators"]
    if loss is not None and metric != "loss":
        raise EstimatorError(f"loss= is for metric='loss', got metric={metric!r}")
    _check_effort(effort, max_passes)
    there = room(settings["memory_bytes"])
    model, batches = opened(model, batches, memory_bytes=None if there is None else there.bytes)
    few = effort == "fast" if max_passes is None else max_passes < FEW
    data = DataParts.of(
        model,
        {"batches": batches, "select": settings["select"], "report": settings["report"]},
        FEW_SHARES if few else SHARES,
        seed,
        labels_for=str(metric) if metric in ("loss", "accuracy") and loss is None else None,
    )
    score = data.parts["score"]
    start = time.perf_counter()
    with Calibration(
        model,
        score,
        precisions,
        layers=layers,
        quantizer=quantizer,
        metric=metric,
        loss=loss,
        resources=settings["resources"],
        progress=False,
        exclude=settings["exclude"],
        groups=settings["groups"],
        allow=settings["allow"],
        fixed=settings["fixed"],
        memory_bytes=settings["memory_bytes"],
        higher_is_better=settings["higher_is_better"],
        whole=data.every,
        example=few_tokens(score[0], PROBED),
    ) as calibration:
        check_caches(estimators or (), calibration.decisions)
        goal.check(calibration.base)
        base = without_outdone(calibration.base, goal)
        choice = calibration.choice
        calibration.run_by("the metric or the loss")
        choice.warn()
        base = replace(base, unit=choice.metric.unit)
        identity = {**calibration.identity(choice.comparison), **_further_identity(data, choice.metric, seed)}
        earlier = _earlier(settings["previous"], identity)
        free = {} if earlier is None else earlier.finished.rows()
        cells = len(calibration.decisions) * len(calibration.precisions)
        limit = passes_of(effort, cells) if max_passes is None else float(max_passes)
        calibration.start_search(
            lambda: search_forecast(calibration, limit, estimators, data.parts["select"]), shown=settings["progress"]
        )
        checkpoint = settings["checkpoint"]
        with (
            MemoryStore(identity) if checkpoint is None else SQLiteStore(checkpoint, identity) as store,
            _bar(limit, shown=settings["progress"]) as bar,
        ):
            store.fill(free)
            passes = PassBudget(limit, free=free, watch=bar.update)
            calibration.keep_in(store)
            finds_layers = layers is None or isinstance(layers, LayerOptions)
            passes.charge(_preparing(calibration, data, finds_layers=finds_layers))
            task = SearchTask(
                calibration,
                calibration.context(choice.comparison),
                data.parts,
                base,
                choice,
                goal,
                passes,
                seed,
                estimators,
                schedule,
            )
            findings, scores = searched(task)
            finished = MemoryStore(identity, store.rows())
    uniform = next((row for row in findings.comparison if row.role == "uniform"), None)
    return SearchResult(
        plan=findings.plan,
        verdict=findings.verdict.text,
        wins=findings.verdict.wins,
        measured=findings.comparison[0].evaluation,
        uniform=None if uniform is None else (uniform.name, uniform.evaluation),
        comparison=findings.comparison,
        front=measured_front(findings.plans, goal.resource),
        tables=findings.tables,
        plans=findings.plans,
        passes=round(passes.used, 4),
        settings={
            "effort": effort if max_passes is None else None,
            "max_passes": limit,
            **goal.settings,
            "metric": choice.metric.name,
            "unit": choice.metric.unit,
            "measured": choice.sentence,
            "precisions": [str(option) for option in calibration.precisions],
            "quantizer": repr(calibration.quantizer),
            **({} if settings["proposers"] is None else {"proposers": [repr(part) for part in schedule.late]}),
            "seed": seed,
            **reading_of(data.whole["batches"][0]),
            "samples": data.sizes,
            "model_fingerprint": calibration.fingerprint,
            "stages": passes.stages,
            "environment": environment(),
        },
        seconds=time.perf_counter() - start,
        identity=identity,
        finished=finished,
        surrogate=scores.surrogate,
        passes_in_this_run=round(passes.used - passes.reused, 4),
    )


def _earlier(previous: SearchResult | str | Path | None, identity: Mapping[str, str]) -> SearchResult | None:
    """The earlier search, held against this one."""
    if previous is None:
        return None
    earlier = previous if isinstance(previous, SearchResult) else SearchResult.load(previous)
    reason = difference(earlier.identity, {**earlier.identity, **identity})
    if reason is not None:
        raise EstimatorError(f"the previous search was for {reason}")
    return earlier


def _bar(limit: float, *, shown: bool) -> Any:
    return tqdm(
        total=limit,
        desc="Search",
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} passes [{elapsed}<{remaining}]",
        disable=None if shown else True,
        leave=False,
    )


def _preparing(calibration: Calibration, data: DataParts, *, finds_layers: bool) -> float:
    """Passes that making the model ready takes; `finds_layers` by a run over the first batch."""
    score = data.parts["score"]
    # at a few samples: who reads the weights, their costs, and twice: is it random?
    runs = (samples(score[0]) if finds_layers else 0) + 4 * samples(calibration.example)
    if any(option.quantizes_activation for option in calibration.precisions):
        runs += size(score)  # ranges of the inputs
    return runs / size(data.every)


def _further_identity(data: DataParts, metric: Metric, seed: int) -> dict[str, str]:
    """What results of a search depend on beyond those of a table."""
    return {
        "parts": " ".join(f"{name}: {count}" for name, count in data.sizes.items()) + f", seed {seed}",
        "metric": metric.name if metric in _KNOWN else digest(described(metric)),
    }


def _check_effort(effort: str, max_passes: float | None) -> None:
    known = ("fast", "default", "thorough")
    if not isinstance(effort, str) or effort not in known:
        raise EstimatorError(f"unknown effort {effort!r}{nearest(str(effort), known)}")
    if max_passes is None:
        return
    if not (checked_number(max_passes, "max_passes", float, 0.0, EstimatorError) > 0 and math.isfinite(max_passes)):
        raise EstimatorError(f"max_passes={max_passes}, expected a finite number above 0")
