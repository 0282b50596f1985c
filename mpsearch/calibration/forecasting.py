"""What a piece of work will take, from the same work on one batch; what does not fit is refused."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mpsearch.calibration.families import estimates_of, planned_passes
from mpsearch.calibration.plan_in_model import PlanInModel
from mpsearch.calibration.plan_runs import Reader, plan_run, unquantized_run
from mpsearch.checkpoints.memory import NoStore
from mpsearch.core import amounts
from mpsearch.core.decision import Decision
from mpsearch.core.forecast import Forecast
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError, MemoryShortage
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimator
from mpsearch.estimation.passes import Passes
from mpsearch.estimation.replayed_probes import TURN_BYTES
from mpsearch.models.data.batches import leaves
from mpsearch.models.data.splitting import first_samples
from mpsearch.models.free_memory import FreeMemory, room
from mpsearch.models.head import OutputLayer
from mpsearch.models.modules.weights import canonical, holds_weight, weight_of
from mpsearch.models.peak_memory import live_bytes
from mpsearch.models.replay import record
from mpsearch.models.running import Batch, call, device_of, samples, unchanged
from mpsearch.models.streaming.offloading import resident, weight_bytes
from mpsearch.quantizers.fake_quantization import quantized_weight
from mpsearch.quantizers.quantizer import Around, Quantizer
from mpsearch.quantizers.rounded_weights import RoundedWeights

#: The growth with each further sample may itself grow by so much, as another moment of the work comes to hold the most.
_CAUTION = 1.5
#: Numbers of a weight that are rounded to see what it takes.
_ROUNDED = 2**18
#: Bytes that a pass may take at most, for each number of the input and each output of a layer: all of them in float32 and kept for the
#: backward pass, with scores of attention, and classes in float64.
_AT_MOST = 128


@dataclass(frozen=True)
class Trial:
    """What work on one batch takes.

    Attributes:
        bytes: the most that it holds beside the weights and the data.
        samples: of the batch that take so much.
        whole: these are all of them; else more do not fit.
    """

    bytes: int
    samples: int
    whole: bool = True


class _Disturbing(Around):
    """Changes every number a little, at no cost: what is done with rounded weights is then done, and none is rounded."""

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        return weight * (1 - 2**-6)

    def of_layer(self, name: str) -> Quantizer:
        return self


class _NotKept(RoundedWeights):
    """Rounds each time: what is held is told apart from the work."""

    def value(self, module: nn.Module, name: str, precision: Precision, quantizer: Quantizer) -> Tensor:
        return quantized_weight(module, name, precision, quantizer)


def largest(batches: Sequence[Batch]) -> Batch:
    """The batch with the most numbers."""
    return max(batches, key=elements)


def elements(batch: Batch) -> int:
    """Numbers in a batch: a measure of its size."""
    return sum(leaf.numel() for leaf in leaves(batch) if isinstance(leaf, Tensor))


def at_most(model: nn.Module, batches: Sequence[Batch]) -> int:
    """Bytes that no work on one batch exceeds, from shapes alone: a rough bound, for whether a forecast is worth its time."""
    widths = sum(canonical(module).shape[0] for module in model.modules() if holds_weight(module))
    return 4 * weight_bytes(model) + _AT_MOST * widths * elements(largest(batches))


def tried(model: nn.Module, batch: Batch, work: Callable[[Batch], object], room_bytes: float = math.inf) -> Trial:
    """Run work on one batch: on one and two of its samples first, then on as many more as the growth so far says will fit, at last on all.

    Args:
        model: that it runs.
        batch: in one piece where it cannot be cut into samples.
        work: with a batch.
        room_bytes: that are there beside the weights and the data.
    """

    def peak(part: Batch) -> int:
        lived = [*model.parameters(), *model.buffers(), *(leaf for leaf in leaves(part) if isinstance(leaf, Tensor))]
        with unchanged(model), live_bytes(lived) as live:
            work(part)
        return live.bytes

    total, count, growth = samples(batch), 1, 0.0
    try:
        held = peak(first_samples(batch, 1)) if total > 2 else 0
    except EstimatorError:  # no sample stands alone
        return Trial(peak(batch), total)
    while count < total and total > 2:
        further = total if count > 1 and held + _CAUTION * growth * (total - count) <= room_bytes else 2 * count
        needed = held + _CAUTION * growth * (further - count)
        if needed > room_bytes:
            return Trial(math.ceil(needed), further, whole=False)
        if further >= total:
            break
        more = peak(first_samples(batch, further))
        held, growth, count = more, max(more - held, 0) / (further - count), further
    return Trial(peak(batch), total)


def scoring_trial(context: Context, family: Sequence[Estimator], batch: Batch, room_bytes: float) -> Trial:
    """A family of estimators on one batch, and once more where there are several, with weights that cost nothing to quantize.

    Args:
        context: of the whole work.
        family: estimators that run together.
        batch: the batch.
        room_bytes: see `tried`.
    """
    chosen = _few_decisions(context, family)
    options = context.precisions if chosen is context.decisions else _few_options(context.precisions)
    names = [layer.name for decision in chosen for layer in decision.layers]

    def work(part: Batch) -> None:
        small = dataclasses.replace(
            context,
            batches=[part] * min(len(context.batches), 2),
            decisions=chosen,
            precisions=options,
            quantizer=_Disturbing(context.quantizer),
            ranges=dict.fromkeys(names, (-1.0, 1.0)) if any(option.quantizes_activation for option in options) else {},
            progress=_no_bar,
            passes=Passes(),
            checkpoint=NoStore(),
            rounded=_NotKept(),
            observers=(),
        )
        estimates_of(small, family)

    trial = tried(context.model, batch, work, room_bytes)
    further = len(context.batches) - 2
    if not (trial.whole and further > 0 and _runs_each_decision(family)):
        return trial
    trace, _ = record(
        context.model, batch
    )  # runs of each decision go on with several batches held, as many as fit into this
    return dataclasses.replace(
        trial, bytes=trial.bytes + min(trace.activation_bytes, TURN_BYTES, further * trace.held_bytes)
    )


def _runs_each_decision(family: Sequence[Estimator]) -> bool:
    """True where more decisions take more passes."""
    return any(planned_passes(estimator, 1, 3, 1) != planned_passes(estimator, 1, 4, 1) for estimator in family)


def plan_trial(
    model: nn.Module, reader: Callable[[], Reader], layer: OutputLayer | None, batch: Batch, room_bytes: float
) -> Trial:
    """A plan that changes nothing, and the unquantized model, on one batch.

    Args:
        model: without any plan.
        reader: makes a new reader of the outputs.
        layer: that makes the output, where it is left out of runs.
        batch: the batch.
        room_bytes: see `tried`.
    """

    def work(part: Batch) -> None:
        reference = unquantized_run(model, part, reader(), "batch 0", layer)
        plan_run(model, part, PlanInModel({}, {}), reader(), reference, "batch 0", layer)

    return tried(model, batch, work, room_bytes)


def _few_decisions(context: Context, family: Sequence[Estimator]) -> Sequence[Decision]:
    """All, or where each takes runs of its own those at both ends and in the middle, and the one with the largest weight.

    What is held of the run up to a decision is most near one of the ends in networks whose activations shrink or grow, else alike.
    """
    every = context.decisions
    if len(every) <= 6 or not _runs_each_decision(family):
        return every
    heaviest = max(range(len(every)), key=lambda u: max(layer.numel for layer in every[u].layers))
    places = {0, 1, len(every) // 2, len(every) - 2, len(every) - 1, heaviest}
    return [every[place] for place in sorted(places)]


def _few_options(precisions: Sequence[Precision]) -> list[Precision]:
    """The first that quantizes weights, and the first that quantizes inputs."""
    of_weights = [option for option in precisions if option.quantizes_weight][:1]
    of_inputs = [option for option in precisions if option.quantizes_activation][:1]
    return list(dict.fromkeys(of_weights + of_inputs)) or list(precisions[:1])


def _no_bar(iterable: Any, total: int, label: str) -> Any:
    return tqdm(iterable, total=total, desc=label, disable=True)


@dataclass(frozen=True)
class Rounding:
    """What it takes to round weights.

    Attributes:
        bytes: the most beside the largest weight and its rounded values.
        seconds: for every option of every weight, once.
    """

    bytes: int
    seconds: float


def rounding(
    modules: Sequence[nn.Module], names: Sequence[str], quantizer: Quantizer, options: Iterable[Precision]
) -> Rounding:
    """Round a part of the largest weight at every option.

    Args:
        modules: layers with a weight.
        names: of them.
        quantizer: that rounds.
        options: precisions.
    """
    options = [option for option in options if option.quantizes_weight]
    if not modules or not options:
        return Rounding(0, 0.0)
    sizes = [weight_of(module).numel() for module in modules]
    place = max(range(len(sizes)), key=sizes.__getitem__)
    most, seconds = 0, 0.0
    with resident(modules[place]), torch.no_grad():
        weight = canonical(modules[place]).detach()
        part = weight[: max(1, _ROUNDED * len(weight) // max(weight.numel(), 1))].contiguous()
        for option in options:
            with live_bytes([weight, part]) as live:
                start = time.perf_counter()
                quantizer.of_layer(names[place])(part, option)
                seconds += time.perf_counter() - start
            most = max(most, live.bytes - part.nbytes)
    scale = 1 / max(part.numel(), 1)
    return Rounding(round(most * sizes[place] * scale), seconds * sum(sizes) * scale)


def seconds_of(model: nn.Module, batch: Batch) -> float:
    """Of a forward pass over one batch; of a second run where the first is over at once, since it finds everything warm."""
    with torch.no_grad(), unchanged(model):
        start = time.perf_counter()
        call(model, batch)
        first = time.perf_counter() - start
        if first > 1:
            return first
        call(model, batch)
        return time.perf_counter() - start - first


def room_for(model: nn.Module, written: float | str | None) -> FreeMemory | None:
    """What work on a model may hold, the weights that lie in memory included; see `mpsearch.models.free_memory.room`."""
    return room(written, device_of(model), weight_bytes(model))


def admit(forecast: Forecast, there: FreeMemory | None, *, streamed: bool) -> None:
    """Refuse work that does not fit.

    Args:
        forecast: of it.
        there: what it may hold, the weights included; None: not known.
        streamed: its weights are read where they are used already.

    Raises:
        MemoryShortage: with what is needed, what is there, what takes it, and what to do.

    >>> told = Forecast(memory={"weights": 3 * 10**9, "one batch": 10**9})
    >>> admit(told, FreeMemory(2 * 10**9, "free on the machine"), streamed=True)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mpsearch.errors.MemoryShortage: this needs 4.00 GB of memory (weights 3.00 GB, one batch 1.00 GB), and 2.00 GB are there ...
    """
    needed = forecast.memory_bytes
    if there is None or needed is None or needed <= there.bytes:
        return
    raise MemoryShortage(
        f"this needs {amounts.text('memory_bytes', needed)} of memory ({forecast.memory_text}), and "
        f"{amounts.text('memory_bytes', there.bytes)} are there ({there.by}, weights included): take smaller batches or fewer tokens"
        + ("" if streamed else ", or give the weights as a folder hf:DIR, to be read block by block")
    )


def out_of_memory_text(model: nn.Module, batches: Sequence[Batch], forecast: Forecast | None) -> str:
    """What to say where memory ran out in the middle of work.

    Args:
        model: put back.
        batches: that it was run on.
        forecast: of the work, where one was made.
    """
    there = room_for(model, None)
    sizes = (
        f"the work was to take {amounts.text('memory_bytes', forecast.memory_bytes)} ({forecast.memory_text})"
        if forecast is not None and forecast.memory_bytes is not None
        else f"weights take {amounts.text('memory_bytes', weight_bytes(model))}"
    )
    free = (
        ""
        if there is None
        else f", {amounts.text('memory_bytes', there.bytes)} are there now ({there.by}, weights included)"
    )
    return (
        f"out of memory: {sizes}, the largest batch has {samples(largest(batches))} samples{free}; the model is as it was; take smaller "
        "batches or fewer tokens; mps.forecast tells beforehand what fits"
    )
