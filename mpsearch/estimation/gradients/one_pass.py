"""One forward pass and a few backward passes a batch, for every gradient signal that is asked for."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from mpsearch.checkpoints.keys import SweepKey, SweepState
from mpsearch.core.layer import Layer
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.gradients.factors import Factors, factors
from mpsearch.estimation.gradients.hessian import require_gradients
from mpsearch.estimation.gradients.layer_calls import Call, LayerCalls, Layout
from mpsearch.estimation.gradients.per_sample import sample_gradients
from mpsearch.estimation.gradients.targets import GradientTarget, Predicted, predicted
from mpsearch.metrics.statistics import wide
from mpsearch.models.fingerprints import described, digest
from mpsearch.models.modules.weights import weight_of
from mpsearch.models.running import Batch
from mpsearch.quantizers.fake_quantization import input_quantizer, with_input

#: What a backward pass can be asked for; see `Gradients`.
Quantity = Literal["projection", "squared_norm", "importance", "input_squared_norm", "output", "factors"]

_OF_SAMPLES: frozenset[Quantity] = frozenset({"projection", "squared_norm", "importance"})
_OF_WEIGHTS: frozenset[Quantity] = _OF_SAMPLES | {"factors"}


@dataclass(eq=False)
class Gradients:
    """What one backward pass over one batch of N samples has found.

    g_n is the gradient of the sum over the predictions of sample n.

    Attributes:
        number: of the batch.
        draw: of the backward pass, from 0.
        counts: (N,) predictions of each sample, or what the metric weighs a sample by.
        projection: (N, D, P) <g_n, Q(W) - W>, and for a precision that quantizes inputs <dT_n/dY, Y at it - Y>.
        squared_norm: (N, W) |g_n|^2 for each distinct weight.
        importance: (N, D) sum |g_n w|.
        input_squared_norm: (N, L) squared gradient of each layer's input, through that layer.
        output: (N, D, P) sum (dT_n/dY)^2 (Y at precision - Y)^2.
        factors: of each call of each weight, see `Factors`.
    """

    number: int
    draw: int
    counts: Tensor
    projection: Tensor
    squared_norm: Tensor
    importance: Tensor
    input_squared_norm: Tensor
    output: Tensor
    factors: list[list[Factors]]


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
    account for.
    """
    places = _Places(context)
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
    known: dict[nn.Module, Layout] = {}
    bar = context.progress(None, len(context.batches), "Gradients")
    with bar, torch.enable_grad():
        bar.update(done)
        for number, batch in enumerate(context.batches):
            if number < done:
                continue
            requests = {
                target: (
                    frozenset[Quantity]().union(*(estimators[i].needs for i in members)),
                    [accumulators[i] for i in members],
                )
                for target, members in readers.items()
            }
            _over(context, places, number, batch, known, requests)
            context.checkpoint.put(key, SweepState(number + 1, [accumulator.state() for accumulator in accumulators]))
            bar.update(1)
    return [accumulator.finish() for accumulator in accumulators]


class _Places:
    """Where weights, decisions and layers stand in `Gradients`."""

    def __init__(self, context: Context) -> None:
        self.decisions = [decision.name for decision in context.decisions]
        self.layers = [layer.name for decision in context.decisions for layer in decision.layers]
        self.decisions_of: dict[str, list[int]] = {}  # decisions may overlap
        for u, decision in enumerate(context.decisions):
            for layer in decision.layers:
                self.decisions_of.setdefault(layer.name, []).append(u)
        self.row = {name: i for i, name in enumerate(self.layers)}
        self.by_module = {context.module(layer): layer for decision in context.decisions for layer in decision.layers}
        self.holders: dict[nn.Parameter, list[tuple[int, Layer]]] = {}  # of each weight: decision, layer
        for u, decision in enumerate(context.decisions):
            for parameter, layer in context.parameters(decision).items():
                self.holders.setdefault(parameter, []).append((u, layer))
        self.column = {parameter: i for i, parameter in enumerate(self.holders)}
        self.caches = {weight_of(module): layer for module, layer in self.by_module.items() if layer.is_cache}

    def name(self, weight: nn.Parameter) -> str:
        """A layer that holds a weight."""
        return self.caches[weight].name if weight in self.caches else self.holders[weight][0][1].name


def _over(
    context: Context,
    places: _Places,
    number: int,
    batch: Batch,
    known: dict[nn.Module, Layout],
    requests: dict[GradientTarget, tuple[frozenset[Quantity], list[Accumulator]]],
) -> None:
    """The passes over one batch."""
    total = len(context.batches)
    token_factors = {target: target.token_factors(context.model, batch) for target in requests}
    checking = number == 0
    layer_calls = LayerCalls(context.model, {**places.column, **places.caches}, places.by_module, batch, known)
    try:
        for weight in places.column:
            weight.requires_grad_(checking)
        output = predicted(context, batch, number)
        context.passes.add(total, forward=1)
        if layer_calls.resolve(output, places.name):
            context.passes.add(total, backward=1)
        points = [*places.column, *layer_calls.leaves] if checking else layer_calls.leaves
        runs = [(target, draw) for target in requests for draw in range(target.draws)]
        for target, draw in runs:
            needs, accumulators = requests[target]
            check = _Check(places) if checking and (target, draw) == runs[0] else None
            gradients = _Backward(
                context, places, layer_calls, output, number, target, draw, needs, token_factors[target], check
            ).run(points, (target, draw) != runs[-1])
            context.passes.add(total, backward=1)
            for accumulator in accumulators:
                accumulator.add(gradients)
    finally:
        layer_calls.close()
        for weight in places.column:
            weight.requires_grad_(False)


class _Check:
    """Gradients from the inputs and outputs of layers against autograd's."""

    def __init__(self, places: _Places) -> None:
        self.places = places
        self.summed: dict[nn.Parameter, Tensor] = {}
        self.scale: dict[nn.Parameter, float] = {}

    def add(self, call: Call, g: Tensor) -> None:
        weight = call.weight
        ((_, total),) = sample_gradients([(call.alone, call.x, g)], 1)
        self.summed[weight] = self.summed.get(weight, 0) + wide(total[0])
        size = float(wide(call.x).norm()) if call.x.is_floating_point() else 1.0
        self.scale[weight] = self.scale.get(weight, 0.0) + size * float(wide(g).norm())

    def compare(self, truths: Sequence[Tensor | None]) -> None:
        for weight, truth in zip(self.places.column, truths[: len(self.places.column)], strict=True):  # then outputs
            if truth is None:
                continue
            expected = float(wide(truth).norm())
            error = float((wide(truth) - self.summed.get(weight, 0)).norm())
            tolerance = 1e-3 if truth.dtype in (torch.float32, torch.float64) else 0.1
            rounding = torch.finfo(truth.dtype).eps * self.scale.get(weight, 0.0)  # of terms that cancel
            if error > max(tolerance * expected, rounding):
                raise EstimatorError(
                    f"the gradient of layer {self.places.name(weight)!r} is {expected:.3g} long, and its input and output "
                    f"account for all but {error:.3g} of it: the weight is used outside the layer's own forward, or changed "
                    "there; leave the layer out, or use a measured estimator"
                )


@dataclass(eq=False)
class _Backward:
    """One backward pass over one batch."""

    context: Context
    places: _Places
    layer_calls: LayerCalls
    output: Predicted
    number: int
    target: GradientTarget
    draw: int
    needs: frozenset[Quantity]
    token_factors: Tensor | None
    check: _Check | None

    def __post_init__(self) -> None:
        size, decisions, options = self.layer_calls.samples, len(self.places.decisions), len(self.context.precisions)
        counts = self.output.counts(self.target)
        zeros = functools.partial(wide(counts).new_zeros)
        self.sums = Gradients(
            self.number,
            self.draw,
            counts,
            projection=zeros((size, decisions, options)),
            squared_norm=zeros((size, len(self.places.column))),
            importance=zeros((size, decisions)),
            input_squared_norm=zeros((size, len(self.places.layers))),
            output=zeros((size, decisions, options)),
            factors=[[] for _ in self.places.column],
        )
        self.activations = self.context.quantizes_inputs
        self.waiting: dict[nn.Parameter, list[tuple[Call, Tensor, Tensor]]] = {}  # call, its input, its gradient

    def run(self, points: Sequence[Tensor], retain: bool) -> Gradients:
        """Differentiate.

        Args:
            points: where gradients are taken; what is wanted comes through the hooks on the way there.
            retain: the graph is needed again.
        """
        loss = self.output.scalar(self.target, self.draw, self.number)
        if not (loss.requires_grad and points):
            return self.sums
        self.layer_calls.receiver = self._arrived
        try:
            truths = torch.autograd.grad(loss, points, retain_graph=retain, allow_unused=True)
        except EstimatorError:  # of a hook
            raise
        except RuntimeError as error:
            raise EstimatorError(f"the loss cannot be differentiated: {error}") from None
        finally:
            self.layer_calls.receiver = None
        for weight, calls in self.waiting.items():  # not all of its outputs are used
            self._weight(weight, calls)
        if self.check is not None:
            self.check.compare(truths)
        self._check_finite()
        return self.sums

    def _arrived(self, call: Call, g: Tensor) -> None:
        """The gradient of the output of a call is there."""
        if self.check is not None and call.weight in self.places.column:
            self.check.add(call, g)
        if self.token_factors is not None:
            g = g * self._spread(self.token_factors, call, g)
        if self.layer_calls.shared(call) and (self.target.kind == "given" or "importance" in self.needs):
            raise EstimatorError(
                f"layer {self.places.name(call.weight)!r} has an input of shape {tuple(call.x.shape)} in a batch of "
                f"{self.layer_calls.samples} samples: one output for all of them, so no gradients for each; give batches of "
                "one sample" + (", or the loss 'kl'" if self.target.kind == "given" else "")
            )
        if call.layer is not None:
            self._local(call, call.layer, g)
        if not _OF_WEIGHTS & self.needs or call.weight not in self.places.column:
            return
        calls = self.waiting.setdefault(call.weight, [])
        calls.append((call, self.layer_calls.rows(call, call.x), self.layer_calls.rows(call, g)))
        if len(calls) == self.layer_calls.calls[call.weight]:  # all are there, to be added before they are squared
            self._weight(call.weight, self.waiting.pop(call.weight))

    def _local(self, call: Call, layer: Layer, g: Tensor) -> None:
        """What takes the layer itself to be run again: output differences, gradients of inputs."""
        context, sums, decisions = self.context, self.sums, self.places.decisions_of[layer.name]
        whole = "output" in self.needs
        if whole or ("projection" in self.needs and self.activations):
            with torch.no_grad():
                y = call.module.forward(*call.args, **call.keywords)
            for p, precision in enumerate(context.precisions):
                changed = context.quantizes_input(layer, precision)
                if not (whole or changed):
                    continue  # the weight's own gradient tells more cheaply
                difference = wide(context.local_output(layer, precision, call.args, call.keywords)) - wide(y)
                product = wide(g) * difference
                square = self.layer_calls.by_sample(call, product.square()) if whole else 0.0
                change = self.layer_calls.by_sample(call, product) if changed else 0.0
                for u in decisions:
                    if whole:
                        sums.output[:, u, p] += square
                    if changed:
                        sums.projection[:, u, p] += change
        if "input_squared_norm" in self.needs and self.activations and call.x.is_floating_point():
            with torch.enable_grad():
                point = call.x.clone().requires_grad_()
                args, keywords = with_input(call.module, call.args, call.keywords, lambda _: point)
                (slope,) = torch.autograd.grad(call.module.forward(*args, **keywords), point, g)
            squares = self.layer_calls.by_sample(call, wide(slope).square())
            sums.input_squared_norm[:, self.places.row[layer.name]] += squares

    def _weight(self, weight: nn.Parameter, calls: list[tuple[Call, Tensor, Tensor]]) -> None:
        """What the gradients of a weight for each sample tell."""
        context, sums, needs = self.context, self.sums, self.needs
        shared = {self.layer_calls.shared(call) for call, _, _ in calls}
        if len(shared) > 1:
            raise EstimatorError(
                f"layer {self.places.name(weight)!r} is called once for each sample and once for the whole batch; "
                "give batches of one sample"
            )
        size = 1 if shared == {True} else self.layer_calls.samples
        column = self.places.column[weight]
        if "factors" in needs:
            sums.factors[column] += [
                factors(call.alone, x, g, size, self._noises(call.layer, x)) for call, x, g in calls
            ]
        if not _OF_SAMPLES & needs:
            return
        for place, gradients in sample_gradients([(call.alone, x, g) for call, x, g in calls], size):
            flat = gradients.flatten(1)
            sums.squared_norm[place, column] += wide(flat).square().sum(1)
            for u, layer in self.places.holders[weight]:
                if "importance" in needs:
                    sums.importance[place, u] += wide(flat).abs() @ wide(weight.detach()).flatten().abs()
                if "projection" in needs:
                    for p, precision in enumerate(context.precisions):
                        if precision.quantizes_weight and not precision.quantizes_activation:
                            change = context.perturbation(layer, precision).flatten().to(flat)
                            sums.projection[place, u, p] += wide(flat @ change)

    def _noises(self, layer: Layer | None, x: Tensor) -> dict[int, Tensor]:
        """Error of an input at each precision that quantizes it."""
        if layer is None or not x.is_floating_point():
            return {}
        context = self.context
        module = context.module(layer)
        functions: list[Callable[[Tensor], Tensor] | None] = [
            input_quantizer(module, layer.name, precision, context.quantizer, context.ranges)
            for precision in context.precisions
        ]
        return {p: function(x) - x for p, function in enumerate(functions) if function is not None}

    def _spread(self, token_factors: Tensor, call: Call, g: Tensor) -> Tensor:
        """Factors of tokens, laid out as a gradient."""
        for layout in (token_factors, token_factors.transpose(0, -1), token_factors.flatten()):
            if g.shape[: layout.ndim] == layout.shape:
                return layout.reshape(*layout.shape, *[1] * (g.ndim - layout.ndim)).to(g)
        raise EstimatorError(
            f"the weights of tokens have shape {tuple(token_factors.shape)}, the output of layer "
            f"{self.places.name(call.weight)!r} has {tuple(g.shape)}: expected the same samples and tokens"
        )

    def _check_finite(self) -> None:
        sums, places = self.sums, self.places
        names = [places.name(weight) for weight in places.column]
        checks = [
            (sums.projection.sum(2), places.decisions),
            (sums.output.sum(2), places.decisions),
            (sums.importance, places.decisions),
            (sums.squared_norm, names),
            (sums.input_squared_norm, places.layers),
        ]
        for name, calls in zip(names, sums.factors, strict=True):
            checks += [((part.inputs.flatten(1).sum(1) * part.gradients.sum(1))[:, None], [name]) for part in calls]
        for values, columns in checks:
            bad = ~torch.isfinite(values)
            if bad.any():
                row, column = (int(i) for i in bad.nonzero()[0])
                raise EstimatorError(
                    f"the gradient of layer {columns[column]!r} is {float(values[row, column])}, expected a finite number "
                    f"(batch {self.number}, sample {row})"
                )
