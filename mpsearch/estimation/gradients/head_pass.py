"""The end of a model in pieces: backward passes through the layer that makes many logits, which is scored by what the pieces tell."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.backward_pass import BackwardPass, Check, Places, Quantity
from mpsearch.estimation.gradients.hidden_gradients import Target, hidden_gradients, piece_target
from mpsearch.estimation.gradients.targets import GradientTarget, Predicted, predicted
from mpsearch.metrics.metric import Comparison, by_sample, inner_product
from mpsearch.metrics.pieces import all_finite, by_pieces
from mpsearch.metrics.runs import Run
from mpsearch.metrics.statistics import wide
from mpsearch.models.head import Head, OutputLayer
from mpsearch.models.modules.weights import holders, holds_weight, operands_of, weight_of
from mpsearch.models.running import Batch, logits_of, output_of, predictions, samples

#: Quantities in which the gradients of all calls of a weight are added before they are squared.
ADDED_FIRST: frozenset[Quantity] = frozenset({"squared_norm", "importance"})


def layer_in_pieces(
    context: Context, places: Places, wanted: Mapping[GradientTarget, frozenset[Quantity]]
) -> OutputLayer | None:
    """The layer that makes the output, where backward passes can take it a few rows at a time.

    Not where the metric looks at several rows at once, tokens are weighted, factors of gradients are asked for, or the layer shares its
    weight with others and gradients of samples are squared: then logits are made at once.

    Args:
        context: of the run.
        places: of weights.
        wanted: what is asked of each target.
    """
    layer, metric = context.output_layer, None if callable(context.loss) else context.comparison
    if layer is None or metric is None or not (metric.by_rows and context.reads_as_it_is):
        return None
    needs = frozenset[Quantity]().union(*wanted.values())
    weight = layer.module.weight
    shared = sum(holds_weight(module) and weight_of(module) is weight for module in holders(context.model)) > 1
    if "factors" in needs or (shared and needs & ADDED_FIRST):
        return None
    whole = (
        target.token_weights is not None or (target.kind == "given" and metric.kind != "classes") for target in wanted
    )
    return None if any(whole) else layer


def seen_modules(model: nn.Module, layer: OutputLayer) -> set[nn.Module]:
    """All modules whose calls are seen in a run without the layer."""
    operands = operands_of(model)
    return {*model.modules(), *operands.decided.values(), *operands.reads.values()} - {layer.module}


def forward_pass(context: Context, layer: OutputLayer | None, batch: Batch, number: int) -> "Predicted | HeadPass":
    """One forward pass, up to the layer where there is one to leave out."""
    return predicted(context, batch, number) if layer is None else run_before(context, layer, batch, number)


def backward_passes(
    context: Context,
    places: Places,
    output: "Predicted | HeadPass",
    number: int,
    wanted: Mapping[GradientTarget, frozenset[Quantity]],
    token_factors: Mapping[GradientTarget, Tensor | None],
) -> Iterator[tuple[BackwardPass, Tensor, Check | None, bool]]:
    """The backward passes of a batch that are to be run, one after the other.

    Args:
        context: of the run.
        places: where things stand.
        output: of the forward pass.
        number: of the batch; on the first, weights require gradients, and the first pass checks them.
        wanted: what is asked of each target.
        token_factors: of each target.

    Yields:
        the pass, the scalar that it differentiates, its check, and whether the graph is needed again.
    """
    runs = [(target, draw) for target in wanted for draw in range(target.draws)]
    for place, (target, draw) in enumerate(runs):
        passed = BackwardPass(
            context,
            places,
            output.samples,
            output.counts(target),
            number,
            target,
            draw,
            wanted[target],
            token_factors[target],
        )
        scalar = output.scalar(passed) if isinstance(output, HeadPass) else output.scalar(target, draw, number)
        yield passed, scalar, Check(places) if number == place == 0 else None, place + 1 < len(runs)


def run_before(context: Context, layer: OutputLayer, batch: Batch, number: int) -> "HeadPass":
    """One forward pass up to the layer.

    Args:
        context: of the run, whose loss `layer_in_pieces` has looked at.
        layer: is left out.
        batch: the batch.
        number: of the batch.
    """
    metric = context.comparison
    assert metric is not None
    with layer.left_out():
        hidden = logits_of(output_of(context.model, batch))
    held, labels, index = predictions(context.model, hidden, batch)
    return HeadPass(context, layer, Run(held, labels, index, samples(batch), layer.head()), metric, number)


@dataclass(eq=False)
class HeadPass:
    """What a run without its last layer gave, and backward passes from its rows to the hidden states.

    Attributes:
        context: of the run.
        layer: that was left out.
        run: with hidden states in the graph, and a head.
        metric: that draws outputs.
        number: of the batch.
    """

    context: Context
    layer: OutputLayer
    run: Run
    metric: Comparison
    number: int

    @property
    def samples(self) -> int:
        """Of the batch."""
        return self.run.samples

    @property
    def index(self) -> Tensor:
        """(N,) sample of each prediction."""
        return self.run.index

    @property
    def logits(self) -> Tensor:
        """(N, H) hidden states in the graph, in the place of logits."""
        return self.run.held

    @property
    def head(self) -> Head:
        """Makes the rows."""
        assert self.run.head is not None
        return self.run.head

    def counts(self, target: GradientTarget) -> Tensor:
        """(B,) predictions of each sample, or what the metric weighs a sample by."""
        if target.kind == "given":
            return torch.bincount(self.run.index, minlength=self.run.samples).float()
        with torch.no_grad():
            weights = [self.metric.weights(part.rows, part.index, part.samples) for part in self._detached().parts()]
        return by_sample(torch.cat(weights), self.run.index, self.run.samples)

    def scalar(self, passed: BackwardPass) -> Tensor:
        """A scalar whose gradient with regard to the hidden states is that of the target; the layer itself is scored on the way.

        Args:
            passed: of this batch; what the layer's own gradient tells is added to it.

        Raises:
            EstimatorError: where the output is not finite.
        """
        target = piece_target(self.metric, passed.target, passed.draw, self.number)

        def checked(run: Run) -> Tensor:
            if not all_finite(run.rows):
                raise EstimatorError(f"the output of the model is not finite in batch {self.number}")
            return target(run)

        own = _OwnGradient(self, passed) if self.layer.module.weight in passed.places.column else None
        targets: list[Target] = [checked]
        (gradient,) = hidden_gradients(self._detached(), targets, own)
        if own is not None:
            own.finish()
        return inner_product(gradient, self.run.held)

    def _detached(self) -> Run:
        return replace(self.run, held=self.run.held.detach())


@dataclass(eq=False)
class _OwnGradient:
    """Adds what the gradient of the layer's own weight tells, a sample at a time, to a backward pass (`Receiver`)."""

    end: HeadPass
    passed: BackwardPass

    def __post_init__(self) -> None:
        self.weight = weight_of(self.end.layer.module)
        self.layer = self.passed.places.by_module.get(self.end.layer.module)
        needs = self.passed.needs
        self.changes = self.passed.held_changes(self.weight) if "projection" in needs else []
        self.wanted = bool(self.changes) or bool(needs & ADDED_FIRST)
        self.sample = -1
        self.gradient: Tensor | None = None  # (C, H), of the rows of the sample so far

    def __call__(self, target: int, hidden: Tensor, gradient: Tensor, index: Tensor) -> None:
        """See `Receiver`."""
        if self.layer is not None:
            self._local(self.layer, hidden, gradient, index)
        if not self.wanted:
            return
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        numbers, sizes = torch.unique_consecutive(index, return_counts=True)
        places = list(sizes.tolist())
        for number, x, g in zip(numbers.tolist(), hidden.split(places), gradient.split(places), strict=True):
            if number != self.sample:
                self.finish()
                self.sample, self.gradient = number, torch.zeros_like(self.weight, dtype=dtype)
            assert self.gradient is not None
            self.gradient.addmm_(g.to(dtype).T, x.to(dtype))

    def finish(self) -> None:
        """Read the gradient of the sample whose rows have all been seen."""
        if self.gradient is not None:
            place, rows = slice(self.sample, self.sample + 1), slice(0, len(self.weight))
            self.passed.read_gradients(self.weight, self.changes, place, rows, self.gradient[None])
            self.gradient = None

    def _local(self, layer: Layer, hidden: Tensor, gradient: Tensor, index: Tensor) -> None:
        """What takes the layer itself to be run again: output differences, gradients of inputs."""
        context, passed, sums = self.end.context, self.passed, self.passed.sums
        decisions, whole = passed.places.decisions_of[layer.name], "output" in passed.needs
        samples = self.end.samples
        for p, precision in enumerate(context.precisions):
            moved = "projection" in passed.needs and context.quantizes_input(layer, precision)
            if not (whole or moved):
                continue
            with torch.no_grad():
                y, other = self.end.layer.module.forward(hidden), context.local_output(layer, precision, (hidden,), {})
            for u in decisions:
                if whole:
                    squares = by_sample(by_pieces(_squares, gradient, other, y), index, samples)
                    sums.output[:, u, p] += squares.to(sums.output)
                if moved:
                    products = by_sample(by_pieces(_products, gradient, other, y), index, samples)
                    sums.projection[:, u, p] += products.to(sums.projection)
        if "input_squared_norm" in passed.needs and passed.activations:
            slopes = wide(self.end.head.pulled_back(gradient)).square().sum(-1)
            sums.input_squared_norm[:, passed.places.row[layer.name]] += by_sample(slopes, index, samples)


def _products(gradient: Tensor, other: Tensor, y: Tensor) -> Tensor:
    """(N,) what a change of the output adds to the target."""
    return (wide(gradient) * (wide(other) - wide(y))).sum(-1)


def _squares(gradient: Tensor, other: Tensor, y: Tensor) -> Tensor:
    return (wide(gradient) * (wide(other) - wide(y))).square().sum(-1)
