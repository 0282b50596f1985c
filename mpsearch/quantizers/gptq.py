"""GPTQ: columns are rounded one by one, and those that follow make up for the error."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.quantizers.formats import Grid
from mpsearch.quantizers.input_statistics import InputStatistics, LayerByLayer, WeightsBy
from mpsearch.quantizers.quantizer import Quantizer
from mpsearch.quantizers.rounding import RoundToNearest

#: Columns of a weight that are rounded before all that follow are updated.
_COLUMNS = 128


@dataclass(frozen=True)
class GPTQ(LayerByLayer):
    """Round column by column and let the columns that follow make up for the error (GPTQ, 2210.17323, section 3).

    With G = E[x x^T] + damping mean(diag G) I and U the upper Cholesky factor of G^-1, for each column j in turn:

        e = (w_j - Q(w_j)) / U_jj,   w_k <- w_k - e U_jk  for k > j

    Columns are taken by falling G_jj, so that the errors of the largest inputs are made up for, or as they stand (`activation_order`).
    Scales and zero-points are those of `quantizer` for the untouched weight, so format and bytes are the same. Formats without scaled codes
    (bf16, GGUF types) are left to `quantizer`, and so are inputs.

    Attributes:
        statistics: of `input_statistics(model, batches)`; by default taken from the calibration data of the run.
        damping: added to the diagonal, in parts of its mean.
        activation_order: take the columns of large inputs first.
        quantizer: gives the scales.

    Two inputs that mostly agree and a third; steps of 1. Of 1.4, 0.4 is rounded away, and the second weight takes up 0.9 of it:

    >>> gram = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]])[None].double()
    >>> quantizer = GPTQ({"fc": InputStatistics(gram, *torch.ones(4, 3))}, activation_order=False, quantizer=RoundToNearest(scale="max"))
    >>> quantizer.of_layer("fc")(torch.tensor([[1.4, 2.2, 3.0]]), Precision("3"))     # 2.2 + 0.9 x 0.4 is nearest to 3
    tensor([[1., 3., 3.]])
    """

    statistics: Mapping[str, InputStatistics | None] | None = field(default=None, repr=False)
    damping: float = 0.01
    activation_order: bool = True
    quantizer: RoundToNearest = field(default=RoundToNearest())

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise EstimatorError(f"damping={self.damping}: expected a number above 0")

    def for_inputs(self, statistics: InputStatistics) -> Quantizer:
        """Rounds the columns of a weight in the order of these inputs."""
        order, upper = _factor(statistics, self.damping, self.activation_order)

        def quantize(weight: Tensor, precision: Precision) -> Tensor:
            codes = self.quantizer.codes(weight, precision)
            if codes.grid is None:
                return codes.values()
            steps, zeros = codes.steps_and_zeros()
            shape = (len(upper), weight.shape[0] // len(upper), upper.shape[1])
            place = order[:, None].expand(shape)
            rows, steps, zeros = (x.reshape(shape).to(steps).gather(2, place) for x in (weight, steps, zeros))
            values = _compensated(rows, upper.to(rows), steps, zeros, codes.grid)
            return torch.empty_like(rows).scatter_(2, place, values).reshape(weight.shape).to(weight.dtype)

        return WeightsBy(quantize, self.quantizer)


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
    rest, values = rows.clone(), torch.empty_like(rows)
    width = rows.shape[2]
    for start in range(0, width, _COLUMNS):
        end = min(start + _COLUMNS, width)
        errors = torch.empty_like(rows[..., start:end])
        for j in range(start, end):
            column = slice(j, j + 1)
            values[..., column] = grid.round(rest[..., column], steps[..., column], zeros[..., column])
            error = (rest[..., column] - values[..., column]) / upper[:, j, j, None, None]
            rest[..., j:end] -= error * upper[:, column, j:end]
            errors[..., j - start : j - start + 1] = error
        rest[..., end:] -= errors @ upper[:, start:end, end:]
    return values
