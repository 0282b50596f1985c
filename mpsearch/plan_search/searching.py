"""The door from a model, data and a budget to the best plan that can be found, measured."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from mpsearch.calibration.deciding import (
    check_layers,
    checked_precisions,
    decisions_of,
    left_undecided,
    resource_columns,
)
from mpsearch.calibration.families import check_caches
from mpsearch.calibration.identity import run_identity
from mpsearch.checkpoints.checkpoint import Checkpoint
from mpsearch.core.budget import Budget
from mpsearch.core.layer import Layer
from mpsearch.core.layer_options import Options as LayerOptions
from mpsearch.core.layer_options import columns, with_options
from mpsearch.core.precision import Precision
from mpsearch.core.settings import checked_number
from mpsearch.core.table import CostTable
from mpsearch.decisions.finding import layers as find_layers
from mpsearch.decisions.mask import decidable, refused_options
from mpsearch.errors import BudgetError, EstimatorError, nearest
from mpsearch.estimation.estimator import Context, Estimator, Loss
from mpsearch.metrics.choice import check_metric, choose
from mpsearch.metrics.comparisons import METRICS, Metric
from mpsearch.models.data.batches import missing_labels, reading_of
from mpsearch.models.data.splitting import check_sizes, few, split
from mpsearch.models.determinism import PROBED, probed_output
from mpsearch.models.fingerprints import described, difference, digest
from mpsearch.models.running import (
    Batch,
    collect,
    data_fingerprint,
    logits_of,
    preserved,
    samples,
    state_fingerprint,
    targets_of,
)
from mpsearch.plan_search.environment import environment
from mpsearch.plan_search.goals import Goal
from mpsearch.plan_search.outdone import without_outdone
from mpsearch.plan_search.passes import PassBudget
from mpsearch.plan_search.result import SearchResult
from mpsearch.plan_search.starting_tables import FEW
from mpsearch.plan_search.strategies import Stages, size
from mpsearch.quantizers.fake_quantization import Quantizer, checked_quantizer, input_ranges
from mpsearch.resources.columns import ResourceFunction, counted, refused_cells, table_fields

Options = NDArray[np.int64]
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
    budget: Budget | None,
    precisions: Sequence[Precision],
    *,
    select: Iterable[Batch] | None = None,
    report: Iterable[Batch] | None = None,
    effort: Effort = "default",
    max_passes: float | None = None,
    metric: str | Metric | Callable[..., Any] | None = None,
    loss: Loss | None = None,
    higher_is_better: bool = False,
    tolerance: float | None = None,
    minimize: str = "memory_bytes",
    front: bool = False,
    estimators: Sequence[Estimator] | None = None,
    layers: Sequence[Layer] | None = None,
    exclude: Sequence[str] = (),
    groups: Any = "auto",
    allow: Mapping[str, LayerOptions] | None = None,
    fixed: Any = None,
    quantizer: Quantizer | None = None,
    resources: Sequence[str] | Mapping[str, ResourceFunction] = ("memory_bytes", "bitops"),
    checkpoint: str | Path | None = None,
    previous: SearchResult | str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Find the best plan within a budget, measured on data that the search never saw, and compare it with uniform precision.

    Tables propose, measurement decides. The data is split in three.

    1. Score: cells are scored by one sweep of gradients and, as the effort allows, one perturbation at a time.
    2. Select: the optima of these tables, uniform precisions, and plans whose layers' errors cancel at the output
       (`mpsearch.estimation.surrogate`) are measured; a Bayesian linear model of the damage learns from each and proposes the next
       (Thompson sampling), and moves around the best plan close the search. Plans are compared on common samples and dropped as soon as
       they are clearly worse; those that are not are measured on the first part too (with few passes, only the best two). Where the
       metric is the KL and the inputs are numbers, the best of them are measured between the samples too (`vicinal.mixed`).
    3. Report: the last part, which the search never saw, judges.

    Args:
        model: any module; it comes back bit for bit as it went in, also after an exception.
        batches: data, read once; targets are needed only for `metric="loss"` or `"accuracy"`, and tell what metric fits.
        budget: limits of the whole model; None with `tolerance` or `front` alone.
        precisions: the options, `mps.precisions("w2 w4 w8")`.
        select: data to select plans on; by default 45 % of `batches` (25 % where passes are few).
        report: data to report on; by default 20 % of `batches`.
        effort: `fast` (8 passes), `default` (40 + one for each cell of the table: 150 for 22 layers x 5 precisions) or `thorough` (four
            times that). A pass is one forward run over all data; a backward pass counts 2.
        max_passes: a number of one's own instead.
        metric: what is measured. Against the unquantized output: `kl` (class scores, tokens), `bernoulli-kl` (0/1 labels), `mse`,
            `relative-error` (noise over signal), `psnr`, `cosine`. Rise of the `loss` (cross-entropy of integer labels, binary
            cross-entropy of 0/1 labels, squared error of numbers, a model's own), or drop of the `accuracy`. Or a function
            `metric(model, batch)` or `metric(output, reference, batch)`, told apart by the number of parameters without a default
            (`mpsearch.metrics.comparisons.Own`). By default what fits: `relative-error` for numbers (targets that are floats, images,
            signals, embeddings, one output a sample), `bernoulli-kl` for 0/1 labels, else `kl`; the result tells which and why, and a
            warning what was assumed. Tables compare outputs by the metric, or where it does not by the default one.
        loss: `loss(model, batch) -> scalar` of one's own, for `metric="loss"`.
        higher_is_better: direction of a metric of one's own.
        tolerance: find the least `minimize` instead, with a damage of at most this.
        minimize: resource, with `tolerance`.
        front: measure a whole Pareto curve over the budget's first resource, or over `minimize`.
        estimators: tables to start from instead of the default ones.
        layers: the decisions; by default all that `mps.layers` finds.
        exclude: names or patterns of layers to leave alone, for the default `layers`.
        groups: as for `mps.layers`.
        allow: options of single layers, `{"lm_head": "w8", "*.mlp.*": "w2 w3"}`, as for `mps.layers`; those that are not in
            `precisions` are columns that other layers may not have. Uniform precision, which the plan is compared with, is then uniform
            where that is allowed.
        fixed: what is decided already: a plan, its file, or name or pattern -> one precision.
        quantizer: `quantizer(weight, precision)`, the one that will ship; by default `RoundToNearest()`.
        resources: names of resources, or own functions by name.
        checkpoint: a file that finished work goes to; a run that finds it there goes on, and ends with the same result.
        previous: a result, or the folder that it was saved to, of a search on the same model and data: all that it has run is
            free.
        seed: of the split and of all draws.
        progress: show a bar on stderr where that is a terminal.

    Returns:
        The plan, a verdict on mixed precision, the comparison on the third part, and all that was measured.

    Raises:
        InfeasibleError: where no plan meets the budget, or no measured plan stays within the tolerance.
        EstimatorError: for too little data, too few passes, or an output that is not finite.
        BudgetError: for a budget or goal that does not fit the resources.
        TableError: for a model without quantizable layers.
    """
    seed = checked_number(seed, "seed", int, 0, EstimatorError)  # numpy's whole numbers are none of JSON
    if tolerance is not None:
        tolerance = checked_number(tolerance, "tolerance", float, 0.0, BudgetError)
    goal = Goal(budget, tolerance, minimize, front)
    own = checked_precisions(precisions)
    quantize = checked_quantizer(quantizer)
    check_metric(metric)
    if loss is not None and metric != "loss":
        raise EstimatorError(f"loss= is for metric='loss', got metric={metric!r}")
    _check_effort(effort, max_passes)
    sparing = effort == "fast" if max_passes is None else max_passes < FEW
    given = {"batches": collect(batches, model)}
    given |= {name: collect(part, model) for name, part in (("select", select), ("report", report)) if part is not None}
    if metric in ("loss", "accuracy") and loss is None:
        _check_labels(str(metric), given)
    parts = _parts(given, FEW_SHARES if sparing else SHARES, seed)
    _check_counted(parts)
    before = state_fingerprint(model)
    start = time.perf_counter()
    example = few(parts["score"][0], PROBED)
    with preserved(model, example):
        found = find_layers(model, parts["score"][0], exclude=exclude, groups=groups) if layers is None else layers
        decided, options = columns(with_options(found, allow, fixed), own)
        check_layers(model, decided)
        decided, without = decidable(decided, options)
        check_caches(estimators or (), decisions_of(decided))
        usage = resource_columns(model, decided, options, resources, quantize, example)
        base = CostTable(
            tuple(decided),
            options,
            np.where(refused_cells(usage) | refused_options(decided, options), np.nan, 0.0),
            origin={"undecided": left_undecided(model, decided, exclude, without), "counted": counted(usage)},
            **table_fields(usage),
        )
        goal.check(base)
        base = without_outdone(base, goal)
        output = probed_output(model, example)
        everything = [batch for part in given.values() for batch in part]
        choice = choose(model, everything, output, example, metric, loss=loss, higher_is_better=higher_is_better)
        choice.warn(stacklevel=2)
        base = replace(base, unit=choice.metric.unit)
        identity = {
            **run_identity(
                model,
                logits_of(output),
                before,
                data_fingerprint(everything),
                decided,
                options,
                quantize,
                choice.comparison,
            ),
            "parts": " ".join(f"{name}: {sum(map(samples, part))}" for name, part in parts.items()) + f", seed {seed}",
            "metric": choice.metric.name if choice.metric in _KNOWN else digest(described(choice.metric)),
        }
        earlier = SearchResult.load(previous) if isinstance(previous, str | Path) else previous
        if earlier is not None:
            reason = difference(earlier.identity, {**earlier.identity, **identity})
            if reason is not None:
                raise EstimatorError(f"the previous search was for {reason}")
        decisions = decisions_of(decided)
        limit = _limit(effort, max_passes, len(decisions) * len(options))
        with Checkpoint(":memory:" if checkpoint is None else checkpoint, identity) as kept:
            if earlier is not None:
                kept.fill(earlier.finished)
            bar = tqdm(
                total=limit,
                desc="Search",
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} passes [{elapsed}<{remaining}]",
                disable=None if progress else True,
                leave=False,
            )
            with bar:
                spending = PassBudget(limit, free={} if earlier is None else earlier.finished, watch=bar.update)
                first = samples(parts["score"][0])
                looks = (
                    0 if layers is not None else first
                )  # at a few: who reads the weights, their costs, and twice: is it random?
                spending.charge((looks + 4 * samples(example)) / size(everything))
                ranges = {}
                if any(option.quantizes_activation for option in options):
                    ranges = input_ranges(model, parts["score"], [layer.name for layer in decided])
                    spending.charge(2 * size(parts["score"]) / size(everything))  # again in `profile`
                context = Context(
                    model,
                    parts["score"],
                    decisions,
                    options,
                    quantize,
                    ranges,
                    choice.comparison,
                    _silent,
                    checkpoint=kept,
                )
                run = Stages(context, parts, base, choice, goal, spending, seed, estimators)
                result = run.result()
            finished = kept.rows()
    if state_fingerprint(model) != before:
        raise EstimatorError("the search changed the model's parameters or buffers (the metric, or an estimator?)")
    settings = {
        "effort": effort if max_passes is None else None,
        "max_passes": limit,
        "budget": {} if budget is None else dict(budget),
        "tolerance": goal.tolerance,
        "minimize": minimize if goal.tolerance is not None else None,
        "metric": choice.metric.name,
        "unit": choice.metric.unit,
        "measured": choice.sentence,
        "precisions": [str(option) for option in options],
        "quantizer": repr(quantize),
        "seed": seed,
        **reading_of(given["batches"][0]),
        "samples": {name: size(part) for name, part in parts.items()},
        "model_fingerprint": before,
        "stages": run.taken,
        "environment": environment(),
    }
    return replace(
        result,
        settings=settings,
        seconds=time.perf_counter() - start,
        identity=identity,
        finished=finished,
        passes_in_this_run=round(spending.used - spending.reused, 4),
    )


def _silent(iterable: Any, total: int, label: str) -> Any:
    """No bar: the search has its own."""
    return tqdm(iterable, total=total, desc=label, disable=True)


def _parts(given: Mapping[str, list[Batch]], shares: Mapping[str, float], seed: int) -> dict[str, list[Batch]]:
    """The three parts; those that are not given are split off."""
    left = {name: share for name, share in shares.items() if name not in given}
    total = sum(left.values())
    parts = split(given["batches"], {name: share / total for name, share in left.items()}, seed)
    parts |= {name: part for name, part in given.items() if name in shares}
    check_sizes({name: size(part) for name, part in parts.items()})
    return {name: parts[name] for name in shares}


def _check_labels(metric: str, given: Mapping[str, list[Batch]]) -> None:
    for name, part in given.items():
        for number, batch in enumerate(part):
            if targets_of(batch) is None:
                raise EstimatorError(
                    f"the {metric} needs labels, batch {number} of {name} has {missing_labels(batch)}; give "
                    "(inputs, targets), or the metric 'kl'"
                )


def _check_counted(parts: Mapping[str, list[Batch]]) -> None:
    for name, part in parts.items():
        labels = [targets_of(batch) for batch in part]
        if all(one is not None and bool((one == -100).all()) for one in labels):
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
