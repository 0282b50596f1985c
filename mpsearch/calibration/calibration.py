"""The prepared model: model, data and decisions in one room, made ready once and put back once."""

import contextlib
import dataclasses
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, Unpack, get_type_hints, overload

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mpsearch.calibration.deciding import (
    Resources,
    check_layers,
    checked_precisions,
    left_undecided,
    resource_columns,
    unscored_table,
)
from mpsearch.calibration.families import (
    check_caches,
    checked_estimators,
    estimates_of,
    families,
    members_alone,
    planned_passes,
)
from mpsearch.calibration.forecasting import (
    Trial,
    admit,
    at_most,
    largest,
    out_of_memory_text,
    plan_trial,
    room_for,
    rounding,
    scoring_trial,
    seconds_of,
)
from mpsearch.calibration.identity import run_identity, title
from mpsearch.calibration.plan_checks import check_plan, named_in, named_weights
from mpsearch.calibration.plan_in_model import PlanInModel
from mpsearch.calibration.plan_runs import Reader, plan_runs
from mpsearch.calibration.scoring import check_estimate, scored_table, warn_of_no_effect
from mpsearch.calibration.streamed_plan_runs import plans_at_once
from mpsearch.calibration.tally import Tally
from mpsearch.checkpoints.counting import CountingStore
from mpsearch.checkpoints.memory import NoStore
from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.checkpoints.store import Store
from mpsearch.core.decision import Decision, decisions_of
from mpsearch.core.evaluation import Evaluation
from mpsearch.core.forecast import Forecast
from mpsearch.core.layer import Layer
from mpsearch.core.layer_options import Groups, LayerOptions, Options, columns, layers_and_options, with_options
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.core.table import CostTable
from mpsearch.decisions.coverage import tell_unnamed
from mpsearch.decisions.finding import layers as find_layers
from mpsearch.decisions.mask import decidable, only_allowed, refused_options
from mpsearch.errors import EstimatorError, PlanError, nearest, warn
from mpsearch.estimation.context import Context, Loss, OutputObserver
from mpsearch.estimation.estimator import Estimator
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.choice import MetricChoice, check_metric, choose
from mpsearch.metrics.metric import Comparison, Metric
from mpsearch.metrics.own import Own
from mpsearch.metrics.registry import METRICS
from mpsearch.metrics.statistics import Mean
from mpsearch.metrics.targets import Loss as TargetLoss
from mpsearch.models.data.batches import reading_of
from mpsearch.models.data.splitting import few_tokens
from mpsearch.models.determinism import PROBED, probed_output
from mpsearch.models.fingerprints import output_identity
from mpsearch.models.free_memory import out_of_memory, room
from mpsearch.models.head import OutputLayer, output_layer, too_large
from mpsearch.models.modules.experts import without_tokens
from mpsearch.models.modules.weights import holds_weight, layer_of
from mpsearch.models.named import opened
from mpsearch.models.peak_memory import peak_memory
from mpsearch.models.running import (
    Batch,
    collect,
    data_fingerprint,
    device_of,
    logits_of,
    preserved,
    samples,
    state_fingerprint,
    state_stamp,
    unchanged,
)
from mpsearch.models.streaming.blocks import Blocks, blocks_of
from mpsearch.models.streaming.offloading import is_offloaded, weight_bytes
from mpsearch.quantizers.fake_quantization import Ranges, input_ranges
from mpsearch.quantizers.registry import AnyQuantizer, resolve_quantizer
from mpsearch.quantizers.rounded_weights import RoundedWeights, memory_and_file_bytes

Differentiated = Comparison | TargetLoss | Loss


class LayerKeywords(TypedDict, total=False):
    """Which layers are decided on and what each may have, as single keywords of a door.

    Attributes:
        exclude: names or patterns of layers to leave alone, where the layers are found.
        groups: as for `mps.layers`.
        allow: options of single layers, as for `mps.layers`.
        fixed: what is decided already: a plan, its file, or name or pattern -> one precision.
    """

    exclude: Sequence[str]
    groups: Groups
    allow: Mapping[str, Options] | None
    fixed: Mapping[str, str | Precision] | str | os.PathLike[str] | None


class ProfileKeywords(LayerKeywords, total=False):
    """What `profile` may be told beside what is in its signature.

    Attributes:
        memory_bytes: the most that the work may hold, the weights included: a number, `8GB`, `50%`; None: all that is free. What needs
            more is refused before it starts.
    """

    memory_bytes: float | str | None


class CalibrationOptions(ProfileKeywords, total=False):
    """What `Calibration` may be told beside what is in its signature.

    Attributes:
        higher_is_better: direction of a metric of one's own.
        whole: all data of the run, where `batches` are a part of it: it tells what metric fits, and a checkpoint is for it.
        example: the batch that parameters and costs are found by, and that is run twice; by default the first.
    """

    higher_is_better: bool
    whole: Iterable[Batch]
    example: Batch


def check_keywords(door: str, given: Mapping[str, Any], known: type) -> None:
    """Refuse a keyword that a door does not have.

    Args:
        door: its name.
        given: what it was called with.
        known: the `TypedDict` of what it takes.

    Raises:
        TypeError: with the nearest name.

    >>> check_keywords("profile", {"excluded": ["head"]}, LayerKeywords)
    Traceback (most recent call last):
    TypeError: profile() has no argument 'excluded'; did you mean 'exclude'?
    """
    names = get_type_hints(known)
    for name in given:
        if name not in names:
            raise TypeError(f"{door}() has no argument {name!r}{nearest(name, names)}")


class Calibration:
    """A model made ready: `profile`, `evaluate`, `measure_plans` and `search` are a few lines on it.

    Inside `with`, the model is in evaluation mode and taken apart, so that every weight that can be decided on lies in a layer of its
    own. All that several calls need is made when it is first asked for, once: the decisions and their costs, the ranges of quantized
    inputs, the output of the unquantized model (run twice, so that a random model is refused) and the metric that fits it. All weights
    are hashed at the start, and again at the end; after `with` the model is bit for bit what it was, also after an exception.

    Args:
        model: any module; or its name, such as `hf:DIR` (`mpsearch.models.named`).
        batches: calibration data, read once; what `mpsearch.models.data.batches.arranged` reads; or its name, such as `text:FILE`.
        precisions: the options, `mps.precisions("w2 w4 w8")`; without them plans can be measured, but no table be made.
        layers: the decisions, or `LayerOptions` to find them by; by default all that `mps.layers` finds.
        quantizer: the one that will ship: a name of `mpsearch.quantizers.QUANTIZERS`, a quantizer, or a function of a weight and a
            precision; by default `RoundToNearest()`. What looks at the inputs of layers is shown `batches`.
        metric: what outputs are compared by: a name of `mpsearch.metrics.registry.METRICS`, a metric or a function; by default what
            fits outputs and targets.
        loss: `loss(model, batch) -> scalar` of one's own for estimators that differentiate and for `metric="loss"`; or `kl`,
            `cross-entropy`.
        resources: names of resources, or own functions by name.
        checkpoint: a file that finished work goes to, and where it is found again; an open `Store` stays open.
        progress: show bars on stderr where that is a terminal.
        **options: `exclude`, `groups`, `allow`, `fixed`, `memory_bytes`, `higher_is_better`, `whole`, `example` (`CalibrationOptions`).

    Raises:
        EstimatorError: for unusable data, a model whose output is random, or one that was changed inside.
        TableError: for a model without quantizable layers, or a layer or resource that does not exist.

    Attributes of use to a search; all but `fingerprint` are made at the first look:

    - `fingerprint`, `data_fingerprint`: hashes of all weights, and of the whole data;
    - `layers`, `precisions`, `decisions`: (L,) rows and (P,) columns of tables, and the (D,) groups of rows that share a precision;
    - `base`: a `CostTable` with all costs, whose sensitivity is 0, `nan` where an option is not allowed;
    - `choice`, `output_identity`: the `MetricChoice` from the output of the unquantized model on the first samples of `example`, and
      what tells that output from others;
    - `output_layer`: the layer that makes the output, where that is large: it is left out of runs, and makes logits in pieces of rows;
    - `ranges`: layer -> least and greatest input over `batches`; empty where no option quantizes inputs;
    - `identity(loss)`: what results depend on, for a `Store` of one's own, which `keep_in` takes;
    - `context(loss)`: the `Context` that estimators are handed, here for all decisions; `quantized` of it keeps weights.

    A second set of batches is measured with the same prepared model: `measure(plans, batches)`, `evaluate(plan, batches)`, or plan by
    plan and batch by batch with the loop itself, `unquantized_run` and `plan_run` of `mpsearch.calibration.plan_runs`. Ranges stay those
    of the calibration data.

    >>> import torch
    >>> from mpsearch import Budget, precisions, solve
    >>> from mpsearch.sensitivity import KLDivergence, RelativeWeightError
    >>> _ = torch.manual_seed(0)
    >>> model, batches = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)), [torch.randn(8, 4)]
    >>> with Calibration(model, batches, precisions("w2 w8")) as calibration:
    ...     measured, guessed = calibration.profile([KLDivergence(), RelativeWeightError()])
    >>> measured.unit, guessed.unit, [layer.name for layer in calibration.layers]
    ('nats', 'relative', ['0', '2'])
    """

    def __init__(
        self,
        model: nn.Module | str,
        batches: Iterable[Batch] | str,
        precisions: Sequence[Precision] | None = None,
        *,
        layers: Sequence[Layer] | LayerOptions | None = None,
        quantizer: AnyQuantizer | None = None,
        metric: str | Metric | Callable[..., Any] | None = None,
        loss: Loss | Literal["kl", "cross-entropy"] | None = None,
        resources: Resources = ("memory_bytes", "bitops"),
        checkpoint: str | Path | Store | None = None,
        progress: bool = True,
        **options: Unpack[CalibrationOptions],
    ) -> None:
        check_keywords("Calibration", options, CalibrationOptions)
        self._memory_bytes = options.get("memory_bytes")
        limit = room(self._memory_bytes)  # refused at once where it is no amount
        model, batches = opened(model, batches, memory_bytes=None if limit is None else limit.bytes)
        self.model = model
        self.batches = collect(batches, model)
        self.quantizer = resolve_quantizer(quantizer)
        check_metric(metric)
        self.fingerprint = ""
        #: all data of the run
        self.whole = collect(options["whole"], model) if "whole" in options else self.batches
        #: the batch that stands for all where one is enough
        self.example: Batch = few_tokens(options.get("example", self.batches[0]))
        self._offered = None if precisions is None else checked_precisions(precisions)
        self._layers, self._layer_options = layers_and_options(
            layers,
            exclude=options.get("exclude", ()),
            groups=options.get("groups", "auto"),
            allow=options.get("allow"),
            fixed=options.get("fixed"),
        )
        self._higher_is_better = options.get("higher_is_better", False)
        self._metric, self._loss = metric, loss
        self._resources, self._progress = resources, progress
        self._checkpoint = checkpoint
        #: of all tables and plans, each weight rounded once for each precision
        self.rounded = RoundedWeights()
        self._known_ranges: dict[str, tuple[float, float]] = {}
        self._ranged: set[str] = set()  # layers that have been looked at; an embedding has no range
        self._users: list[str] = []  # who may have changed the model
        self._stack = contextlib.ExitStack()
        self._stamp: Any = None
        self._inside = False
        self._told: Forecast | None = None  # of the work that runs
        self._admitted = False  # as a part of a search that fits

    def __enter__(self) -> Self:
        self.fingerprint = state_fingerprint(self.model)
        self._stamp = state_stamp(self.model) if is_offloaded(self.model) else self.fingerprint
        self._stack.callback(self.rounded.close)
        self._stack.enter_context(preserved(self.model, self.example))
        with contextlib.ExitStack() as undone:  # where the data is no good, the model is put back
            undone.push(self._stack)
            self.quantizer = resolve_quantizer(self.quantizer, self.model, self.batches)
            undone.pop_all()
        self._inside = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside = False
        self._stack.__exit__(kind, error, trace)
        if out_of_memory(error):
            raise EstimatorError(out_of_memory_text(self.model, self.batches, self._told)) from error
        if kind is None and self._state() != self._stamp:
            users = ", ".join(dict.fromkeys(self._users)) or "what ran inside"
            raise EstimatorError(f"{users} changed the model's parameters or buffers")

    def _state(self) -> Any:
        """What tells a changed model: all weights, of an offloaded one where they lie."""
        return state_stamp(self.model) if is_offloaded(self.model) else state_fingerprint(self.model)

    @functools.cached_property
    def blocks(self) -> Blocks | None:
        """Of an offloaded model, its blocks, which are loaded one after the other; None for others, and where there are none."""
        self._check_inside()
        if not is_offloaded(self.model):
            return None
        return blocks_of(self.model, few_tokens(self.example, PROBED))

    @functools.cached_property
    def data_fingerprint(self) -> str:
        """A hash of the whole data."""
        return data_fingerprint(self.whole)

    @functools.cached_property
    def _rows_and_columns(self) -> tuple[list[Layer], tuple[Precision, ...]]:
        """Layers and options before any of them is held against the others."""
        if self._offered is None:
            raise EstimatorError(
                "no precisions given: plans can be measured, but no decisions be made; give precisions="
            )
        options = self._layer_options
        layers = self._layers
        if layers is None:
            layers = find_layers(self.model, few_tokens(self.batches[0]), **options.finding)
        return columns(with_options(layers, options.allow, options.fixed), self._offered)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """(P,) the options, those that are named for single layers alone last."""
        return self._rows_and_columns[1]

    @functools.cached_property
    def _decidable(self) -> tuple[tuple[Layer, ...], dict[str, str]]:
        self._check_inside()
        layers, options = self._rows_and_columns
        check_layers(self.model, layers)
        layers, without = decidable(layers, options)
        return tuple(layers), without

    @property
    def layers(self) -> tuple[Layer, ...]:
        """(L,) the layers that an option fits."""
        return self._decidable[0]

    @functools.cached_property
    def decisions(self) -> list[Decision]:
        """(D,) layers by the precision that they share."""
        return decisions_of(self.layers)

    @functools.cached_property
    def base(self) -> CostTable:
        """What every option costs; the sensitivity is 0 where it is allowed."""
        layers, without = self._decidable
        usage = resource_columns(self.model, layers, self.precisions, self._resources, self.quantizer, self.example)
        facts = left_undecided(self.model, layers, self._layer_options.exclude, without)
        return unscored_table(layers, self.precisions, usage, facts)

    @functools.cached_property
    def _seen(self) -> tuple[MetricChoice, OutputLayer | None, Tensor | None]:
        """What the output of the unquantized model tells, on the first samples of the example, where two runs agree.

        The output itself, too, but where it is large.
        """
        self._check_inside()
        example, output = few_tokens(self.example, PROBED), probed_output(self.model, self.example)
        loss = self._loss
        metric = "kl" if loss == "kl" else None if loss == "cross-entropy" else self._metric
        choice = choose(
            self.model,
            self.whole,
            output,
            example,
            metric,
            loss=loss if callable(loss) else None,
            higher_is_better=self._higher_is_better,
        )
        layer = output_layer(self.model, [*self.whole, *self.batches, self.example], output, example)
        logits = logits_of(output)
        return choice, layer, None if too_large(logits.numel() * logits.element_size()) else logits

    @property
    def choice(self) -> MetricChoice:
        """What is measured, and why."""
        return self._seen[0]

    @property
    def output_layer(self) -> OutputLayer | None:
        """The layer that makes the output, where it makes many logits of a batch (`mpsearch.models.head`)."""
        return self._seen[1]

    @functools.cached_property
    def output_identity(self) -> str:
        """What tells the output of the unquantized model from that of others."""
        output = self._seen[2]
        return output_identity(
            self.model, logits_of(probed_output(self.model, self.example)) if output is None else output
        )

    @functools.cached_property
    def loss(self) -> Differentiated:
        """What estimators compare outputs by, or differentiate.

        Raises:
            EstimatorError: for a metric that no table can be made of.
        """
        measured = self.choice.metric
        if self._loss == "cross-entropy":
            return TargetLoss(probabilities=self.choice.reading.softmax)
        if callable(self._loss):
            return self._loss
        if isinstance(measured, Own) and measured.title == "loss":
            return measured.function
        if not isinstance(measured, Comparison | TargetLoss):
            names = ", ".join(name for name, metric in METRICS.items() if metric.compares)
            raise EstimatorError(
                f"a table takes a metric that compares outputs ({names}) or 'loss', not {self._metric!r}; the estimator TaskMetric "
                "measures others"
            )
        return measured

    @functools.cached_property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Least and greatest input of each layer over the calibration data, where an option quantizes inputs."""
        if not any(option.quantizes_activation for option in self.precisions):
            return {}
        return self._ranges_of([layer.name for layer in self.layers])

    def _ranges_of(self, names: Sequence[str]) -> dict[str, tuple[float, float]]:
        """Ranges of these layers; one pass for those that are not known yet."""
        new = [name for name in names if name not in self._ranged]
        if new:
            layer = self.output_layer
            with contextlib.nullcontext() if layer is None else layer.left_out():
                self._known_ranges |= input_ranges(self.model, self.batches, new)
            self._ranged.update(new)
        return {name: self._known_ranges[name] for name in names if name in self._known_ranges}

    @functools.cached_property
    def _unseen(self) -> set[str]:
        """Layers of experts that no batch gives a token."""
        return without_tokens(self.model, self.layers, self.batches)

    def identity(self, loss: Differentiated) -> dict[str, str]:
        """What results depend on (`mpsearch.calibration.identity`), for a checkpoint."""
        return run_identity(
            self.model,
            self.output_identity,
            self.fingerprint,
            self.data_fingerprint,
            self.layers,
            self.precisions,
            self.quantizer,
            loss,
            self.rounded,
        )

    def keep_in(self, checkpoint: Store) -> None:
        """Finished work goes to this open store from now on, and is looked for there."""
        self._checkpoint = checkpoint

    def run_by(self, user: str) -> None:
        """Tell who else runs the model, for the message where it comes out changed."""
        self._users.append(user)

    def _results(self, loss: Differentiated) -> Store:
        """Where finished work goes; a file is opened at the first use."""
        if self._checkpoint is None:
            return NoStore()
        if not isinstance(self._checkpoint, Store):
            self._checkpoint = self._stack.enter_context(SQLiteStore(self._checkpoint, self.identity(loss)))
        return self._checkpoint

    def context(self, loss: Differentiated | None = None) -> Context:
        """What estimators are handed, with all decisions.

        Args:
            loss: what outputs are compared by; by default `loss` of this calibration.
        """
        compared = self.loss if loss is None else loss
        return self._context(compared, self.ranges, self._results(compared), progress=self._progress)

    def _context(self, compared: Differentiated, ranges: Ranges, checkpoint: Store, *, progress: bool) -> Context:
        return Context(
            self.model,
            self.batches,
            self.decisions,
            self.precisions,
            self.quantizer,
            ranges,
            compared,
            _Bars(progress),
            checkpoint=checkpoint,
            rounded=self.rounded,
            beside=self.choice.comparison if callable(compared) else None,
            blocks=self.blocks,
            output_layer=self.output_layer,
        )

    @overload
    def profile(
        self,
        estimator: Estimator,
        *,
        loss: Differentiated | None = None,
        members: bool = True,
        observers: Sequence[OutputObserver] = (),
    ) -> CostTable: ...

    @overload
    def profile(
        self,
        estimator: Sequence[Estimator],
        *,
        loss: Differentiated | None = None,
        members: bool = True,
        observers: Sequence[OutputObserver] = (),
    ) -> list[CostTable]: ...

    def profile(
        self,
        estimator: Estimator | Sequence[Estimator],
        *,
        loss: Differentiated | None = None,
        members: bool = True,
        observers: Sequence[OutputObserver] = (),
    ) -> CostTable | list[CostTable]:
        """Fill a cost table with each estimator; those of one family share their runs. See `mps.profile`.

        Args:
            estimator: one, or several.
            loss: what outputs are compared by, in place of what this calibration chose.
            members: runs of the model may be spent on the layers of a tie alone.
            observers: are shown the outputs of estimators that run one perturbation at a time, such as
                `mpsearch.estimation.surrogate.OutputShifts`.

        Returns:
            A table, or of several estimators a list of them.

        Raises:
            EstimatorError: for a score that is not finite, or an estimator that cannot score what is decided.
        """
        several = isinstance(estimator, Sequence)
        estimators = checked_estimators(estimator if isinstance(estimator, Sequence) else [estimator])
        check_caches(estimators, self.decisions)
        base = self.base
        compared = self.loss if loss is None else loss
        self._start(lambda: self._forecast_of_scores(estimators, compared), self.batches)
        context = self.context(compared)
        tables: dict[int, CostTable] = {}
        self._users += map(repr, estimators)
        for places in families(estimators):
            family = [estimators[place] for place in places]
            alone = members_alone(family, self.decisions, runs=members)
            passes = Passes()
            results = CountingStore(self._results(compared), functools.partial(dataclasses.astuple, passes))
            own = dataclasses.replace(
                context,
                decisions=[*self.decisions, *alone],
                quantizer=self._allowed,
                passes=passes,
                checkpoint=results,
                observers=observers,
            )
            start = time.perf_counter()
            with unchanged(self.model), peak_memory(device_of(self.model)) as peak:
                estimates = estimates_of(own, family)
            facts = {
                "quantizer": repr(self.quantizer),
                "loss": title(compared),
                "measured": self.choice.sentence if loss is None else title(compared),
                "batches": len(self.batches),
                **reading_of(self.batches[0]),
                "passes": dataclasses.asdict(passes + Passes(*results.earlier)),
                "passes_in_this_run": dataclasses.asdict(passes),
                "shared_with": len(places) - 1,
                "seconds": round(time.perf_counter() - start, 3),
                "peak_memory_bytes": peak.bytes,
                "model_fingerprint": self.fingerprint,
                "data_fingerprint": self._calibration_fingerprint,
                **base.origin,
            }
            for place, estimate in zip(places, estimates, strict=True):
                check_estimate(estimators[place], estimate, own)
                origin = {"estimator": repr(estimators[place]), **facts, **estimate.facts}
                tables[place] = scored_table(base, self.decisions, alone, estimate, origin, self._unseen)
                warn_of_no_effect(own, estimate, self._unseen)
        if loss is None:
            self._warn_of_metric([(repr(estimators[place]), table) for place, table in tables.items()])
        return [tables[place] for place in range(len(estimators))] if several else tables[0]

    def evaluate(self, plan: Plan, batches: Iterable[Batch] | None = None) -> Evaluation:
        """Measure what a plan does to the model, in all that fits the data. See `mps.evaluate`.

        Args:
            plan: layer name -> precision; layers that it does not name are left alone.
            batches: data, read once; by default that of this calibration.

        Raises:
            PlanError: where the plan does not fit the model.
            EstimatorError: for unusable data, or an output that is not finite.
        """
        self._check_inside()
        data = self.batches if batches is None else collect(batches, self.model)
        plan = named_in(self.model, plan)
        check_plan(self.model, plan)
        tell_unnamed(self.model, named_weights(self.model, plan), len(plan))
        choice, loss = self.choice, self._loss if callable(self._loss) else None
        self._start(lambda: self._forecast_of_plans([plan], data), data)
        (in_model,) = self._in_model([plan])
        plain, quantized = Tally(choice, loss), Tally(choice, loss)
        self.run_by("the metric or the loss")
        with _Bars(self._progress)(None, len(data), "evaluate") as bar:
            blocks = None if self._runs_model(choice.metric) else self.blocks
            for _, number, _ in plan_runs(self.model, data, [in_model], plain, [quantized], self.output_layer, blocks):
                bar.update(number is not None)
        choice.warn()
        return quantized.result(plain.result(None))

    def measure(self, plans: Sequence[Plan], batches: Iterable[Batch] | None = None) -> MeasuredPlans:
        """Measure by how much each of many plans is worse than the unquantized model, on common data. See `mps.measure_plans`.

        Args:
            plans: over the same layers.
            batches: data, read once; by default that of this calibration.

        Raises:
            PlanError: for no plans, plans over different layers, or one that does not fit the model.
            EstimatorError: for unusable data, or an output that is not finite.
        """
        self._check_inside()
        data = self.batches if batches is None else collect(batches, self.model)
        plans = [named_in(self.model, plan) for plan in plans]
        unmeasured = MeasuredPlans(tuple(plans), np.zeros(len(plans)))
        for number, plan in enumerate(plans):
            try:
                check_plan(self.model, plan)
            except PlanError as error:
                raise PlanError(f"plan {number}: {error}") from None
        tell_unnamed(self.model, named_weights(self.model, plans[0]), len(plans[0]))
        choice = self.choice
        self._start(lambda: self._forecast_of_plans(plans, data), data)
        in_model = self._in_model(plans)
        means = [Mean() for _ in plans]
        self.run_by("the metric or the loss")
        with _Bars(self._progress)(None, len(data) * len(plans), "measure plans") as bar:
            blocks = None if self._runs_model(choice.metric) else self.blocks
            together = plans_at_once(blocks, data)
            for first in range(0, len(plans), together):
                part = in_model[first : first + together]
                for _, plan_number, damage in plan_runs(
                    self.model, data, part, choice.metric, [choice.metric] * len(part), self.output_layer, blocks
                ):
                    if plan_number is not None and damage is not None:
                        sums, counts = torch.from_numpy(damage.sums), torch.from_numpy(damage.counts)
                        means[first + plan_number].add_samples(sums, counts)
                        bar.update()
        choice.warn()
        origin = {
            "metric": choice.metric.name,
            "measured": choice.sentence,
            "quantizer": repr(self.quantizer),
            "samples": sum(samples(batch) for batch in data),
            "model_fingerprint": self.fingerprint,
            "data_fingerprint": self._calibration_fingerprint if batches is None else data_fingerprint(data),
        }
        values, ses = np.array([(mean.value, mean.se) for mean in means]).T
        return dataclasses.replace(unmeasured, damage=values, damage_se=ses, unit=choice.metric.unit, origin=origin)

    def _runs_model(self, metric: Metric) -> bool:
        """True where something of the user's own runs the model, on what it likes."""
        return metric.runs_model or callable(self._loss)

    def _in_model(self, plans: Sequence[Plan]) -> list[PlanInModel]:
        """Plans as they are put into the model, each weight quantized once for each precision."""
        names = sorted({name for plan in plans for name, option in plan.items() if option.quantizes_activation})
        ranges = self._ranges_of(names)
        return [
            PlanInModel.of(self.model, plan, self.rounded, self.quantizer, ranges, f"plan {number}")
            for number, plan in enumerate(plans)
        ]

    def forecast(self, work: Estimator | Sequence[Estimator] | Plan | Sequence[Plan]) -> Forecast:
        """What `profile` will take with estimators, `evaluate` with a plan, or `measure` with plans; see `mps.forecast`.

        Also outside `with`. Runs the same work on a few samples, then on one batch where that is sure to fit.

        Args:
            work: estimators, a plan, or plans.
        """
        if not self._inside:
            with self:
                return self.forecast(work)
        parts: list[Any] = list(work) if isinstance(work, Sequence) else [work]
        if parts and all(isinstance(part, Plan) for part in parts):
            return self._forecast_of_plans(parts, self.batches)
        return self._forecast_of_scores(checked_estimators(parts))

    def _forecast_of_scores(self, estimators: Sequence[Estimator], loss: Differentiated | None = None) -> Forecast:
        passes, works = self._scoring_work(estimators, loss)
        if passes is None:
            return Forecast()
        return self._forecast(passes, works, self._cells, self.batches)

    @property
    def _cells(self) -> list[tuple[str, Precision]]:
        """Names of the layers with a weight, each with every option that rounds it."""
        names = [layer.name for layer in self.layers if not layer.is_cache]
        return [(name, option) for name in names for option in self.precisions if option.quantizes_weight]

    def _scoring_work(
        self, estimators: Sequence[Estimator], loss: Differentiated | None
    ) -> tuple[Passes | None, list[Callable[[Batch, float], Trial]]]:
        """Passes that estimators tell, None where one does not, and their work on one batch."""
        compared = self.loss if loss is None else loss
        whole = self._context(compared, {}, NoStore(), progress=False)  # finding ranges of inputs is a pass
        passes = Passes()
        works: list[Callable[[Batch, float], Trial]] = []
        for places in families(estimators):
            family = [estimators[place] for place in places]
            decisions = [*self.decisions, *members_alone(family, self.decisions, runs=True)]
            costs = [
                planned_passes(estimator, len(self.batches), len(decisions), len(self.precisions))
                for estimator in family
            ]
            told = [cost for cost in costs if cost is not None]
            if len(told) < len(costs):
                return None, []
            passes += Passes(max(cost.forward for cost in told), max(cost.backward for cost in told))
            context = dataclasses.replace(whole, decisions=decisions, quantizer=self._allowed)
            works.append(functools.partial(scoring_trial, context, family))
        return passes, works

    def forecast_search(
        self, passes: float, estimators: Sequence[Estimator], plans_on: Sequence[Batch], held: Mapping[str, int]
    ) -> Forecast:
        """What a search will take that scores with estimators and then measures plans, one after the other.

        Args:
            passes: over the whole data, all in all.
            estimators: those of the score part, the batches of this calibration.
            plans_on: batches that plans are measured on.
            held: what it holds beside one batch -> bytes.
        """
        _, works = self._scoring_work(estimators, self.choice.comparison)
        plans = functools.partial(plan_trial, self.model, lambda: self.choice.metric, self.output_layer)
        on_plans = largest(plans_on)
        works.append(lambda _, room_bytes: plans(on_plans, room_bytes))
        told = self._forecast(Passes(passes), works, self._cells, self.batches, held)
        if told.seconds is None:
            return told
        share = sum(map(samples, self.batches)) / sum(map(samples, self.whole))
        return dataclasses.replace(told, seconds=told.seconds / share)

    def start_search(self, forecast: Callable[[], Forecast], *, shown: bool) -> None:
        """Before a search: refuse what does not fit, and tell at a terminal what it will take; what follows inside is not asked again.

        Args:
            forecast: makes it.
            shown: tell it at a terminal.

        Raises:
            MemoryShortage: where it does not fit.
        """
        self._start(forecast, self.whole, shown=shown)
        self._admitted = True

    def _forecast_of_plans(self, plans: Sequence[Plan], data: Sequence[Batch]) -> Forecast:
        cells = {
            (name, dataclasses.replace(option, activation="16"))
            for plan in plans
            for name, option in named_in(self.model, plan).items()
            if option.quantizes_weight and holds_weight(layer_of(self.model, name))
        }
        choice, loss = self.choice, self._loss if callable(self._loss) else None
        reader: Callable[[], Reader] = (lambda: Tally(choice, loss)) if len(plans) == 1 else (lambda: choice.metric)
        ranges = any(option.quantizes_activation for plan in plans for option in plan.values())
        passes = Passes((1 + len(plans)) + ranges * len(self.batches) / len(data))
        return self._forecast(
            passes,
            [functools.partial(plan_trial, self.model, reader, self.output_layer)],
            sorted(cells, key=str),
            data,
        )

    def _forecast(
        self,
        passes: Passes,
        works: Sequence[Callable[[Batch, float], Trial]],
        cells: Sequence[tuple[str, Precision]],
        data: Sequence[Batch],
        beside: Mapping[str, int] | None = None,
    ) -> Forecast:
        """From pieces of work that run one after the other, each on one batch."""
        batch, weights, there = largest(data), weight_bytes(self.model), room_for(self.model, None)
        free = math.inf if there is None else there.bytes - weights
        trials = [work(batch, free) for work in works]
        names, options = (list(dict.fromkeys(column)) for column in zip(*cells, strict=True)) if cells else ([], [])
        modules = {name: layer_of(self.model, name) for name in names}
        round_up = rounding(list(modules.values()), names, self.quantizer, options)
        held, filed = memory_and_file_bytes([(modules[name], name, option) for name, option in cells], self.quantizer)
        most = max(trials, key=lambda trial: trial.bytes)
        part = "one batch" if most.whole else f"{most.samples} of {samples(batch)} samples of a batch"
        memory = {"weights": weights, part: most.bytes, "rounding": round_up.bytes}
        seconds = None
        if all(trial.whole for trial in trials):
            runs = len(data) * (passes.forward + 2 * passes.backward)
            seconds = runs * seconds_of(self.model, batch) + round_up.seconds
        memory |= {"rounded weights": held, **(beside or {})}
        return Forecast(passes.forward, passes.backward, None, seconds, memory, filed)

    def _start(self, forecast: Callable[[], Forecast], data: Sequence[Batch], *, shown: bool | None = None) -> None:
        """Before work: refuse what does not fit, and tell at a terminal what it will take.

        Raises:
            MemoryShortage: where it does not fit.
        """
        if self._admitted:
            return
        there = room_for(self.model, self._memory_bytes)
        shown = (self._progress if shown is None else shown) and sys.stderr.isatty()
        if not shown and (there is None or at_most(self.model, data) <= there.bytes):
            return
        told = self._told = forecast()
        admit(told, there, streamed=is_offloaded(self.model))
        if shown:
            print(f"mpsearch: {told}", file=sys.stderr)

    @functools.cached_property
    def _allowed(self) -> Any:
        """The quantizer, kept from options that are refused."""
        refused = refused_options(self.layers, self.precisions)
        return only_allowed(self.quantizer, self.layers, self.precisions, refused)

    @functools.cached_property
    def _calibration_fingerprint(self) -> str:
        return self.data_fingerprint if self.whole is self.batches else data_fingerprint(self.batches)

    def _warn_of_metric(self, tables: Sequence[tuple[str, CostTable]]) -> None:
        """Warn of what was assumed of the metric, and of tables, by their estimator, that do not see what it measures."""
        if all(table.unit == "relative" for _, table in tables):
            return
        self.choice.warn()
        blind = [estimator for estimator, table in tables if table.unit == "nats"]
        if blind and self.choice.comparison.unit != "nats" and isinstance(self.loss, Comparison):
            warn(
                f"{', '.join(blind)} takes a KL over a softmax, which does not see what all outputs have in common; "
                f"{self.choice.sentence}; the estimator OutputDamage measures that"
            )

    def _check_inside(self) -> None:
        if not self._inside:
            raise EstimatorError(
                "the model is not prepared: write `with mps.Calibration(...) as calibration:` and call inside"
            )


class _Bars:
    """`bars(iterable, total, label)`: tqdm on stderr, off where that is no terminal."""

    def __init__(self, shown: bool) -> None:
        self._disable = None if shown else True  # None: tqdm looks at the terminal

    def __call__(self, iterable: Any, total: int, label: str) -> Any:
        return tqdm(iterable, total=total, desc=label, disable=self._disable, leave=False)
