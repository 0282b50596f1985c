"""What the inputs of each layer are like, and the quantizers that go by it layer by layer."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

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
from mpsearch.quantizers.fake_quantization import inputs
from mpsearch.quantizers.quantizer import Around, Quantizer, WeightFunction
from mpsearch.quantizers.rounding import RoundToNearest


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
    """Statistics of the inputs of linear layers and convolutions, from one forward pass, for the quantizers that look at them.

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
        chosen = list(modules) if names is None else names
        patched = [name for name in chosen if names is not None or _has_patches(modules[name])]
        sums = {name: _Sums(name, layer_of(model, name)) for name in patched}
        with inputs({layer_of(model, name): total.add for name, total in sums.items()}):
            for batch in data:
                call(model, batch)
    return {name: sums[name].means() if name in sums and sums[name].patches else None for name in chosen}


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


class LayerByLayer(Around):
    """A quantizer that is another one in every layer, by what the inputs of that layer are like.

    Attributes:
        statistics: of `input_statistics(model, batches)`; None until they are taken from the data of a run.
        quantizer: does the rounding; keeps codes, scales and bytes.
    """

    statistics: Mapping[str, InputStatistics | None] | None
    quantizer: RoundToNearest

    @property
    def needs_data(self) -> bool:
        """True where it was made without statistics."""
        return self.statistics is None

    def calibrated(self, model: nn.Module, batches: Sequence[Batch]) -> Self:
        """With the statistics of these inputs; itself where it has some."""
        if self.statistics is not None:
            return self
        statistics = input_statistics(model, batches)
        calibrated: Self = dataclasses.replace(cast(Any, self), statistics=statistics)  # each of these is a dataclass
        return calibrated

    def for_inputs(self, statistics: InputStatistics) -> Quantizer:
        """The quantizer of a layer with such inputs."""
        raise NotImplementedError

    def of_layer(self, name: str) -> Quantizer:
        """The quantizer of one layer; `quantizer` where its statistics are None.

        Raises:
            EstimatorError: for a layer that `input_statistics` did not meet.
        """
        if self.statistics is None:
            raise EstimatorError(
                f"{self.name} has no input statistics yet: make it with statistics=input_statistics(model, batches), or give it to a "
                "door with calibration data"
            )
        if name not in self.statistics:
            raise EstimatorError(f"no input statistics of layer {name!r}{nearest(name, self.statistics)}")
        statistics = self.statistics[name]
        return self.quantizer if statistics is None else self.for_inputs(statistics)

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """Refused: the inputs of the layer are needed.

        Raises:
            EstimatorError: always; `of_layer(name)` is the quantizer of a layer.
        """
        raise EstimatorError(f"{self.name} looks at a layer's inputs: use of_layer(name)(weight, precision)")


class WeightsBy(Around):
    """The quantizer of one layer: weights by a function, all else as within."""

    def __init__(self, function: WeightFunction, quantizer: RoundToNearest) -> None:
        super().__init__(quantizer)
        self.function = function

    def __call__(self, weight: Tensor, precision: Precision) -> Tensor:
        """What the function returns; the weight itself where it is left alone."""
        return self.function(weight, precision) if precision.quantizes_weight else weight
