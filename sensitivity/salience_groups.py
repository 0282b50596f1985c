"""SliM-LLM: salience of weight groups."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.core.layer import Layer
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.weights import canonical, weight_of
from mpsearch.models.observing import observed
from mpsearch.models.running import call, samples
from mpsearch.models.streaming.offloading import replaced

#: Hessians kept at once; more layers than fit are done in turns, each with a forward pass of its own.
HESSIAN_BYTES = 2**30
#: Elements of unfolded inputs worked on at once.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class SalienceGroups:
    """Salience of groups of weights times their relative squared errors, summed (SliM-LLM, 2405.14917, and its code).

        H = 2 / N sum over samples and places of x x^T + damping I,    U^T U = H^-1 (Cholesky)
        salience(g) = sum over weights of group g of w_ij^2 / U_jj^2
        sensitivity(l, p) = sum over groups of salience(g) ||Q(W_g) - W_g||^2 / ||W_g||^2    [relative]

    x is what a weight's columns see: the input, for convolutions its patches, for embeddings the one-hot token; a
    column that sees only zeros has H_jj = 1 + damping. N is the number of samples. Convolutions over three dimensions
    and transposed ones use the covariance of input channels for every kernel position. SliM-LLM gives the groups of
    one layer different bits; summed to the layer here. A baseline: it scores how much a group matters inside its
    layer, in units of that layer's own output, so layers are compared badly. One forward pass as long as all Hessians
    (columns^2 a layer) fit into 1 GiB, else one for each GiB. Layers that share a weight each add their own.

    In `benchmarks/sensitivity.py` (ResNet-20, a small ViT, a small decoder): rank correlation with measured plans
    0.89, 0.62 among plans of equal size; its own plans do 3.47 times the least damage known (`KLDivergence` 0.96,
    0.81, 1.31; uniform precision 4.34).

    Attributes:
        group_size: consecutive columns that are scored together.
        damping: added to the diagonal of H, as in the code: absolute.

    One weight 2, inputs 1 and 2: H = 5 + 0.5, U^2 = 1 / 5.5, salience 4 x 5.5; an error half as large as the weight:

    >>> import torch, mpsearch as mps
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
    >>> _ = torch.nn.init.constant_(model[0].weight, 2.0)
    >>> data = [torch.tensor([[1.0], [2.0]])]
    >>> mps.profile(model, data, SalienceGroups(damping=0.5), mps.precisions("w4"), quantizer=lambda w, p: w + 1).sensitivity.round(6)
    array([[5.5]])
    """

    group_size: int = 128
    damping: float = 0.01

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise EstimatorError(f"group_size={self.group_size}: expected 1 or more")
        if not self.damping > 0:
            raise EstimatorError(f"damping={self.damping}: expected more than 0")

    def cost(self, batches: int, decisions: int, precisions: int) -> Passes:
        """Passes over the data, where all Hessians fit into memory together."""
        return Passes(forward=1)

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`.

        Raises:
            EstimatorError: where the inputs of a layer are not finite, or a precision quantizes them.
        """
        for precision in context.precisions:
            if precision.quantizes_activation:
                raise EstimatorError(f"SalienceGroups scores weights, not inputs: {precision} quantizes inputs")
        total = sum(samples(batch) for batch in context.batches)
        sensitivity = np.zeros((len(context.decisions), len(context.precisions)))
        for turn in _turns(context):
            moments = {layer.name: _Moment(context.module(layer), layer) for _, layer in turn}
            observers = {context.module(layer): moments[layer.name].add for _, layer in turn}
            for batch in context.progress(context.batches, len(context.batches), "salience"):
                with torch.no_grad(), observed(observers):
                    call(context.model, batch)
                context.passes.add(len(context.batches), forward=1)
            for u, layer in turn:
                pivots = moments.pop(layer.name).pivots(total, self.damping)
                sensitivity[u] += self._layer(context, layer, pivots)
        return Estimate(sensitivity, None, "relative")

    def _layer(self, context: Context, layer: Layer, pivots: Tensor) -> np.ndarray:
        module = context.module(layer)
        weight = _rows(module, weight_of(module).detach())
        power = self._groups(weight.square())
        salience = self._groups(weight.square() / pivots)
        cells = np.zeros(len(context.precisions))
        for p, precision in enumerate(context.precisions):
            if precision.quantizes_weight:
                rounded = _rows(module, context.quantized(layer, precision))
                noise = self._groups((rounded - weight).square())
                cells[p] = float(torch.where(noise > 0, salience * noise / power, torch.zeros_like(noise)).sum())
        return cells

    def _groups(self, rows: Tensor) -> Tensor:
        """Sums over groups of columns."""
        columns = rows.sum(0)
        padded = torch.nn.functional.pad(columns, (0, -len(columns) % self.group_size))
        return padded.reshape(-1, self.group_size).sum(1)


@dataclass
class _Moment:
    """Running second moment of what the columns of a weight see, one matrix a convolution group; counts of tokens for an embedding."""

    module: nn.Module
    layer: Layer
    total: Tensor | None = None

    def add(self, x: Tensor, _output: Tensor) -> None:
        if self.layer.kind == "embedding":
            self._add(torch.bincount(x.reshape(-1), minlength=self.layer.weight_shape[0]))
        else:
            for columns in self._columns(x.detach()):
                seen = wide(columns)
                self._add(seen @ seen.transpose(1, 2))

    def _add(self, moment: Tensor) -> None:
        if self.total is not None and self.total.shape != moment.shape:
            raise EstimatorError(
                f"layer {self.layer.name!r} sees inputs of {self.total.shape[-1]} and {moment.shape[-1]} columns, since it is read both "
                "ways round: SalienceGroups scores columns; exclude the layer, or take FisherProjection"
            )
        self.total = moment if self.total is None else self.total + moment

    def _columns(self, x: Tensor) -> Iterator[Tensor]:
        """(groups, columns, places) what the weight is multiplied with."""
        module = self.module
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            x = nn.functional.pad(
                x,
                module._reversed_padding_repeated_twice,
                "constant" if module.padding_mode == "zeros" else module.padding_mode,
            )
            two = x.ndim - 2 == 2
            size, dilation, stride = (
                tuple(v) if two else (1, *v) for v in (module.kernel_size, module.dilation, module.stride)
            )
            each = max(1, _CHUNK // (math.prod(size) * x[0].numel()))
            for part in x.split(each):
                unfolded = nn.functional.unfold(part if two else part[:, :, None], size, dilation, stride=stride)
                yield unfolded.reshape(len(part), module.groups, -1, unfolded.shape[-1]).permute(1, 2, 0, 3).flatten(2)
        elif self.layer.kind.startswith("conv"):
            channels = x.movedim(1, 0).flatten(1)
            yield channels.reshape(cast(int, module.groups), -1, channels.shape[1])
        else:
            yield x.reshape(-1, x.shape[-1]).T[None]

    def pivots(self, count: int, damping: float) -> Tensor:
        """U_jj^2, broadcastable to (outputs, columns) of the weight."""
        shape = self.layer.weight_shape
        if self.total is None:
            raise EstimatorError(f"no calibration batch reached layer {self.layer.name!r}")
        moment = 2 / count * wide(self.total)
        if not torch.isfinite(moment).all():
            raise EstimatorError(f"the inputs of layer {self.layer.name!r} are not finite")
        if self.layer.kind == "embedding":
            return (torch.where(moment == 0, 1.0, moment) + damping).reciprocal()[:, None]
        diagonal = moment.diagonal(dim1=1, dim2=2)
        diagonal += (diagonal == 0) + damping
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
        pivots: Tensor = torch.linalg.cholesky(inverse).diagonal(dim1=1, dim2=2).square()
        groups, columns = pivots.shape
        pivots = pivots.repeat_interleave(math.prod(shape[1:]) // columns, dim=1)  # one for each kernel position
        return pivots.repeat_interleave(shape[0] // groups, dim=0)


def _rows(module: nn.Module, value: Tensor) -> Tensor:
    """(outputs, columns) of a tensor laid out as the module's weight, in the widest float."""
    with replaced({weight_of(module): value}):
        return wide(canonical(module).detach().reshape(canonical(module).shape[0], -1))


def _turns(context: Context) -> Iterator[list[tuple[int, Layer]]]:
    """Layers with their decision, as many at once as `HESSIAN_BYTES` holds."""
    turn: list[tuple[int, Layer]] = []
    held = 0
    for u, decision in enumerate(context.decisions):
        for layer in decision.layers:
            columns = math.prod(layer.weight_shape[1:])
            groups = getattr(context.module(layer), "groups", 1)
            size = 8 * (layer.weight_shape[0] if layer.kind == "embedding" else groups * columns**2)
            if turn and held + size > HESSIAN_BYTES:
                yield turn
                turn, held = [], 0
            turn.append((u, layer))
            held += size
    yield turn
