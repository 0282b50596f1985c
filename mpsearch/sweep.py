"""One forward pass and a few backward passes a batch, for every gradient signal that is asked for."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpsearch.checkpoint import digest
from mpsearch.errors import EstimatorError
from mpsearch.estimator import Estimate, Passes, Setting
from mpsearch.layer import Layer
from mpsearch.measure import log_softmax, wide
from mpsearch.model import Batch, call, first_tensor, inputs_of, predictions, samples
from mpsearch.modules import weight_of
from mpsearch.perturb import input_quantizer, with_input
from mpsearch.sample_gradients import sample_gradients, unfolded

#: `token_weights(model, batch)`: (B, T) weights of tokens, of mean 1.
TokenWeights = Callable[[nn.Module, Batch], Tensor]
#: What a backward pass can be asked for; see `Gradients`.
Quantity = Literal["projection", "squared_norm", "importance", "input_squared_norm", "output", "moments"]


@dataclass(frozen=True)
class Source:
    """What is differentiated, in nats and summed over the predictions of a batch.

    Attributes:
        kind: `drawn`: -log p(y) with y drawn from the model's own predictions (true Fisher information);
            `gauss-newton`: random
            outputs whose covariance is the Hessian of the KL at the logits; `given`: the data's labels, or the user's
            loss.
        draws: backward passes.
        seed: of the draws.
        token_weights: importance of tokens, or None.
        root: gradients of tokens are multiplied by the root of their weight, for signals that square them.
    """

    kind: Literal["drawn", "gauss-newton", "given"]
    draws: int = 1
    seed: int = 0
    token_weights: TokenWeights | None = None
    root: bool = True


@dataclass(eq=False)
class Gradients:
    """What one backward pass over one batch of N samples has found.

    g_n is the gradient of the sum over the predictions of sample n.

    Attributes:
        number: of the batch.
        draw: of the backward pass, from 0.
        counts: (N,) predictions of each sample.
        projection: (N, U, P) <g_n, Q(W) - W>, and for a precision that quantizes inputs <dT_n/dY, Y at it - Y>.
        squared_norm: (N, W) |g_n|^2 for each distinct weight.
        importance: (N, U) sum |g_n w|.
        input_squared_norm: (N, L) squared gradient of each layer's input, through that layer.
        output: (N, U, P) sum (dT_n/dY)^2 (Y at precision - Y)^2.
        moments: for each weight, see `Moments`.
    """

    number: int
    draw: int
    counts: Tensor
    projection: Tensor
    squared_norm: Tensor
    importance: Tensor
    input_squared_norm: Tensor
    output: Tensor
    moments: list[list["Moments"]]


class Accumulator(Protocol):
    """Collects what an estimator needs over batches."""

    def add(self, found: Gradients) -> None:
        """One backward pass."""
        ...

    def state(self) -> Any:
        """Tensors to write to a checkpoint."""
        ...

    def restore(self, state: Any) -> None:
        """Go on from what `state` gave."""
        ...

    def finish(self) -> Estimate:
        """The scores."""
        ...


class GradientEstimator:
    """An estimator that reads gradients at the unquantized model.

    Subclasses say what is differentiated (`source`), what is read of it (`needs`), and what a sample adds
    (`contribution`).

    Attributes:
        needs: quantities of `Gradients` that are read.
        unit: of the table, `nats` or `relative`.
    """

    needs: ClassVar[frozenset[Quantity]]
    unit: ClassVar[str] = "nats"

    @staticmethod
    def together(setting: Setting, estimators: Sequence[Any]) -> list[Estimate]:
        """Score for several estimators of this kind in one sweep."""
        return sweep(setting, estimators)

    def estimate(self, setting: Setting) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where labels that are needed are missing, the model cannot be differentiated, or a
                gradient is
                not finite.
        """
        return sweep(setting, [self])[0]

    def cost(self, batches: int, units: int, precisions: int) -> Passes:
        """Forward and backward passes over the data, at most, whatever the number of units and precisions.

        The second forward pass is taken only where a precision quantizes activations and its noise has to be
        measured.
        """
        noise = "input_squared_norm" in self.needs or self.unit == "relative"
        return Passes(2 if noise else 1, getattr(self, "draws", 1))

    def source(self, setting: Setting) -> Source:
        """What is differentiated. By default labels drawn from the model for the loss `kl`, else the loss itself."""
        weights: TokenWeights | None = getattr(self, "token_weights", None)
        if setting.loss == "kl":
            return Source("drawn", getattr(self, "draws", 1), getattr(self, "seed", 0), weights)
        return Source("given", token_weights=weights)

    def accumulator(self, setting: Setting) -> Accumulator:
        """By default the means of the contributions with their standard errors."""
        return Averages(
            self.contribution(setting), lambda mean, se: self.finish(setting, mean, se), self.source(setting).draws
        )

    def contribution(self, setting: Setting) -> Callable[[Gradients], Tensor]:
        """A function that gives (N, U, ...), what each sample adds, summed over its predictions."""
        raise NotImplementedError

    def finish(self, setting: Setting, mean: NDArray[np.float64], se: NDArray[np.float64]) -> Estimate:
        """By default the mean contribution of a prediction is the score."""
        return Estimate(mean, se, self.unit)


@dataclass(eq=False)
class Averages:
    """Means a prediction, with standard errors that take the draws and predictions of one sample as one (see `measure.Mean`)."""

    contribution: Callable[[Gradients], Tensor]
    conclude: Callable[[NDArray[np.float64], NDArray[np.float64]], Estimate]
    draws: int
    samples: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(0))
    pending: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, found: Gradients) -> None:
        """One backward pass."""
        now = wide(self.contribution(found))
        self.pending = now if found.draw == 0 else self.pending + now
        if found.draw + 1 < self.draws:
            return
        s = self.pending / self.draws
        c = found.counts.to(s).reshape(-1, *[1] * (s.ndim - 1)).expand_as(s)
        self.samples += int((found.counts > 0).sum())
        new = torch.stack([term.sum(0) for term in (s, s * s, s * c, c, c * c)]).cpu()
        self.sums = self.sums + new if self.sums.numel() else new

    def state(self) -> Any:
        """The sums."""
        return {"samples": self.samples, "sums": self.sums}

    def restore(self, state: Any) -> None:
        """The sums."""
        self.samples, self.sums = state["samples"], state["sums"]

    def finish(self) -> Estimate:
        """Mean and standard error of the ratio of sums (Cochran 1977, section 6.3)."""
        s, ss, sc, c, cc = self.sums.numpy()
        mean = s / c
        if self.samples < 2:
            return self.conclude(mean, np.full_like(mean, math.nan))
        residual = np.maximum(ss - 2 * mean * sc + mean**2 * cc, 0.0)
        return self.conclude(mean, np.sqrt(self.samples / (self.samples - 1) * residual) / c)


def sweep(setting: Setting, estimators: Sequence[GradientEstimator]) -> list[Estimate]:
    """Fill several gradient estimators in one run over the data.

    A batch takes one forward pass, and a backward pass for each draw of each distinct source. Parameters need no
    gradient:
    backward passes carry gradients of activations only, and each layer works on its own, inside its hook, on its
    input and output gradient, which is all that per-sample gradients of its weight take. Nothing is kept of a layer
    but its sums.

    Samples must not see each other (batch norm in evaluation mode) and lie along the first dimension of layer inputs,
    or the second where the first is not theirs. A layer with one output for the whole batch (position embeddings) is
    taken as one sample, which is unbiased for drawn labels; for given ones it is refused.
    """
    weights = {p: None for unit in setting.units for p in setting.parameters(unit)}
    for parameter in setting.model.parameters():
        parameter.requires_grad_(False)
    accumulators = [one.accumulator(setting) for one in estimators]
    readers: dict[Source, list[int]] = {}
    for place, one in enumerate(estimators):
        readers.setdefault(one.source(setting), []).append(place)
    name = "sweep | " + digest(*map(repr, estimators))
    stored = setting.checkpoint.get(name)
    done = 0
    if stored is not None:
        done = stored["batches"]
        for accumulator, state in zip(accumulators, stored["states"], strict=True):
            accumulator.restore(state)
    bar = setting.progress(None, len(setting.batches), "Gradients")
    with bar, torch.enable_grad():
        bar.update(done)
        for number, batch in enumerate(setting.batches):
            if number < done:
                continue
            _Sweep(setting, list(weights), number, batch).run(
                {
                    source: (
                        frozenset[Quantity]().union(*(estimators[i].needs for i in places)),
                        [accumulators[i] for i in places],
                    )
                    for source, places in readers.items()
                }
            )
            setting.checkpoint.put(
                name, {"batches": number + 1, "states": [accumulator.state() for accumulator in accumulators]}
            )
            bar.update(1)
    return [accumulator.finish() for accumulator in accumulators]


@dataclass(frozen=True)
class _Call:
    """One call of a module that holds a weight."""

    module: nn.Module
    layer: Layer | None
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def x(self) -> Tensor:
        found: Tensor = next(x for x in (*self.args, *self.keywords.values()) if isinstance(x, Tensor))
        return found


class _Sweep:
    """The passes over one batch."""

    def __init__(self, setting: Setting, weights: list[nn.Parameter], number: int, batch: Batch) -> None:
        self.setting = setting
        self.batch = batch
        self.number = number
        self.samples = samples(batch)
        self.weights = weights
        self.place = {parameter: i for i, parameter in enumerate(weights)}
        self.unit_of = {layer.name: u for u, unit in enumerate(setting.units) for layer in unit.layers}
        self.layers = [layer for unit in setting.units for layer in unit.layers]
        self.row = {layer.name: i for i, layer in enumerate(self.layers)}
        self.units_of_weight: dict[nn.Parameter, list[tuple[int, Layer]]] = {}
        for u, unit in enumerate(setting.units):
            for parameter, layer in setting.parameters(unit).items():
                self.units_of_weight.setdefault(parameter, []).append((u, layer))
        self.calls: dict[nn.Parameter, int] = {}
        self.leaves: list[Tensor] = []
        self.flat = first_tensor(inputs_of(batch)).ndim == 1

    def run(self, readers: dict[Source, tuple[frozenset[Quantity], list[Accumulator]]]) -> None:
        setting = self.setting
        total = len(setting.batches)
        by_module = {setting.module(layer): layer for layer in self.layers}
        handles = []
        # the formulas for per-sample gradients are held against autograd once
        self.checking = self.number == 0 and any(_PER_SAMPLE & needs for needs, _ in readers.values())
        self.through_weights = self.checking
        try:
            for module in setting.model.modules():
                if any(parameter in self.place for parameter in module.parameters(recurse=False)):
                    see = self._watch(by_module.get(module))
                    handles.append(module.register_forward_hook(see, with_kwargs=True))
            for weight in self.weights:
                weight.requires_grad_(self.through_weights)
            output = _forward(setting, self.batch)
            setting.passes.add(total, forward=1)
            runs = [(source, draw) for source in readers for draw in range(source.draws)]
            for source, draw in runs:
                needs, accumulators = readers[source]
                found = self._backward(source, needs, draw, output, (source, draw) != runs[-1])
                setting.passes.add(total, backward=1)
                for accumulator in accumulators:
                    accumulator.add(found)
        finally:
            for handle in handles:
                handle.remove()
            for weight in self.weights:
                weight.requires_grad_(False)

    def _watch(self, layer: Layer | None) -> Callable[..., Any]:
        def see(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], y: Tensor) -> Tensor | None:
            weight = weight_of(module)
            self.calls[weight] = self.calls.get(weight, 0) + 1
            fresh = None
            if not y.requires_grad:
                self.leaves.append(y.detach().requires_grad_())
                y = fresh = self.leaves[-1].clone()  # what follows may write into it
            made = _Call(module, layer, _detached(args), _detached(keywords))
            y.register_hook(lambda g: self._arrived(made, g.detach()))
            return fresh

        return see

    def _backward(
        self, source: Source, needs: frozenset[Quantity], draw: int, output: "_Output", retain: bool
    ) -> Gradients:
        size, units, options = self.samples, len(self.setting.units), len(self.setting.precisions)
        zeros = functools.partial(wide(output.counts).new_zeros)
        self.found = found = Gradients(
            self.number,
            draw,
            output.counts,
            zeros((size, units, options)),
            zeros((size, len(self.weights))),
            zeros((size, units)),
            zeros((size, len(self.layers))),
            zeros((size, units, options)),
            [[] for _ in self.weights],
        )
        self.needs, self.source = needs, source
        self.waiting: dict[nn.Parameter, list[tuple[_Call, Tensor, Tensor]]] = {}
        self.summed: dict[nn.Parameter, Tensor] = {}
        self.token_weights: Tensor | None = None
        if source.token_weights is not None:
            given = source.token_weights(self.setting.model, self.batch).detach().to(output.counts.device)
            self.token_weights = given.sqrt() if source.root else given
        loss = output.scalar(source, draw, self.number)
        points: Sequence[Tensor] = self.weights if self.through_weights else self.leaves
        if not (loss.requires_grad and points):
            return found
        try:
            truths = torch.autograd.grad(loss, points, retain_graph=retain, allow_unused=True)
        except RuntimeError as error:
            raise EstimatorError(f"the loss cannot be differentiated: {error}") from None
        if self.checking and _PER_SAMPLE & needs and source.token_weights is None:
            self._compare(dict(zip(self.weights, truths, strict=True)))
        self._check()
        return found

    def _arrived(self, made: _Call, g: Tensor) -> None:
        """The gradient of the output of a call is there."""
        if self.token_weights is not None:
            g = g * self._spread(made, g)
        layout = self._layout(made)
        if made.layer is not None:
            self._local(made, made.layer, g, layout)
        if not _PER_SAMPLE & self.needs and "moments" not in self.needs:
            return
        x = made.x
        if layout == "second":
            x, g = x.transpose(0, 1), g.transpose(0, 1)
        weight = weight_of(made.module)
        if self.calls[weight] == 1:
            self._weight(weight, [(made, x, g)], layout == "none")
        else:  # gradients of all calls must be added before they are squared
            self.waiting.setdefault(weight, []).append((made, x, g))
            if len(self.waiting[weight]) == self.calls[weight]:
                waiting = self.waiting.pop(weight)
                layouts = {self._layout(one) for one, _, _ in waiting}
                if "none" in layouts and len(layouts) > 1:
                    raise EstimatorError(
                        f"layer {self._name(weight)!r} is called once for each sample and once for the whole batch; "
                        "give batches of one sample"
                    )
                self._weight(weight, waiting, "none" in layouts)

    def _layout(self, made: _Call) -> Literal["first", "second", "none"]:
        """Dimension of the samples in the input of a call."""
        shape, size = made.x.shape, self.samples
        tokens = isinstance(made.module, nn.Embedding)
        second = len(shape) >= (2 if tokens else 3) and shape[1] == size
        if size == 1 or (shape[:1] == (size,) and not (tokens and len(shape) == 1 and not self.flat)):
            return "first"
        if second and not isinstance(made.module, nn.modules.conv._ConvNd):
            return "second"
        if shape[0] % size == 0 and not (tokens and len(shape) == 1 and not self.flat):
            return "first"
        if self.source.kind == "given":
            raise EstimatorError(
                f"layer {self._name(weight_of(made.module))!r} has an input of shape {tuple(shape)} in a batch of {size} "
                "samples: one output for all of them, so no gradients for each; give batches of one sample, or the loss 'kl'"
            )
        return "none"

    def _by_sample(self, values: Tensor, layout: str) -> Tensor:
        """(N,) sums of a tensor laid out as the output of a call."""
        values = wide(values)
        if layout == "none":
            found = values.new_zeros(self.samples)
            found[0] = values.sum()
            return found
        return (values.transpose(0, 1) if layout == "second" else values).reshape(self.samples, -1).sum(1)

    def _local(self, made: _Call, layer: Layer, g: Tensor, layout: str) -> None:
        """What takes the layer itself to be run again: output differences, gradients of inputs."""
        setting, found, u = self.setting, self.found, self.unit_of[layer.name]
        again = ["output"] if "output" in self.needs else []
        if "projection" in self.needs and any(p.quantizes_activation for p in setting.precisions):
            again.append("projection")
        if again:
            with torch.no_grad():
                y = made.module.forward(*made.args, **made.keywords)
            for p, precision in enumerate(setting.precisions):
                if "output" not in again and not precision.quantizes_activation:
                    continue  # the weight's own gradient tells more cheaply
                difference = wide(setting.local_output(layer, precision, made.args, made.keywords)) - wide(y)
                product = wide(g) * difference
                if "output" in again:
                    found.output[:, u, p] += self._by_sample(product.square(), layout)
                if "projection" in again and precision.quantizes_activation:
                    found.projection[:, u, p] += self._by_sample(product, layout)
        if "input_squared_norm" in self.needs and made.x.is_floating_point():
            with torch.enable_grad():
                point = made.x.clone().requires_grad_()
                args, keywords = with_input(made.module, made.args, made.keywords, lambda _: point)
                (slope,) = torch.autograd.grad(made.module.forward(*args, **keywords), point, g)
            found.input_squared_norm[:, self.row[layer.name]] += self._by_sample(wide(slope).square(), layout)

    def _weight(self, weight: nn.Parameter, calls: list[tuple[_Call, Tensor, Tensor]], together: bool) -> None:
        """What the gradients of a weight for each sample tell."""
        setting, found, needs = self.setting, self.found, self.needs
        size = 1 if together else self.samples
        module = calls[0][0].module
        if "moments" in needs:
            found.moments[self.place[weight]] += [
                moments(one.module, x, g, size, self._noises(one.layer, x)) for one, x, g in calls
            ]
        if not _PER_SAMPLE & needs:
            return
        at = self.place[weight]
        for place, gradients in _each(calls, module, size):
            flat = gradients.flatten(1)
            if self.checking:
                self.summed[weight] = self.summed.get(weight, 0) + wide(gradients).sum(0)
            found.squared_norm[place, at] += wide(flat).square().sum(1)
            for u, layer in self.units_of_weight[weight]:
                if "importance" in needs:
                    found.importance[place, u] += wide(flat).abs() @ wide(weight.detach()).flatten().abs()
                if "projection" in needs:
                    for p, precision in enumerate(setting.precisions):
                        if precision.quantizes_weight and not precision.quantizes_activation:
                            change = setting.perturbation(layer, precision).flatten().to(flat)
                            found.projection[place, u, p] += wide(flat @ change)

    def _noises(self, layer: Layer | None, x: Tensor) -> dict[int, Tensor]:
        """Error of an input at each precision that quantizes it."""
        if layer is None or not x.is_floating_point():
            return {}
        functions = [
            input_quantizer(layer.name, precision, self.setting.quantizer, self.setting.ranges)
            for precision in self.setting.precisions
        ]
        return {p: function(x) - x for p, function in enumerate(functions) if function is not None}

    def _spread(self, made: _Call, g: Tensor) -> Tensor:
        """The weights of tokens, laid out as a gradient."""
        weights = self.token_weights
        assert weights is not None
        for found in (weights, weights.transpose(0, 1), weights.reshape(-1)):
            if g.shape[: found.ndim] == found.shape:
                return found.reshape(*found.shape, *[1] * (g.ndim - found.ndim)).to(g)
        raise EstimatorError(
            f"the weights of tokens have shape {tuple(weights.shape)}, the output of layer "
            f"{self._name(weight_of(made.module))!r} has {tuple(g.shape)}: expected the same samples and tokens"
        )

    def _name(self, weight: nn.Parameter) -> str:
        return self.units_of_weight[weight][0][1].name

    def _compare(self, truths: dict[nn.Parameter, Tensor | None]) -> None:
        """Sums of per-sample gradients against autograd's."""
        self.checking = False
        for weight, truth in truths.items():
            if truth is None:
                continue
            found = self.summed.get(weight)
            expected = float(wide(truth).norm())
            tolerance = 1e-3 if truth.dtype in (torch.float32, torch.float64) else 0.1
            error = expected if found is None else float((found.reshape(truth.shape) - wide(truth)).norm())
            if error > tolerance * max(expected, 1e-12):
                raise EstimatorError(
                    f"the gradient of layer {self._name(weight)!r} is {expected:.3g} long, and its input and output account "
                    f"for all but {error:.3g} of it: the weight is used outside the layer's own forward, or changed there; "
                    "leave the layer out, or use a measured estimator"
                )

    def _check(self) -> None:
        found = self.found
        for values, columns in (
            (found.projection.sum(2), [unit.name for unit in self.setting.units]),
            (found.output.sum(2), [unit.name for unit in self.setting.units]),
            (found.importance, [unit.name for unit in self.setting.units]),
            (found.squared_norm, [self._name(weight) for weight in self.weights]),
            (found.input_squared_norm, [layer.name for layer in self.layers]),
        ):
            bad = ~torch.isfinite(values)
            if bad.any():
                row, column = (int(i) for i in bad.nonzero()[0])
                raise EstimatorError(
                    f"the gradient of layer {columns[column]!r} is {float(values[row, column])}, expected a finite number "
                    f"(batch {self.number}, sample {row})"
                )


_PER_SAMPLE: frozenset[Quantity] = frozenset({"projection", "squared_norm", "importance"})


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    return {key: _detached(part) for key, part in value.items()} if isinstance(value, dict) else value


def _each(calls: list[tuple[_Call, Tensor, Tensor]], module: nn.Module, size: int) -> Any:
    """Chunks of per-sample gradients, summed over calls, which may be of different modules (a tied embedding)."""
    chunks = [sample_gradients(one.module, [(x, g)], size) for one, x, g in calls]
    for parts in zip(*chunks, strict=True):
        place = parts[0][0]
        yield place, functools.reduce(lambda a, b: a + b, (gradients for _, gradients in parts))


@dataclass(frozen=True)
class Moments:
    """Second moments of one call of a layer.

    Attributes:
        inputs: (N, G, I) mean over places of x^2, G groups of I inputs (channels x kernel).
        gradients: (N, O) sum over places of g^2.
        noises: by number of precision, (N, G, I) mean over places of the squared error of the input.
    """

    inputs: Tensor
    gradients: Tensor
    noises: dict[int, Tensor]


def moments(module: nn.Module, x: Tensor, g: Tensor, samples: int, noises: Mapping[int, Tensor]) -> Moments:
    """Second moments of the inputs and output gradients of a call, for each sample.

    Raises:
        EstimatorError: for a kind of layer that has none here.
    """
    if isinstance(module, nn.Embedding):
        tokens = x.reshape(samples, -1)
        counts = wide(g).new_zeros(samples, module.num_embeddings)
        counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=counts.dtype))
        inputs = counts[:, None] / tokens.shape[1]
        return Moments(inputs, wide(g).reshape(samples, -1, g.shape[-1]).square().sum(1), {})
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros":
        gradients = wide(g).square().flatten(2).sum(2).reshape(samples, -1, g.shape[1]).sum(1)

        def mean_square(z: Tensor) -> Tensor:
            patches = unfolded(module, z.to(torch.promote_types(z.dtype, torch.float32))).square()
            places = patches.reshape(samples, -1, *patches.shape[1:]).mean((1, 3))
            return wide(places).reshape(samples, module.groups, -1)

        return Moments(mean_square(x), gradients, {p: mean_square(noise) for p, noise in noises.items()})
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":

        def over_tokens(z: Tensor) -> Tensor:
            return wide(z).square().reshape(samples, -1, z.shape[-1]).mean(1)[:, None]

        gradients = wide(g).square().reshape(samples, -1, g.shape[-1]).sum(1)
        return Moments(over_tokens(x), gradients, {p: over_tokens(noise) for p, noise in noises.items()})
    raise EstimatorError(
        f"no second moments for a {type(module).__name__}: linear, conv1d, conv2d and embedding layers have them; "
        "leave the layer out, or use FisherProjection"
    )


@dataclass(eq=False)
class _Output:
    """What a forward pass gave, and what can be differentiated of it."""

    setting: Setting
    counts: Tensor
    logits: Tensor
    labels: Tensor | None
    loss: Tensor | None

    def scalar(self, source: Source, draw: int, number: int) -> Tensor:
        """The sum over the predictions of the batch of what a source differentiates."""
        if source.kind == "given":
            if self.loss is not None:
                return self.loss * len(self.counts)
            if self.labels is None:
                raise EstimatorError(
                    "this estimator differentiates the loss, which needs labels; give batches (inputs, targets) or a loss"
                )
            return -log_softmax(self.logits).gather(1, self.labels[:, None]).sum()
        log_p = log_softmax(self.logits)
        p = log_p.detach().exp()
        generator = torch.Generator().manual_seed(hash((source.seed, draw, number)) % 2**63)
        if source.kind == "drawn":
            uniform = torch.rand(len(p), 1, generator=generator, dtype=torch.float64).to(p)
            drawn = (p.cumsum(1) < uniform * p.sum(1, keepdim=True)).sum(1, keepdim=True).clamp(max=p.shape[1] - 1)
            return -log_p.gather(1, drawn).sum()
        signs = (2 * torch.randint(0, 2, p.shape, generator=generator) - 1).to(p)
        noise = p.sqrt() * signs
        noise = noise - p * (p.sqrt() * signs).sum(1, keepdim=True)
        return (noise * wide(self.logits)).sum()


def _forward(setting: Setting, batch: Batch) -> _Output:
    size = samples(batch)
    if callable(setting.loss):
        loss = setting.mean_loss(batch)
        return _Output(setting, torch.ones(size, device=loss.device), loss.new_zeros(0), None, loss)
    logits, labels, index = predictions(setting.model, call(setting.model, batch), batch)
    if not torch.isfinite(logits.detach()).all():
        raise EstimatorError("the output of the model is not finite")
    return _Output(setting, torch.bincount(index, minlength=size).float(), logits, labels, None)
