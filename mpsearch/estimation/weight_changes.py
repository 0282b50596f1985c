"""What quantization changes a weight by, a few rows at a time, and squared lengths without a wide copy of a large tensor."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mpsearch.core.layer import Layer
from mpsearch.core.precision import Precision
from mpsearch.estimation.context import Context
from mpsearch.metrics.statistics import wide
from mpsearch.models.modules.weights import weight_of
from mpsearch.models.streaming.offloading import resident

#: Numbers of a change at once, 64 MiB in float32.
CHANGED = 2**24
#: Numbers that are made wide at once.
PIECE = 2**22


def change_rows(value: Tensor, weight: Tensor, rows: slice = slice(None)) -> Iterator[tuple[slice, Tensor]]:
    """Q(W) - W in float32 or wider, a few rows at a time, one at least.

    Args:
        value: Q(W), laid out as the weight.
        weight: W.
        rows: of the weight that are wanted.

    Yields:
        which rows of the weight, and their change.

    >>> [change for _, change in change_rows(torch.tensor([2.0]), torch.tensor([1.5]))]
    [tensor([0.5000])]
    """
    start, stop, _ = rows.indices(len(weight))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    step = max(1, CHANGED // max(1, weight[:1].numel()))
    for top in range(start, stop, step):
        part = slice(top, min(top + step, stop))
        yield part, value[part].to(dtype, copy=True).sub_(weight[part])


def squared_length(x: Tensor) -> float:
    """Sum of squares in the widest float of the device.

    >>> squared_length(torch.tensor([3.0, 4.0]))
    25.0
    """
    return sum(float(wide(part).square().sum()) for part in x.detach().reshape(-1).split(PIECE))


def squared_change(context: Context, layer: Layer, precision: Precision) -> float:
    """||Q(W) - W||^2 of a layer.

    Args:
        context: of the run.
        layer: whose weight it is.
        precision: of the layer.
    """
    module = context.module(layer)
    with resident(module):
        weight = weight_of(module).detach()
        return sum(squared_length(part) for _, part in change_rows(context.quantized(layer, precision), weight))
