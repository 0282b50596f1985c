"""Quantizers that look at the inputs of each layer: SmoothQuant, AWQ and GPTQ around round-to-nearest."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError, nearest
from mpsearch.models.modules.operand import Operand
from mpsearch.models.modules.weights import (
    canonical,
    channel_axis,
    holds_weight,
    kind_of,
    layer_of,
    named_layers,
    weight_of,
)
from mpsearch.models.running import Batch, call, collect, preserved
from mpsearch.quantizers.fake_quantization import Quantizer, inputs
from mpsearch.quantizers.formats import Grid
from mpsearch.quantizers.rounding import RoundToNearest

#: Columns of a weight that GPTQ rounds before it updates all that follow.
_COLUMNS = 128


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What the inputs of a layer were like over calibration data, and the size of the weights that they meet.

    A weight (out, channels / groups, kernel) meets patches x of n = channels / groups x kernel numbers; the rows of a group share
    their patches.

    Attributes:
        gram: (groups, n, n) mean of x x^T over patches, float64.
        low: (channels,) least input of each channel.
        high: (channels,) greatest.
        mean_size: (channels,) mean |x|.
        weight_size: (channels,) greatest |w| of the weights of each input channel.
    """

    gram: Tensor
    low: Tensor
    high: Tensor
    mean_size: Tensor
    weight_size: Tensor


def input_statistics(
    model: nn.Module, batches: Iterable[Batch], names: Sequence[str] | None = None
) -> dict[str, InputStatistics | None]:
    """Statistics of the inputs of linear layers and convolutions, from one forward pass, for the quantizers of this module.

    Args:
        model: any module; it comes back as it was.
        batches: calibration data.
        names: the layers; by default all quantizable ones.

    Returns:
        Layer name -> statistics; None for layers without patches (embeddings, transposed convolutions) and those that no batch reached
        (experts without tokens): the quantizers round these to the nearest.

    Raises:
        EstimatorError: for unusable data, or an input that is not finite.
    """
    data = collect(batches, model)
    with preserved(model, data[0]), torch.no_grad():
        modules = {name: module for name, module in named_layers(model).items() if holds_weight(module)}
        found = list(modules) if names is None else names
        patched = [name for name in found if names is not None or _has_patches(modules[name])]
        sums = {name: _Sums(name, layer_of(model, name)) for name in patched}
        with inputs({layer_of(model, name): s.add for name, s in sums.items()}):
            for batch in data:
                call(model, batch)
    return {name: sums[name].means() if name in sums and sums[name].patches else None for name in found}


def _has_patches(module: nn.Module) -> bool:
    if isinstance(module, Operand):
        return module.kind in ("linear", "bilinear")
    return kind_of(module) in ("linear", "conv1d", "conv2d", "conv3d")


class _Sums:
    """Running sums over the inputs of one module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        if not _has_patches(module):
            raise EstimatorError(
                f"layer {name!r} is a {type(module).__name__}, expected a linear layer or a convolution"
            )
        self._name, self._module, self._axis = name, module, channel_axis(module)
        self.patches = self._positions = 0
        self._gram = self._size = torch.zeros(())
        self._low, self._high = torch.tensor(math.inf), torch.tensor(-math.inf)

    def add(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise EstimatorError(f"the input of layer {self._name!r} is not finite")
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        flat = wide.movedim(self._axis, -1).reshape(-1, wide.shape[self._axis])
        if len(flat):
            patches = _patches(self._module, wide)
            self._gram = self._gram.to(flat.device) + (patches.transpose(1, 2) @ patches).double()
            self._low = torch.minimum(self._low.to(flat), flat.amin(0))
            self._high = torch.maximum(self._high.to(flat), flat.amax(0))
            self._size = self._size.to(flat.device) + flat.abs().sum(0).double()
            self.patches += patches.shape[1]
            self._positions += len(flat)
        return x

    def means(self) -> InputStatistics:
        groups = len(self._gram)
        weight = canonical(self._module).detach().abs().to(self._low.dtype)
        weight_size = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).amax((1, 3)).reshape(-1)
        gram, mean_size = self._gram / self.patches, self._size / self._positions
        return InputStatistics(gram, self._low, self._high, mean_size, weight_size)


def _patches(module: nn.Module, x: Tensor) -> Tensor:
    """(groups, L, n) the numbers that each output position multiplies with a row of the weight."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return x.reshape(1, -1, x.shape[-1])
    weight = weight_of(module)
    size = math.prod(weight.shape[1:])
    one_hot = torch.eye(size, dtype=x.dtype, device=x.device).repeat(module.groups, 1).reshape(-1, *weight.shape[1:])
    forward: Callable[..., Tensor] = module._conv_forward  # padding, stride, dilation as they are
    picked = forward(x, one_hot, None)
    picked = picked[None] if picked.ndim == len(module.kernel_size) + 1 else picked
    return picked.reshape(len(picked), module.groups, size, -1).permute(1, 0, 3, 2).reshape(module.groups, -1, size)


class _OfLayers:
    """A quantizer that is another one in every layer."""

    statistics: Mapping[str, InputStatistics | None]
    quantizer: RoundToNearest

    def _with(self, found: InputStatistics) -> Quantizer:
        """The quantizer of a layer with such inputs."""
        raise NotImplementedError

    def stored_bytes(self, layer: Layer, precision: Precision) -> int:
        """As of `quantizer`: factors of input channels go into what makes the inputs."""
        return self.quantizer.stored_bytes(layer, precision)

    def of_layer(self, name: str) -> Quantizer:
        """The quantizer of one layer; `quantizer` where its statistics are None.

        Raises:
            EstimatorError: for a layer that `input_statistics` did not meet.
        """
        if name not in self.statistics:
            raise EstimatorError(f"no input statistics of layer {name!r}{nearest(name, self.statistics)}")
        found = self.statistics[name]
        return self.quantizer if found is None else self._with(found)

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """Refused: the inputs of the layer are needed.

        Raises:
            EstimatorError: always; `of_layer(name)` is the quantizer of a layer.
        """
        raise EstimatorError(f"{type(self).__name__} looks at a layer's inputs: use of_layer(name)(weight, precision)")


@dataclass(frozen=True)
class SmoothQuant(_OfLayers):
    """Move the difficulty from inputs to weights, per input channel (SmoothQuant, 2211.10438, equation 4).

        w' = Q(w s) / s,   x' = Q(x / s) s,   s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

    Attributes:
        statistics: of `input_statistics(model, batches)`.
        alpha: 0 makes the weights alike, 1 the inputs.
        quantizer: rounds both.

    Inputs 16 times as large in the second channel, weights alike: s = (1, 4) shares the factor.

    >>> statistics = InputStatistics(torch.eye(2)[None], *torch.tensor([[0.0, 0], [1, 16], [1, 1], [1, 1]]))
    >>> quantizer = SmoothQuant({"fc": statistics}, quantizer=RoundToNearest(scale="max")).of_layer("fc")
    >>> quantizer(torch.tensor([[1.0, 0.8]]), Precision("3"))      # round (1, 3.2) to multiples of 3.2 / 3
    tensor([[1.0667, 0.8000]])
    """

    statistics: Mapping[str, InputStatistics | None] = field(repr=False)
    alpha: float = 0.5
    quantizer: RoundToNearest = field(default=RoundToNearest())

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise EstimatorError(f"alpha={self.alpha}: expected a number from 0 to 1")

    def _with(self, found: InputStatistics) -> Quantizer:
        inputs_size = torch.maximum(-found.low, found.high)
        scale = inputs_size**self.alpha / found.weight_size ** (1 - self.alpha)
        usable = (inputs_size > 0) & (found.weight_size > 0)
        scale = torch.where(usable, scale, torch.ones_like(scale))
        return _Smoothed(found, scale, self.quantizer)


@dataclass(frozen=True, eq=False)
class _Smoothed:
    """SmoothQuant in one layer."""

    statistics: InputStatistics
    scale: Tensor
    quantizer: RoundToNearest

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        return _scaled(weight, self.scale, len(self.statistics.gram), precision, self.quantizer)

    def activation_values(self, x: Tensor, name: str, low: float, high: float) -> Tensor:
        """Rounds x / s; its range follows from the ranges of the channels."""
        scale = self.scale.to(x.device)
        least, most = float((self.statistics.low / self.scale).min()), float((self.statistics.high / self.scale).max())
        return (self.quantizer.activation_values(x / scale, name, least, most) * scale).to(x.dtype)


def _scaled(weight: Tensor, scale: Tensor, groups: int, precision: Precision, quantizer: Quantizer) -> Tensor:
    """Q(w s) / s, s for each input channel."""
    if not precision.quantizes_weight:
        return weight
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    by_row = scale.to(wide).reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    by_row = by_row.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    return (quantizer((wide * by_row).to(weight.dtype), precision).to(wide) / by_row).to(weight.dtype)


def _output_error(change: Tensor, gram: Tensor) -> Tensor:
    """Mean squared change of the outputs, summed over rows: tr(D G D^T)."""
    rows = change.reshape(len(gram), -1, gram.shape[-1]).double()
    return ((rows @ gram.to(rows)) * rows).sum()


@dataclass(frozen=True)
class ActivationAware(_OfLayers):
    """Scale up the weights of large input channels before rounding (AWQ, 2306.00978, equations 4 and 5).

        w' = Q(w s) / s,   s_j = (mean|x_j|)^alpha,   alpha of least  E ||(w' - w) x||^2  among 0, 1/steps, ..., 1 - 1/steps

    s is divided by the root of its extremes' product. alpha = 0 is no scaling, so that the result is never worse on the calibration
    data. Inputs are left to `quantizer`.

    Attributes:
        statistics: of `input_statistics(model, batches)`.
        steps: values of alpha.
        quantizer: rounds the scaled weight.

    Inputs 16 times as large in the first channel; alpha is 0 or 1/2, so s is 1 and 1, or in proportion 4 to 1:

    >>> statistics = InputStatistics(torch.diag(torch.tensor([256.0, 1.0]))[None], *torch.tensor([[0.0, 0], [16, 1], [16, 1], [1, 1]]))
    >>> quantizer = ActivationAware({"fc": statistics}, steps=2, quantizer=RoundToNearest(scale="max")).of_layer("fc")
    >>> quantizer(torch.tensor([[0.4, 1.0]]), Precision("3"))     # round (1.6, 1) to multiples of 1.6 / 3
    tensor([[0.4000, 1.0667]])
    """

    statistics: Mapping[str, InputStatistics | None] = field(repr=False)
    steps: int = 20
    quantizer: RoundToNearest = field(default=RoundToNearest())

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise EstimatorError(f"steps={self.steps}: expected 1 or more")

    def _with(self, found: InputStatistics) -> Quantizer:
        sizes = found.mean_size.clamp(min=1e-4)

        def quantize(weight: Tensor, precision: Precision) -> Tensor:
            tried = []
            for step in range(self.steps):
                scale = sizes ** (step / self.steps)
                scale = scale / (scale.max() * scale.min()).sqrt()
                value = _scaled(weight, scale, len(found.gram), precision, self.quantizer)
                tried.append((float(_output_error(value.double() - weight.double(), found.gram)), value))
            return min(tried, key=lambda pair: pair[0])[1]

        return _WithInputs(quantize, self.quantizer)


@dataclass(frozen=True)
class GPTQ(_OfLayers):
    """Round column by column and let the columns that follow make up for the error (GPTQ, 2210.17323, section 3).

    With G = E[x x^T] + damping mean(diag G) I and U the upper Cholesky factor of G^-1, for each column j in turn:

        e = (w_j - Q(w_j)) / U_jj,   w_k <- w_k - e U_jk  for k > j

    Columns are taken by falling G_jj, so that the errors of the largest inputs are made up for, or as they stand (`activation_order`).
    Scales and zero-points are those of `quantizer` for the untouched weight, so format and bytes are the same. Formats without scaled codes
    (bf16, GGUF types) are left to `quantizer`, and so are inputs.

    Attributes:
        statistics: of `input_statistics(model, batches)`.
        damping: added to the diagonal, in parts of its mean.
        activation_order: take the columns of large inputs first.
        quantizer: gives the scales.

    Two inputs that mostly agree and a third; steps of 1. Of 1.4, 0.4 is rounded away, and the second weight takes up 0.9 of it:

    >>> gram = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])[None].double()
    >>> quantizer = GPTQ({"fc": InputStatistics(gram, *torch.ones(4, 3))}, activation_order=False, quantizer=RoundToNearest(scale="max"))
    >>> quantizer.of_layer("fc")(torch.tensor([[1.4, 2.2, 3.0]]), Precision("3"))     # 2.2 + 0.9 x 0.4 is nearest to 3
    tensor([[1., 3., 3.]])
    """

    statistics: Mapping[str, InputStatistics | None] = field(repr=False)
    damping: float = 0.01
    activation_order: bool = True
    quantizer: RoundToNearest = field(default=RoundToNearest())

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise EstimatorError(f"damping={self.damping}: expected a number above 0")

    def _with(self, found: InputStatistics) -> Quantizer:
        order, upper = _factor(found, self.damping, self.activation_order)

        def quantize(weight: Tensor, precision: Precision) -> Tensor:
            if not precision.quantizes_weight:
                return weight
            codes = self.quantizer.codes(weight, precision)
            if codes.grid is None:
                return codes.values()
            steps, zeros = codes.steps_and_zeros()
            shape = (len(upper), weight.shape[0] // len(upper), upper.shape[1])
            place = order[:, None].expand(shape)
            rows, steps, zeros = (x.reshape(shape).to(steps).gather(2, place) for x in (weight, steps, zeros))
            values = _compensated(rows, upper.to(rows), steps, zeros, codes.grid)
            return torch.empty_like(rows).scatter_(2, place, values).reshape(weight.shape).to(weight.dtype)

        return _WithInputs(quantize, self.quantizer)


@functools.lru_cache(maxsize=4)  # the precisions of a layer follow one another
def _factor(statistics: InputStatistics, damping: float, by_size: bool) -> tuple[Tensor, Tensor]:
    """(groups, n) order of columns and (groups, n, n) upper Cholesky factor of the inverse of the damped Gram matrix in that order."""
    gram = statistics.gram
    sizes = gram.diagonal(dim1=1, dim2=2)
    order = (
        (-sizes).argsort(dim=1, stable=True)
        if by_size
        else torch.arange(gram.shape[1]).expand_as(sizes).to(gram.device)
    )
    gram = gram.gather(1, order[:, :, None].expand_as(gram)).gather(2, order[:, None].expand_as(gram))
    mean = sizes.mean(1)[:, None, None]
    added = torch.where(mean > 0, damping * mean, torch.ones_like(mean))
    inverse = torch.linalg.inv(gram + added * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device))
    return order, torch.linalg.cholesky(inverse, upper=True)


def _compensated(rows: Tensor, upper: Tensor, steps: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """(groups, out, n) rounded column by column; see `GPTQ`. Columns far to the right are updated once a block."""
    left, found = rows.clone(), torch.empty_like(rows)
    width = rows.shape[2]
    for start in range(0, width, _COLUMNS):
        end = min(start + _COLUMNS, width)
        errors = torch.empty_like(rows[..., start:end])
        for j in range(start, end):
            column = slice(j, j + 1)
            found[..., column] = grid.round(left[..., column], steps[..., column], zeros[..., column])
            error = (left[..., column] - found[..., column]) / upper[:, j, j, None, None]
            left[..., j:end] -= error * upper[:, column, j:end]
            errors[..., j - start : j - start + 1] = error
        left[..., end:] -= errors @ upper[:, start:end, end:]
    return found


@dataclass(frozen=True)
class _WithInputs:
    """A function of weights, and the quantizer of inputs."""

    function: Quantizer
    quantizer: RoundToNearest

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        return self.function(weight, precision)
