"""The sweep over a model whose weights lie elsewhere: two readings of them, one forward and one backward, block by block."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.backward_pass import BackwardPass, Check, Gradients, Places, Quantity
from mpsearch.estimation.gradients.head_pass import ADDED_FIRST, backward_passes, forward_pass, layer_in_pieces
from mpsearch.estimation.gradients.layer_calls import LayerCalls, Layout
from mpsearch.estimation.gradients.targets import GradientTarget
from mpsearch.models.modules.weights import operands_of
from mpsearch.models.running import Batch
from mpsearch.models.streaming.blocks import ROOM_BYTES, Blocks, Entered
from mpsearch.models.streaming.spilling import Spill, spilled

#: Most that the inputs of all blocks take on disk; more batches than fit take another two readings.
DISK_BYTES = 64 * 2**30


def steps_of(blocks: Blocks) -> int:
    """Steps of one batch, for a progress bar: each segment once forward and once backward."""
    return 2 * (blocks.number + 1) + 1


def streamed_gradients(
    context: Context,
    places: Places,
    batches: Sequence[tuple[int, Batch]],
    wanted: Mapping[GradientTarget, frozenset[Quantity]],
    advance: Callable[[], None],
) -> Iterator[tuple[int, list[Gradients]]]:
    """What the backward passes over each batch find, a reading forward and one backward for as many batches as there is room for.

    Forward the input of each block is kept. Backward each block is loaded once more: for each batch it is run again with gradients, and
    all targets and draws go through it. Layers are scored by the same code as in a model that has its weights, on the same numbers.

    Args:
        context: of the run, with blocks.
        places: where things stand.
        batches: with their numbers.
        wanted: what is asked of each target.
        advance: called `steps_of` times a batch.

    Yields:
        the number of a batch, and what was found for each draw of each target, in their order.

    Raises:
        EstimatorError: where gradients flow into the blocks beside their hidden state, or a weight is shared in a way that takes the sum
            of gradients from two ends of the model.
    """
    blocks = context.blocks
    if blocks is None:
        raise EstimatorError(
            "the weights of the model lie elsewhere, and it has no blocks in an nn.ModuleList that run one after the other: expected such "
            "blocks, so that gradients can be taken block by block; load the weights, or use a measured estimator, such as KLDivergence"
        )
    known: dict[nn.Module, Layout] = {}
    rest = list(batches)
    while rest:
        with spilled(ROOM_BYTES) as held:
            sweep = _Sweep(context, places, blocks, wanted, known, held, advance)
            count = sweep.forward(rest)
            sweep.backward()
            for number, _ in rest[:count]:
                yield number, [passed.finish() for passed in sweep.passes[number]]
        rest = rest[count:]


@dataclass(eq=False)
class _Sweep:
    """One reading forward and one backward; segments are those of `Blocks`."""

    context: Context
    places: Places
    blocks: Blocks
    wanted: Mapping[GradientTarget, frozenset[Quantity]]
    known: dict[nn.Module, Layout]
    held: Spill  # (segment, batch) -> its input; (draw, batch, "slope") -> gradient of what comes next
    advance: Callable[[], None]
    batches: dict[int, Batch] = field(default_factory=dict)
    entered: dict[int, Entered] = field(default_factory=dict)
    token_factors: dict[int, dict[GradientTarget, Tensor | None]] = field(default_factory=dict)
    passes: dict[int, list[BackwardPass]] = field(default_factory=dict)
    by_second: dict[int, bool] = field(
        default_factory=dict
    )  # samples lie along the second dimension of the hidden state

    def __post_init__(self) -> None:
        blocks, last = self.blocks, self.blocks.number + 1
        inside = {part for segment in range(1, last) for top in blocks.modules(segment) for part in top.modules()}
        operands = operands_of(self.context.model)
        functions = {*operands.decided.values(), *operands.reads.values()}
        self.seen: dict[int, set[nn.Module]] = {0: {*self.context.model.modules()} - inside | functions}
        for segment in range(1, last + 1):
            self.seen[segment] = {part for top in blocks.modules(segment) for part in top.modules()} | functions
        self.layer = layer_in_pieces(self.context, self.places, self.wanted)
        if self.layer is not None:
            self.seen[last].discard(self.layer.module)
        self.weights = {
            segment: [weight for weight in blocks.parameters(segment) if weight in self.places.column]
            for segment in range(last + 1)
        }
        both = set(self.weights[0]) & set(self.weights[last])
        if both and frozenset().union(*self.wanted.values()) & (ADDED_FIRST | {"factors"}):
            name = self.places.name(next(iter(both)))
            raise EstimatorError(
                f"the weight of layer {name!r} is used before the blocks and behind them, and the weights of the model lie elsewhere: its "
                "gradients do not meet in a block; exclude the layer, load the weights, or take FisherProjection"
            )

    def forward(self, batches: Sequence[tuple[int, Batch]]) -> int:
        """Keep the input of each block; how many batches there was room for."""
        size_bytes = 0
        with self.blocks.resident(0):
            self._check_arguments(*batches[0])
            for number, batch in batches:
                with torch.no_grad():
                    entered, hidden = self.blocks.enter(batch)
                size_bytes += (self.blocks.number + 1) * hidden.nbytes
                if self.batches and size_bytes > DISK_BYTES:
                    break
                self.batches[number], self.entered[number], self.held[1, number] = batch, entered, hidden.clone()
                self.advance()
        for number, batch in self.batches.items():
            self.token_factors[number] = {
                target: target.token_factors(self.context.model, batch) for target in self.wanted
            }
        with torch.no_grad():
            for segment in range(1, self.blocks.number + 1):
                with self.blocks.resident(segment):
                    for number, entered in self.entered.items():
                        state = self.held[segment, number].clone()  # a block may write into it
                        self.held[segment + 1, number] = self.blocks.run(segment, entered, state)
                        self.advance()
        return len(self.batches)

    def backward(self) -> None:
        """From the loss to the first layers."""
        for segment in range(self.blocks.number + 1, -1, -1):
            with self.blocks.resident(segment):
                for number in self.batches:
                    self._batch(segment, number)
                    self.advance()

    def _batch(self, segment: int, number: int) -> None:
        """Nothing of a graph is left behind, since weights cannot be taken out of one."""
        checking = number == 0
        layer_calls = self._layer_calls(segment, number)
        try:
            for weight in self.weights[segment]:
                weight.requires_grad_(checking)
            if segment > self.blocks.number:
                self._behind(number, layer_calls)
            elif segment or self.weights[0] or self.places.caches:
                self._through(segment, number, layer_calls, checking)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            raise
        finally:
            layer_calls.close()
            for weight in self.weights[segment]:
                weight.requires_grad_(False)

    def _layer_calls(self, segment: int, number: int) -> LayerCalls:
        weights = {**self.places.column, **self.places.caches}
        return LayerCalls(
            self.context.model, weights, self.places.by_module, self.batches[number], self.known, self.seen[segment]
        )

    def _behind(self, number: int, layer_calls: LayerCalls) -> None:
        """The end of the model, and the loss."""
        context, last, batch = self.context, self.blocks.number + 1, self.batches[number]
        state = self.held[last, number].detach().requires_grad_()
        self.held.pop((last, number))
        with self.blocks.behind_blocks(self.entered[number], state.clone()):
            output = forward_pass(context, self.layer, batch, number)
        resolved = layer_calls.resolve(output.logits, output.index, self.places.name)
        self.by_second[number] = layer_calls.by_second(state, output.logits, output.index)
        draws = sum(target.draws for target in self.wanted)
        context.passes.add(len(context.batches), forward=2, backward=draws + resolved)
        self.passes[number] = []
        for passed, scalar, check, retain in backward_passes(
            context, self.places, output, number, self.wanted, self.token_factors[number]
        ):
            self.held[len(self.passes[number]), number, "slope"] = passed.run(
                layer_calls, scalar, None, [state], retain=retain, check=check
            )[0]
            self.passes[number].append(passed)

    def _through(self, segment: int, number: int, layer_calls: LayerCalls, checking: bool) -> None:
        """A block, or what comes before the first."""
        state: list[Tensor] = []
        if segment:
            state = [self.held[segment, number].detach().requires_grad_()]
            self.held.pop((segment, number))
            output = self.blocks.run(segment, self.entered[number], state[0].clone())
        else:
            _, output = self.blocks.enter(self.batches[number])
        if not output.requires_grad:
            return
        rows = output.transpose(0, 1) if self.by_second[number] else output
        index = torch.arange(len(rows), device=rows.device) // max(1, len(rows) // layer_calls.samples)
        layer_calls.resolve(rows, index, self.places.name)
        for place, passed in enumerate(self.passes[number]):
            check = Check(self.places) if checking and place == 0 else None
            retain = place + 1 < len(self.passes[number])
            slopes = passed.run(
                layer_calls, output, self.held[place, number, "slope"], state, retain=retain, check=check
            )
            self.held.pop((place, number, "slope"))
            if slopes:
                (self.held[place, number, "slope"],) = slopes

    def _check_arguments(self, number: int, batch: Batch) -> None:
        """Gradients reach what comes before the blocks by the hidden state alone.

        Raises:
            EstimatorError: where layers before the blocks make another argument of theirs.
        """
        self.batches[number] = batch
        layer_calls = self._layer_calls(0, number)
        del self.batches[number]
        try:
            entered, _ = self.blocks.enter(batch)
            parts = [part for part in tree_iter(list(entered.arguments)) if isinstance(part, Tensor)]
            shapes = [tuple(part.shape) for part in parts if part.requires_grad]
            del entered, parts  # with their graph
        finally:
            layer_calls.close()
        if shapes:
            raise EstimatorError(
                f"the weights of the model lie elsewhere, and its blocks are given a tensor of shape {shapes[0]} beside the hidden state "
                "that layers before them make: expected the hidden state alone, by which gradients go from block to block; load the "
                "weights, or use a measured estimator, such as KLDivergence"
            )
