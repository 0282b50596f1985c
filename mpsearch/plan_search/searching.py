"""The door from a model, data and a budget to the best plan that can be found, measured."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Unpack

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
from mpsearch.models.data.batches import missing_labels, reading_of
from mpsearch.models.data.splitting import check_sizes, first_samples, split
from mpsearch.models.determinism import PROBED
from mpsearch.models.fingerprints import described, difference, digest
from mpsearch.models.running import (
    Batch,
    collect,
    samples,
    targets_of,
)
from mpsearch.plan_search.environment import environment
from mpsearch.plan_search.goals import Goal, goal_of
from mpsearch.plan_search.options import SearchOptions, with_defaults
from mpsearch.plan_search.outdone import without_outdone
from mpsearch.plan_search.passes import PassBudget
from mpsearch.plan_search.planning import searched
from mpsearch.plan_search.results.measured_front import measured_front
from mpsearch.plan_search.results.result import SearchResult
from mpsearch.plan_search.schedule import Schedule
from mpsearch.plan_search.starting_tables import FEW
from mpsearch.plan_search.task import SearchTask, size
from mpsearch.quantizers.registry import AnyQuantizer

Effort = Literal["fast", "default", "thorough"]

#: Metrics as they are by default: known by their name.
_KNOWN = [metric() for metric in METRICS.values()]
#: Shares of the data where it is one set.
SHARES = {"score": 0.35, "select": 0.45, "report": 0.20}
#: The same where few passes are spent: what counts then is the sweep.
FEW_SHARES = {"score": 0.55, "select": 0.25, "report": 0.20}


def search(
    model: nn.Module,
    batches: Iterable[Batch],
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
        effort: `fast` (8 passes), `default` (40 + one for each cell of the table: 150 for 22 layers x 5 precisions) or `thorough` (four
            times that). A pass is one forward run over all data; a backward pass counts 2.
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
    sparing = effort == "fast" if max_passes is None else max_passes < FEW
    data = {"batches": collect(batches, model)}
    for name, part in (("select", settings["select"]), ("report", settings["report"])):
        if part is not None:
            data[name] = collect(part, model)
    if metric in ("loss", "accuracy") and loss is None:
        _check_labels(str(metric), data)
    parts = _parts(data, FEW_SHARES if sparing else SHARES, seed)
    _check_counted(parts)
    start = time.perf_counter()
    with Calibration(
        model,
        parts["score"],
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
        higher_is_better=settings["higher_is_better"],
        whole=[batch for part in data.values() for batch in part],
        example=first_samples(parts["score"][0], PROBED),
    ) as calibration:
        check_caches(estimators or (), calibration.decisions)
        goal.check(calibration.base)
        base = without_outdone(calibration.base, goal)
        choice = calibration.choice
        choice.warn(stacklevel=2)
        base = replace(base, unit=choice.metric.unit)
        identity = {
            **calibration.identity(choice.comparison),
            "parts": " ".join(f"{name}: {size(part)}" for name, part in parts.items()) + f", seed {seed}",
            "metric": choice.metric.name if choice.metric in _KNOWN else digest(described(choice.metric)),
        }
        earlier = _earlier(settings["previous"], identity)
        free = {} if earlier is None else earlier.finished.rows()
        limit = _limit(effort, max_passes, len(calibration.decisions) * len(calibration.precisions))
        checkpoint = settings["checkpoint"]
        with (
            MemoryStore(identity) if checkpoint is None else SQLiteStore(checkpoint, identity) as store,
            _bar(limit, shown=settings["progress"]) as bar,
        ):
            store.fill(free)
            passes = PassBudget(limit, free=free, watch=bar.update)
            calibration.keep_in(store)
            passes.charge(_preparing(calibration, parts, found=layers is None or isinstance(layers, LayerOptions)))
            task = SearchTask(
                calibration,
                calibration.context(choice.comparison),
                parts,
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
            **reading_of(data["batches"][0]),
            "samples": {name: size(part) for name, part in parts.items()},
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


def _preparing(calibration: Calibration, parts: Mapping[str, list[Batch]], *, found: bool) -> float:
    """Passes that making the model ready takes.

    Args:
        calibration: with its output, and the ranges of its inputs.
        parts: of the data.
        found: whether the layers were looked for, by a run over the first batch.
    """
    score = parts["score"]
    # at a few samples: who reads the weights, their costs, and twice: is it random?
    runs = (samples(score[0]) if found else 0) + 4 * samples(calibration.example)
    if any(option.quantizes_activation for option in calibration.precisions):
        runs += size(score)
    return runs / sum(map(size, parts.values()))


def _parts(data: Mapping[str, list[Batch]], shares: Mapping[str, float], seed: int) -> dict[str, list[Batch]]:
    """The three parts; those that are not given are split off."""
    missing = {name: share for name, share in shares.items() if name not in data}
    total = sum(missing.values())
    parts = split(data["batches"], {name: share / total for name, share in missing.items()}, seed)
    parts |= {name: part for name, part in data.items() if name in shares}
    check_sizes({name: size(part) for name, part in parts.items()})
    return {name: parts[name] for name in shares}


def _check_labels(metric: str, data: Mapping[str, list[Batch]]) -> None:
    for name, part in data.items():
        for number, batch in enumerate(part):
            if targets_of(batch) is None:
                raise EstimatorError(
                    f"the {metric} needs labels, batch {number} of {name} has {missing_labels(batch)}; give "
                    "(inputs, targets), or the metric 'kl'"
                )


def _check_counted(parts: Mapping[str, list[Batch]]) -> None:
    for name, part in parts.items():
        labels = [targets_of(batch) for batch in part]
        if all(values is not None and bool((values == -100).all()) for values in labels):
            raise EstimatorError(f"every label of the {name} part is -100, which means ignored: no prediction counts")


def _check_effort(effort: str, max_passes: float | None) -> None:
    known = ("fast", "default", "thorough")
    if not isinstance(effort, str) or effort not in known:
        raise EstimatorError(f"unknown effort {effort!r}{nearest(str(effort), known)}")
    if max_passes is None:
        return
    if not (checked_number(max_passes, "max_passes", float, 0.0, EstimatorError) > 0 and math.isfinite(max_passes)):
        raise EstimatorError(f"max_passes={max_passes}, expected a finite number above 0")


def _limit(effort: Effort, max_passes: float | None, cells: int) -> float:
    if max_passes is not None:
        return float(max_passes)
    return {"fast": 8.0, "default": 40.0 + cells, "thorough": 4 * (40.0 + cells)}[effort]
