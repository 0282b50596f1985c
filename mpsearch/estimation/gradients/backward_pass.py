"""One backward pass over one batch: what each layer makes of the gradient of its output, in its own hook."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.gradients.factors import Factors, factors
from mpsearch.estimation.gradients.layer_calls import Call, LayerCalls
from mpsearch.estimation.gradients.per_sample import CHUNK_BYTES, Calls, gradient_bytes, projection, sample_gradients
from mpsearch.estimation.gradients.targets import GradientTarget
from mpsearch.estimation.weight_changes import PIECE, change_rows, squared_length
from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.weights import weight_of
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


class Places:
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
        largest_bytes = max((p.numel() * p.element_size() for p in context.model.parameters()), default=0)
        self.room_bytes = max(CHUNK_BYTES, largest_bytes)
        self.caches = {weight_of(module): layer for module, layer in self.by_module.items() if layer.is_cache}

    def name(self, weight: nn.Parameter) -> str:
        """A layer that holds a weight."""
        return self.caches[weight].name if weight in self.caches else self.holders[weight][0][1].name


class Check:
    """Gradients from the inputs and outputs of layers against autograd's, each of which is dropped as soon as it has been compared."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.calls: dict[nn.Parameter, list[tuple[nn.Module, Tensor, Tensor]]] = {}  # until all are there

    def add(self, call: Call, g: Tensor) -> None:
        """A call, and the gradient of its output."""
        self.calls.setdefault(call.weight, []).append((call.alone, call.x, g))

    @contextlib.contextmanager
    def watching(self, weights: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, a backward pass to the weights compares the gradient of each, and hands on zeros that take no memory."""

        def compared(weight: nn.Parameter, truth: Tensor) -> Tensor:
            self._compare(weight, truth.detach().to_dense())
            return truth.new_zeros(()).expand_as(truth)

        handles = [weight.register_hook(functools.partial(compared, weight)) for weight in weights]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _compare(self, weight: nn.Parameter, truth: Tensor) -> None:
        calls = self.calls.pop(weight, [])
        lengths = [] if calls else [(math.sqrt(squared_length(truth)),) * 2]
        for _, rows, found in sample_gradients(calls, 1, CHUNK_BYTES // 8) if calls else ():
            pairs = zip(truth[rows].reshape(-1).split(PIECE), found.reshape(-1).split(PIECE), strict=True)
            lengths += [(float(wide(part).norm()), float((wide(part) - wide(other)).norm())) for part, other in pairs]
        expected, error = (math.hypot(*values) for values in zip(*lengths, strict=True))
        tolerance = 1e-3 if truth.dtype in (torch.float32, torch.float64) else 0.1
        scale = sum(
            math.sqrt((squared_length(x) if x.is_floating_point() else 1.0) * squared_length(g)) for _, x, g in calls
        )
        rounding = torch.finfo(truth.dtype).eps * scale  # of terms that cancel
        if error > max(tolerance * expected, rounding):
            raise EstimatorError(
                f"the gradient of layer {self.places.name(weight)!r} is {expected:.3g} long, and its input and output "
                f"account for all but {error:.3g} of it: the weight is used outside the layer's own forward, or changed "
                "there; leave the layer out, or use a measured estimator"
            )


def _change_and_square(g: Tensor, changed: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    product = g * (changed - y)
    return product, product.square()


@dataclass(frozen=True, eq=False)
class _Change:
    """What an option changes a weight by.

    Attributes:
        option: number of the precision.
        decisions: numbers of those that hold the weight.
        weight: the weight.
        quantized: gives Q(W), laid out as the weight.
    """

    option: int
    decisions: list[int]
    weight: Tensor
    quantized: Callable[[], Tensor]

    def held(self) -> "_Change":
        """The same, with Q(W) in memory."""
        value = self.quantized()
        return replace(self, quantized=lambda: value)

    def rows(self, rows: slice = slice(None)) -> Iterator[tuple[slice, Tensor]]:
        """Q(W) - W of some rows, a few at a time."""
        return change_rows(self.quantized(), self.weight, rows)


@dataclass(eq=False)
class BackwardPass:
    """One backward pass over one batch, in one run or in several, each through a part of the model.

    Attributes:
        context: of the run.
        places: where things stand in the sums.
        samples: of the batch.
        counts: see `Gradients`.
        number: of the batch.
        target: what is differentiated.
        draw: its number.
        needs: what is asked for.
        token_factors: what gradients of tokens are multiplied by, or None.
        sums: so far.
    """

    context: Context
    places: Places
    samples: int
    counts: Tensor
    number: int
    target: GradientTarget
    draw: int
    needs: frozenset[Quantity]
    token_factors: Tensor | None

    def __post_init__(self) -> None:
        decisions, options = len(self.places.decisions), len(self.context.precisions)

        def zeros(quantity: Quantity, *shape: int) -> Tensor:
            """Of what nobody reads without memory."""
            values = wide(self.counts)
            return values.new_zeros(shape) if quantity in self.needs else values.new_zeros(()).expand(shape)

        self.sums = Gradients(
            self.number,
            self.draw,
            self.counts,
            projection=zeros("projection", self.samples, decisions, options),
            squared_norm=zeros("squared_norm", self.samples, len(self.places.column)),
            importance=zeros("importance", self.samples, decisions),
            input_squared_norm=zeros("input_squared_norm", self.samples, len(self.places.layers)),
            output=zeros("output", self.samples, decisions, options),
            factors=[[] for _ in self.places.column],
        )
        self.activations = self.context.quantizes_inputs

    def run(
        self,
        layer_calls: LayerCalls,
        output: Tensor,
        upstream: Tensor | None = None,
        inputs: Sequence[Tensor] = (),
        *,
        retain: bool,
        check: Check | None = None,
    ) -> list[Tensor]:
        """Differentiate; what is wanted comes through the hooks on the way to the first layers, or to the weights where these are checked.

        Args:
            layer_calls: of the forward pass.
            output: what is differentiated.
            upstream: gradient of what follows with respect to the output; None for a scalar.
            inputs: where the gradient is wanted, too.
            retain: the graph is needed again.
            check: of the weights that require a gradient.

        Returns:
            The gradients of the inputs.
        """
        checked = [weight for weight in self.places.column if weight.requires_grad] if check is not None else []
        points = [*inputs, *checked, *layer_calls.leaves]
        if not (output.requires_grad and points):
            return [torch.zeros_like(x) for x in inputs]
        self.layer_calls, self.check = layer_calls, check
        self.waiting: dict[nn.Parameter, list[tuple[Call, Tensor, Tensor]]] = {}  # call, its input, its gradient
        layer_calls.receiver = self._arrived
        try:
            with contextlib.nullcontext() if check is None else check.watching(checked):
                slopes = torch.autograd.grad(output, points, upstream, retain_graph=retain, allow_unused=True)
        except EstimatorError:  # of a hook
            raise
        except RuntimeError as error:
            raise EstimatorError(f"the loss cannot be differentiated: {error}") from None
        finally:
            layer_calls.receiver = None
        for weight, calls in self.waiting.items():  # not all of its outputs are used
            self._weight(weight, calls)
        del self.layer_calls, self.check, self.waiting
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, slopes, strict=False)]

    def finish(self) -> Gradients:
        """What has been found.

        Raises:
            EstimatorError: where that is not finite.
        """
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
        moved = [
            "projection" in self.needs and context.quantizes_input(layer, precision) for precision in context.precisions
        ]  # else the weight's own gradient tells more cheaply
        if whole or any(moved):
            with torch.no_grad():
                y = call.module.forward(*call.args, **call.keywords)
            for p, precision in enumerate(context.precisions):
                if not (whole or moved[p]):
                    continue
                other = context.local_output(layer, precision, call.args, call.keywords)
                change, square = self.layer_calls.by_sample(call, _change_and_square, g, other, y)
                for u in decisions:
                    if whole:
                        sums.output[:, u, p] += square.to(sums.output)
                    if moved[p]:
                        sums.projection[:, u, p] += change.to(sums.projection)
        if "input_squared_norm" in self.needs and self.activations and call.x.is_floating_point():
            with torch.enable_grad():
                point = call.x.clone().requires_grad_()
                args, keywords = with_input(call.module, call.args, call.keywords, lambda _: point)
                (slope,) = torch.autograd.grad(call.module.forward(*args, **keywords), point, g)
            (squares,) = self.layer_calls.by_sample(call, lambda part: (part.square(),), slope)
            sums.input_squared_norm[:, self.places.row[layer.name]] += squares.to(sums.input_squared_norm)

    def _weight(self, weight: nn.Parameter, calls: list[tuple[Call, Tensor, Tensor]]) -> None:
        """What the gradients of a weight for each sample tell."""
        shared = {self.layer_calls.shared(call) for call, _, _ in calls}
        if len(shared) > 1:
            raise EstimatorError(
                f"layer {self.places.name(weight)!r} is called once for each sample and once for the whole batch; "
                "give batches of one sample"
            )
        size = 1 if shared == {True} else self.layer_calls.samples
        column = self.places.column[weight]
        if "factors" in self.needs:
            self.sums.factors[column] += [
                factors(call.alone, x, g, size, self._noises(call.layer, x)) for call, x, g in calls
            ]
        if _OF_SAMPLES & self.needs:
            self._of_samples(weight, [(call.alone, x, g) for call, x, g in calls], size)

    def _of_samples(self, weight: nn.Parameter, calls: Calls, size: int) -> None:
        """What is read of the gradients of a weight for each sample."""
        needs = self.needs
        changes = self._changes(weight) if "projection" in needs else []
        room_bytes = self.places.room_bytes if changes else CHUNK_BYTES
        if size * gradient_bytes(weight) > room_bytes:  # in several pieces: nothing is to be rounded again for each
            if len(changes) * weight.numel() * weight.element_size() <= room_bytes:
                changes = [change.held() for change in changes]
            else:
                changes = [change for change in changes if not self._projected(change, calls, size)]
        if not (changes or needs & {"squared_norm", "importance"}):
            return
        for place, rows, gradients in sample_gradients(calls, size, room_bytes):
            self.read_gradients(weight, changes, place, rows, gradients)
            del gradients  # before the next are made

    def read_gradients(
        self, weight: nn.Parameter, changes: "Sequence[_Change]", place: slice, rows: slice, g: Tensor
    ) -> None:
        """Add what is read of the gradients (n, rows, ...) of some samples and some rows."""
        sums, needs, column = self.sums, self.needs, self.places.column[weight]
        for change in changes:
            for part, values in change.rows(rows):
                flat = g[:, part.start - rows.start : part.stop - rows.start].flatten(1)
                self._project(change, place, wide(flat @ values.flatten().to(flat)))
        if not needs & {"squared_norm", "importance"}:
            return
        columns = max(1, PIECE // len(g))
        weights = weight.detach()[rows].flatten().split(columns)
        for some, w in zip(g.flatten(1).split(columns, 1), weights, strict=True):
            if "squared_norm" in needs:
                sums.squared_norm[place, column] += wide(some).square().sum(1).to(sums.squared_norm)
            if "importance" in needs:
                found = (wide(some).abs() @ wide(w).abs()).to(sums.importance)
                for u, _ in self.places.holders[weight]:
                    sums.importance[place, u] += found

    def held_changes(self, weight: nn.Parameter) -> list["_Change"]:
        """What options change a weight by, in memory where there is room, so that nothing is rounded for each sample."""
        changes = self._changes(weight)
        held_bytes = len(changes) * weight.numel() * weight.element_size()
        return [change.held() for change in changes] if held_bytes <= self.places.room_bytes else changes

    def _changes(self, weight: nn.Parameter) -> list["_Change"]:
        """What each option that leaves inputs alone changes a weight by."""
        decisions: dict[Layer, list[int]] = {}  # that overlap share what is rounded
        for u, layer in self.places.holders[weight]:
            decisions.setdefault(layer, []).append(u)
        return [
            _Change(p, members, weight.detach(), functools.partial(self.context.quantized, layer, precision))
            for layer, members in decisions.items()
            for p, precision in enumerate(self.context.precisions)
            if precision.quantizes_weight and not precision.quantizes_activation
        ]

    def _projected(self, change: "_Change", calls: Calls, size: int) -> bool:
        """Project on one change; False where it takes the gradients themselves."""
        products = projection(calls, size, change.held().rows)
        if products is not None:
            self._project(change, slice(0, size), products)
        return products is not None

    def _project(self, change: "_Change", place: slice, products: Tensor) -> None:
        self.sums.projection[place, change.decisions, change.option] += products.to(self.sums.projection)[:, None]

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
