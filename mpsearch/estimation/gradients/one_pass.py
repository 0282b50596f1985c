"""One forward pass and a few backward passes a batch, for every gradient signal that is asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from mpsearch.checkpoints.keys import SweepKey, SweepState
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.backward_pass import Gradients, Places, Quantity
from mpsearch.estimation.gradients.head_pass import backward_passes, forward_pass, layer_in_pieces, seen_modules
from mpsearch.estimation.gradients.hessian import require_gradients
from mpsearch.estimation.gradients.layer_calls import LayerCalls, Layout
from mpsearch.estimation.gradients.streamed_pass import steps_of, streamed_gradients
from mpsearch.estimation.gradients.targets import GradientTarget
from mpsearch.models.fingerprints import described, digest
from mpsearch.models.running import Batch
from mpsearch.models.streaming.offloading import is_offloaded


class Accumulator(Protocol):
    """Collects what an estimator needs over batches."""

    def add(self, gradients: Gradients) -> None:
        """Add what one backward pass gives; the draws of a batch come one after the other."""
        ...

    def state(self) -> Any:
        """Tensors to write to a checkpoint."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave."""
        ...

    def finish(self) -> Estimate:
        """The scores, once all batches have been added."""
        ...


class Reader(Protocol):
    """An estimator as a sweep sees it."""

    @property
    def needs(self) -> frozenset[Quantity]:
        """Quantities of `Gradients` that it reads."""
        ...

    def gradient_target(self, context: Context) -> GradientTarget:
        """The scalar that is differentiated; estimators with an equal one share backward passes."""
        ...

    def accumulator(self, context: Context) -> Accumulator:
        """A new accumulator, to which each backward pass is added."""
        ...


def one_pass(context: Context, estimators: Sequence[Reader]) -> list[Estimate]:
    """Fill several gradient estimators in one run over the data.

    A batch takes one forward pass, and a backward pass for each draw of each distinct target. Parameters need no
    gradient: backward passes carry gradients of activations only, and each layer works on its own, inside its hook, on
    its input and output gradient, which is all that per-sample gradients of its weight take. Nothing is kept of a
    layer but its sums.

    Where samples cannot be told from tokens by shapes, one more backward pass over one batch tells
    (`mpsearch.estimation.gradients.layer_calls`). A layer with one output for the whole batch (position embeddings) is taken as one sample,
    which is unbiased for squares with drawn labels and random outputs, and refused else.

    On the first batch the gradient of each weight is held against what its layer's inputs and output gradients
    account for, and dropped.

    Beside the model and the activations of one batch no more is held than twice the largest weight, and pieces.
    """
    places = Places(context)
    require_gradients(context.model, ())
    accumulators = [estimator.accumulator(context) for estimator in estimators]
    readers: dict[GradientTarget, list[int]] = {}
    for place, estimator in enumerate(estimators):
        readers.setdefault(estimator.gradient_target(context), []).append(place)
    key = SweepKey(digest(*map(described, estimators)), len(context.decisions))
    stored = context.checkpoint.get(key)
    done = 0
    if stored is not None:
        done = stored.batches
        for accumulator, state in zip(accumulators, stored.states, strict=True):
            accumulator.restore(state)
    wanted = {
        target: frozenset[Quantity]().union(*(estimators[i].needs for i in members))
        for target, members in readers.items()
    }
    runs = [target for target in wanted for _ in range(target.draws)]
    batches = [(number, batch) for number, batch in enumerate(context.batches) if number >= done]
    streamed = is_offloaded(context.model)
    steps = steps_of(context.blocks) if streamed and context.blocks is not None else 1
    bar = context.progress(None, steps * len(context.batches), "Gradients")
    with bar, torch.enable_grad():
        bar.update(steps * done)
        passes = streamed_gradients if streamed else _gradients
        for number, found in passes(context, places, batches, wanted, lambda: bar.update(1)):
            for target, gradients in zip(runs, found, strict=True):
                for place in readers[target]:
                    accumulators[place].add(gradients)
            context.checkpoint.put(key, SweepState(number + 1, [accumulator.state() for accumulator in accumulators]))
    return [accumulator.finish() for accumulator in accumulators]


def _gradients(
    context: Context,
    places: Places,
    batches: Sequence[tuple[int, Batch]],
    wanted: Mapping[GradientTarget, frozenset[Quantity]],
    advance: Callable[[], None],
) -> Iterator[tuple[int, Iterator[Gradients]]]:
    """What the backward passes over each batch find, of a model that has its weights; see `streamed_gradients`."""
    known: dict[nn.Module, Layout] = {}
    for number, batch in batches:
        yield number, _over(context, places, number, batch, known, wanted)
        advance()


def _over(
    context: Context,
    places: Places,
    number: int,
    batch: Batch,
    known: dict[nn.Module, Layout],
    wanted: Mapping[GradientTarget, frozenset[Quantity]],
) -> Iterator[Gradients]:
    """The passes over one batch, each as it is done."""
    total = len(context.batches)
    token_factors = {target: target.token_factors(context.model, batch) for target in wanted}
    layer = layer_in_pieces(context, places, wanted)
    modules = None if layer is None else seen_modules(context.model, layer)
    layer_calls = LayerCalls(context.model, {**places.column, **places.caches}, places.by_module, batch, known, modules)
    try:
        for weight in places.column:
            weight.requires_grad_(number == 0)  # which is checked
        output = forward_pass(context, layer, batch, number)
        context.passes.add(total, forward=1)
        if layer_calls.resolve(output.logits, output.index, places.name):
            context.passes.add(total, backward=1)
        for passed, scalar, check, retain in backward_passes(context, places, output, number, wanted, token_factors):
            passed.run(layer_calls, scalar, retain=retain, check=check)
            context.passes.add(total, backward=1)
            yield passed.finish()
    finally:
        layer_calls.close()
        for weight in places.column:
            weight.requires_grad_(False)
