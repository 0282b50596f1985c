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
from mpsearch.modules import channel_axis, weight_of
from mpsearch.perturb import input_quantizer, with_input
from mpsearch.sample_gradients import sample_gradients, unfolded

#: `token_weights(model, batch)`: (B, T) weights of tokens, of mean 1.
TokenWeights = Callable[[nn.Module, Batch], Tensor]
#: What a backward pass can be asked for; see `Gradients`.
Quantity = Literal["projection", "squared_norm", "importance", "input_squared_norm", "output", "moments"]
#: Where the samples lie in a tensor: along its first or second dimension; `last`: in the first behind tokens or
#: windows, as (windows x samples, ...); `none`: it is the same for all.
Layout = Literal["first", "second", "last", "none"]

_OF_SAMPLES: frozenset[Quantity] = frozenset({"projection", "squared_norm", "importance"})
_OF_WEIGHTS: frozenset[Quantity] = _OF_SAMPLES | {"moments"}


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
        measured. Not counted: the one backward pass that tells samples from tokens where shapes leave doubt.
        """
        noise = "input_squared_norm" in self.needs or self.unit == "relative"
        return Passes(2 if noise else 1, getattr(self, "draws", 1))

    def source(self, setting: Setting) -> Source:
        """What is differentiated. By default random outputs (`gauss-newton`) for the loss `kl`, else the loss itself.

        Random outputs and drawn labels have the same second moments, the Fisher information; labels drawn from
        a confident model are nearly all the same, and what counts comes in rare large gradients.
        """
        weights: TokenWeights | None = getattr(self, "token_weights", None)
        if setting.loss == "kl":
            return Source("gauss-newton", getattr(self, "draws", 1), getattr(self, "seed", 0), weights)
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

    Samples must not see each other (batch norm in evaluation mode). They lie along the first dimension of a layer's
    input, or the second, or share the first with tokens or windows. Where its shape leaves doubt, one more backward
    pass over one batch, from the predictions of its first sample, tells. A layer with one output for the whole batch
    (position embeddings) is taken as one sample, which is unbiased for squares with drawn labels, and refused else.

    On the first batch the gradient of each weight is held against what its layer's inputs and output gradients
    account for.
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
    known: dict[nn.Module, Layout] = {}
    bar = setting.progress(None, len(setting.batches), "Gradients")
    with bar, torch.enable_grad():
        bar.update(done)
        for number, batch in enumerate(setting.batches):
            if number < done:
                continue
            _Sweep(setting, list(weights), number, batch, known).run(
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


@dataclass(frozen=True, eq=False)
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

    def __init__(
        self,
        setting: Setting,
        weights: list[nn.Parameter],
        number: int,
        batch: Batch,
        known: dict[nn.Module, Layout],
    ) -> None:
        self.setting = setting
        self.batch = batch
        self.number = number
        self.samples = samples(batch)
        self.weights = weights
        self.known = known
        self.place = {parameter: i for i, parameter in enumerate(weights)}
        self.unit_of = {layer.name: u for u, unit in enumerate(setting.units) for layer in unit.layers}
        self.layers = [layer for unit in setting.units for layer in unit.layers]
        self.row = {layer.name: i for i, layer in enumerate(self.layers)}
        self.units_of_weight: dict[nn.Parameter, list[tuple[int, Layer]]] = {}
        for u, unit in enumerate(setting.units):
            for parameter, layer in setting.parameters(unit).items():
                self.units_of_weight.setdefault(parameter, []).append((u, layer))
        self.activations = any(precision.quantizes_activation for precision in setting.precisions)
        self.calls: dict[nn.Parameter, int] = {}
        self.layouts: dict[_Call, Layout] = {}
        self.doubtful: dict[_Call, Tensor] = {}
        self.leaves: list[Tensor] = []
        self.found: Gradients | None = None
        self.flat = first_tensor(inputs_of(batch)).ndim == 1
        self.checking = number == 0

    def run(self, readers: dict[Source, tuple[frozenset[Quantity], list[Accumulator]]]) -> None:
        setting = self.setting
        total = len(setting.batches)
        by_module = {setting.module(layer): layer for layer in self.layers}
        token_weights = {source: self._token_weights(source) for source in readers}
        handles = []
        points = self.weights if self.checking else self.leaves
        try:
            for module in setting.model.modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, nn.Parameter) and weight in self.place:
                    see = self._watch(by_module.get(module))
                    handles.append(module.register_forward_hook(see, with_kwargs=True))
            for weight in self.weights:
                weight.requires_grad_(self.checking)
            output = _forward(setting, self.batch, self.number)
            setting.passes.add(total, forward=1)
            if self.doubtful:
                self._resolve(output)
                setting.passes.add(total, backward=1)
            runs = [(source, draw) for source in readers for draw in range(source.draws)]
            for source, draw in runs:
                needs, accumulators = readers[source]
                self.token_weights = token_weights[source]
                found = self._backward(source, needs, draw, output, points, (source, draw) != runs[-1])
                setting.passes.add(total, backward=1)
                for accumulator in accumulators:
                    accumulator.add(found)
        finally:
            for handle in handles:
                handle.remove()
            for weight in self.weights:
                weight.requires_grad_(False)

    def _token_weights(self, source: Source) -> Tensor | None:
        """What gradients of tokens are multiplied by; the function may run the model."""
        if source.token_weights is None:
            return None
        with torch.no_grad():
            given = source.token_weights(self.setting.model, self.batch)
        return given.sqrt() if source.root else given

    def _watch(self, layer: Layer | None) -> Callable[..., Any]:
        def see(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], y: Tensor) -> Tensor | None:
            weight = weight_of(module)
            self.calls[weight] = self.calls.get(weight, 0) + 1
            fresh = None
            if not y.requires_grad:
                self.leaves.append(y.detach().requires_grad_())
                y = fresh = self.leaves[-1].clone()  # what follows may write into it
            made = _Call(module, layer, _detached(args), _detached(keywords))
            candidates = self._candidates(module, made.x)
            if candidates in ((), ("first",)):
                self.layouts[made] = candidates[0] if candidates else "none"
            elif module in self.known:
                self.layouts[made] = self.known[module]
            else:
                self.doubtful[made] = y
            y.register_hook(lambda g: self._arrived(made, g.detach()))
            return fresh

        return see

    def _candidates(self, module: nn.Module, x: Tensor) -> tuple[Layout, ...]:
        """Where the samples may lie in the input of a call, the likeliest first."""
        size, tokens = self.samples, isinstance(module, nn.Embedding)
        if size == 1:
            return ("first",)
        found: list[Layout] = []
        if len(x) % size == 0 and not (tokens and x.ndim == 1 and not self.flat):
            found += ["first"] if len(x) == size else ["first", "last"]
        if x.ndim >= (2 if tokens else 3) and x.shape[1] == size and not isinstance(module, nn.modules.conv._ConvNd):
            found.append("second")
        return tuple(found)

    def _resolve(self, output: "_Output") -> None:
        """Find the samples where shapes leave doubt: the predictions of one depend on no rows but its own."""
        if output.loss is not None:
            made = next(iter(self.doubtful))
            raise EstimatorError(
                f"layer {self._name(weight_of(made.module))!r} has an input of shape {tuple(made.x.shape)} in a batch of "
                f"{self.samples} samples: with an own loss it cannot be told which rows are those of one sample; give "
                "batches of one sample, or the loss 'kl' or 'cross-entropy'"
            )
        sample = int(output.index[0])
        mine = output.logits[output.index == sample]
        rest = torch.arange(self.samples, device=mine.device) != sample
        generator = torch.Generator().manual_seed(0)
        probe = (mine * torch.randn(mine.shape, generator=generator).to(mine)).sum()
        try:
            slopes = torch.autograd.grad(probe, list(self.doubtful.values()), retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise EstimatorError(f"the output of the model cannot be differentiated: {error}") from None
        for made, g in zip(self.doubtful, slopes, strict=True):
            candidates = self._candidates(made.module, made.x)
            fits = [at for at in candidates if g is None or not self._rows(g, at).reshape(self.samples, -1)[rest].any()]
            self.layouts[made] = self.known[made.module] = fits[0] if fits else "none"

    def _rows(self, values: Tensor, layout: Layout) -> Tensor:
        """A tensor laid out as the input or output of a call, with the rows of a sample next to each other."""
        if layout == "second":
            return values.transpose(0, 1)
        if layout == "last":
            return values.reshape(-1, self.samples, *values.shape[1:]).transpose(0, 1).flatten(0, 1)
        return values

    def _backward(
        self,
        source: Source,
        needs: frozenset[Quantity],
        draw: int,
        output: "_Output",
        points: Sequence[Tensor],
        retain: bool,
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
        self.scale: dict[nn.Parameter, float] = {}
        loss = output.scalar(source, draw, self.number)
        if not (loss.requires_grad and points):
            return found
        try:
            truths = torch.autograd.grad(loss, points, retain_graph=retain, allow_unused=True)
        except EstimatorError:  # of a hook
            raise
        except RuntimeError as error:
            raise EstimatorError(f"the loss cannot be differentiated: {error}") from None
        for weight, calls in self.waiting.items():  # not all of its outputs are used
            self._weight(weight, calls)
        if self.checking:
            self._compare(dict(zip(self.weights, truths, strict=True)))
            self.checking = False
        self._check(found)
        return found

    def _arrived(self, made: _Call, g: Tensor) -> None:
        """The gradient of the output of a call is there."""
        found = self.found
        if found is None:
            return
        weight = weight_of(made.module)
        if self.checking:
            ((_, total),) = sample_gradients([(made.module, made.x, g)], 1)
            self.summed[weight] = self.summed.get(weight, 0) + wide(total[0])
            size = float(wide(made.x).norm()) if made.x.is_floating_point() else 1.0
            self.scale[weight] = self.scale.get(weight, 0.0) + size * float(wide(g).norm())
        if self.token_weights is not None:
            g = g * self._spread(made, g)
        layout = self._layout(made)
        if made.layer is not None:
            self._local(found, made, made.layer, g, layout)
        if not _OF_WEIGHTS & self.needs:
            return
        self.waiting.setdefault(weight, []).append((made, self._rows(made.x, layout), self._rows(g, layout)))
        if len(self.waiting[weight]) == self.calls[weight]:  # gradients of all calls are added before they are squared
            self._weight(weight, self.waiting.pop(weight))

    def _layout(self, made: _Call) -> Layout:
        """Where the samples lie in the input of a call."""
        layout = self.layouts[made]
        if layout == "none" and (self.source.kind == "given" or "importance" in self.needs):
            raise EstimatorError(
                f"layer {self._name(weight_of(made.module))!r} has an input of shape {tuple(made.x.shape)} in a batch of "
                f"{self.samples} samples: one output for all of them, so no gradients for each; give batches of one sample"
                + (", or the loss 'kl'" if self.source.kind == "given" else "")
            )
        return layout

    def _by_sample(self, values: Tensor, layout: Layout) -> Tensor:
        """(N,) sums of a tensor laid out as the output of a call."""
        values = wide(values)
        if layout == "none":
            found = values.new_zeros(self.samples)
            found[0] = values.sum()
            return found
        return self._rows(values, layout).reshape(self.samples, -1).sum(1)

    def _local(self, found: Gradients, made: _Call, layer: Layer, g: Tensor, layout: Layout) -> None:
        """What takes the layer itself to be run again: output differences, gradients of inputs."""
        setting, u = self.setting, self.unit_of[layer.name]
        whole = "output" in self.needs
        if whole or ("projection" in self.needs and self.activations):
            with torch.no_grad():
                y = made.module.forward(*made.args, **made.keywords)
            for p, precision in enumerate(setting.precisions):
                if not (whole or precision.quantizes_activation):
                    continue  # the weight's own gradient tells more cheaply
                difference = wide(setting.local_output(layer, precision, made.args, made.keywords)) - wide(y)
                product = wide(g) * difference
                if whole:
                    found.output[:, u, p] += self._by_sample(product.square(), layout)
                if precision.quantizes_activation:
                    found.projection[:, u, p] += self._by_sample(product, layout)
        if "input_squared_norm" in self.needs and self.activations and made.x.is_floating_point():
            with torch.enable_grad():
                point = made.x.clone().requires_grad_()
                args, keywords = with_input(made.module, made.args, made.keywords, lambda _: point)
                (slope,) = torch.autograd.grad(made.module.forward(*args, **keywords), point, g)
            found.input_squared_norm[:, self.row[layer.name]] += self._by_sample(wide(slope).square(), layout)

    def _weight(self, weight: nn.Parameter, calls: list[tuple[_Call, Tensor, Tensor]]) -> None:
        """What the gradients of a weight for each sample tell."""
        setting, found, needs = self.setting, self.found, self.needs
        assert found is not None
        shared = {self.layouts[made] == "none" for made, _, _ in calls}
        if len(shared) > 1:
            raise EstimatorError(
                f"layer {self._name(weight)!r} is called once for each sample and once for the whole batch; "
                "give batches of one sample"
            )
        size = 1 if shared == {True} else self.samples
        if "moments" in needs:
            found.moments[self.place[weight]] += [
                moments(one.module, x, g, size, self._noises(one.layer, x)) for one, x, g in calls
            ]
        if not _OF_SAMPLES & needs:
            return
        at = self.place[weight]
        for place, gradients in sample_gradients([(one.module, x, g) for one, x, g in calls], size):
            flat = gradients.flatten(1)
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
            input_quantizer(
                layer.name,
                precision,
                self.setting.quantizer,
                self.setting.ranges,
                channel_axis(self.setting.module(layer)),
            )
            for precision in self.setting.precisions
        ]
        return {p: function(x) - x for p, function in enumerate(functions) if function is not None}

    def _spread(self, made: _Call, g: Tensor) -> Tensor:
        """The weights of tokens, laid out as a gradient."""
        weights = self.token_weights
        assert weights is not None
        for found in (weights, weights.transpose(0, -1), weights.flatten()):
            if g.shape[: found.ndim] == found.shape:
                return found.reshape(*found.shape, *[1] * (g.ndim - found.ndim)).to(g)
        raise EstimatorError(
            f"the weights of tokens have shape {tuple(weights.shape)}, the output of layer "
            f"{self._name(weight_of(made.module))!r} has {tuple(g.shape)}: expected the same samples and tokens"
        )

    def _name(self, weight: nn.Parameter) -> str:
        return self.units_of_weight[weight][0][1].name

    def _compare(self, truths: dict[nn.Parameter, Tensor | None]) -> None:
        """Gradients from the inputs and outputs of layers against autograd's."""
        for weight, truth in truths.items():
            if truth is None:
                continue
            expected = float(wide(truth).norm())
            error = float((wide(truth) - self.summed.get(weight, 0)).norm())
            tolerance = 1e-3 if truth.dtype in (torch.float32, torch.float64) else 0.1
            rounding = torch.finfo(truth.dtype).eps * self.scale.get(weight, 0.0)  # of terms that cancel
            if error > max(tolerance * expected, rounding):
                raise EstimatorError(
                    f"the gradient of layer {self._name(weight)!r} is {expected:.3g} long, and its input and output account "
                    f"for all but {error:.3g} of it: the weight is used outside the layer's own forward, or changed there; "
                    "leave the layer out, or use a measured estimator"
                )

    def _check(self, found: Gradients) -> None:
        units = [unit.name for unit in self.setting.units]
        names = [self._name(weight) for weight in self.weights]
        checks = [
            (found.projection.sum(2), units),
            (found.output.sum(2), units),
            (found.importance, units),
            (found.squared_norm, names),
            (found.input_squared_norm, [layer.name for layer in self.layers]),
        ]
        for name, calls in zip(names, found.moments, strict=True):
            checks += [((one.inputs.flatten(1).sum(1) * one.gradients.sum(1))[:, None], [name]) for one in calls]
        for values, columns in checks:
            bad = ~torch.isfinite(values)
            if bad.any():
                row, column = (int(i) for i in bad.nonzero()[0])
                raise EstimatorError(
                    f"the gradient of layer {columns[column]!r} is {float(values[row, column])}, expected a finite number "
                    f"(batch {self.number}, sample {row})"
                )


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    return {key: _detached(part) for key, part in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class Moments:
    """Second moments of one call of a layer.

    Attributes:
        inputs_first: the weight is stored (inputs, outputs).
        inputs: (N, G, I) mean over places of x^2, G groups of I inputs (channels x kernel).
        gradients: (N, O) sum over places of g^2.
        noises: by number of precision, (N, G, I) mean over places of the squared error of the input.
    """

    inputs_first: bool
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
        return Moments(True, inputs, wide(g).reshape(samples, -1, g.shape[-1]).square().sum(1), {})
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros":
        gradients = wide(g).square().flatten(2).sum(2).reshape(samples, -1, g.shape[1]).sum(1)

        def mean_square(z: Tensor) -> Tensor:
            patches = unfolded(module, z.to(torch.promote_types(z.dtype, torch.float32))).square()
            places = patches.reshape(samples, -1, *patches.shape[1:]).mean((1, 3))
            return wide(places).reshape(samples, module.groups, -1)

        return Moments(False, mean_square(x), gradients, {p: mean_square(noise) for p, noise in noises.items()})
    transposed = type(module).__name__ == "Conv1D"
    if isinstance(module, nn.Linear) or transposed:

        def over_tokens(z: Tensor) -> Tensor:
            return wide(z).square().reshape(samples, -1, z.shape[-1]).mean(1)[:, None]

        gradients = wide(g).square().reshape(samples, -1, g.shape[-1]).sum(1)
        return Moments(transposed, over_tokens(x), gradients, {p: over_tokens(noise) for p, noise in noises.items()})
    raise EstimatorError(
        f"no second moments for a {type(module).__name__}: linear, conv1d, conv2d and embedding layers have them; "
        "leave the layer out, or use FisherProjection"
    )


@dataclass(eq=False)
class _Output:
    """What a forward pass gave, and what can be differentiated of it."""

    counts: Tensor
    index: Tensor
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


def _forward(setting: Setting, batch: Batch, number: int) -> _Output:
    size = samples(batch)
    if callable(setting.loss):
        loss = setting.mean_loss(batch)
        index = torch.arange(size, device=loss.device)
        return _Output(torch.ones(size, device=loss.device), index, loss.new_zeros(0), None, loss)
    logits, labels, index = predictions(setting.model, call(setting.model, batch), batch)
    if not torch.isfinite(logits.detach()).all():
        raise EstimatorError(f"the output of the model is not finite in batch {number}")
    return _Output(torch.bincount(index, minlength=size).float(), index, logits, labels, None)
