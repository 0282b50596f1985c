"""What a metric is: the numbers that it makes of the samples of a batch, and for a comparison its curvature."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpsearch.metrics.pieces import all_finite, by_pieces, piece_sizes
from mpsearch.metrics.runs import Run
from mpsearch.metrics.seeds import Draw
from mpsearch.metrics.statistics import wide
from mpsearch.models.running import Batch

Floats = NDArray[np.float64]
#: What a row of the output is: scores of classes that exclude each other, logits of 0/1 labels, or numbers.
Kind = Literal["classes", "labels", "numbers"]


@dataclass(frozen=True)
class Metric:
    """A number for each sample of a batch, larger = worse, as a sum over a weight: the mean of all is sum / sum.

    Attributes:
        name: in `mpsearch.metrics.registry.METRICS`.
        unit: of the damage, `nats`, `mse`, ..., of `mpsearch.core.table.UNITS`.
        compares: the metric compares with the unquantized output, so that the unquantized model has 0; of the others the rise
            over the unquantized model is the damage.
        reads_output: the metric is given all that the model returns.
        runs_model: the metric runs the model itself.
        by_rows: what a prediction adds comes from its own row alone, so that rows can be taken a few at a time.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    by_rows: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    reads_output: ClassVar[bool] = False
    runs_model: ClassVar[bool] = False

    def of(self, model: nn.Module, batch: Batch, run: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """What the model, as it stands, does on one batch; see `measured` for runs that make their rows in pieces.

        Args:
            model: run again by a metric that does so itself.
            batch: the batch.
            run: what the model makes of it, or of a metric `by_rows` a piece of that; None for a metric that runs the model.
            reference: the same of the unquantized model; None where this is it.

        Returns:
            (n,) sums and (n,) weights of the samples. What is one number for the batch counts as one sample, the first.

        Raises:
            EstimatorError: where targets are needed and missing.
        """
        raise NotImplementedError

    def read(
        self, model: nn.Module, batch: Batch, run: Run | None, reference: Run | None
    ) -> tuple[Floats, Floats] | None:
        """`of` a whole run, its rows made in pieces where they come from a head; None where the output is not finite."""
        found = measured([self], model, batch, run, reference)
        return None if found is None else found[0]

    @property
    def title(self) -> str:
        """What it is called in sentences; by default its name."""
        return self.name

    @property
    def shown_unit(self) -> str:
        """Decision of what is shown."""
        return self.unit

    @property
    def counted_in(self) -> str:
        """What a difference of damages is told in."""
        return self.shown_unit if self.unit == "relative" else self.unit

    def damage(self, sums: Floats, unquantized: Floats) -> Floats:
        """(n,) the rise over the unquantized model, from the sums of both."""
        return sums if self.compares else sums - unquantized

    def shown(self, value: float) -> float:
        """A mean as people write it."""
        return value

    def shown_se(self, value: float, se: float) -> float:
        """The standard error of `shown`, to first order."""
        return se


def measured(
    metrics: Sequence[Metric], model: nn.Module, batch: Batch, run: Run | None, reference: Run | None
) -> list[tuple[Floats, Floats]] | None:
    """What metrics make of a run, its rows made once for all of them, in pieces where they come from a head.

    Args:
        metrics: those that are not `by_rows` are given all rows at once.
        model: as it stands.
        batch: the batch.
        run: of the model; None where all metrics run it themselves.
        reference: of the unquantized model; None where this is it.

    Returns:
        (n,) sums and (n,) weights of the samples, for each metric; None where an output is not finite.
    """
    if run is None or run.head is None:
        finite = run is None or all_finite(run.rows)
        return [metric.of(model, batch, run, reference) for metric in metrics] if finite else None
    found: list[tuple[Floats, Floats] | None] = [None] * len(metrics)
    others: Iterable[Run | None] = itertools.repeat(None) if reference is None else reference.pieces()
    for piece, before in zip(run.pieces(), others, strict=False):
        if not all_finite(piece.rows):
            return None
        for place, metric in enumerate(metrics):
            if metric.by_rows:
                sums, weights = metric.of(model, batch, piece, before)
                known = found[place]
                found[place] = (sums, weights) if known is None else (known[0] + sums, known[1] + weights)
    if None in found:
        run, reference = run.made(), None if reference is None else reference.made()
    return [
        metric.of(model, batch, run, reference) if sums is None else sums
        for metric, sums in zip(metrics, found, strict=True)
    ]


def by_sample(values: Tensor, index: Tensor, count: int) -> Tensor:
    """(count,) sums of (N,) values over the rows of each sample.

    >>> by_sample(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 2)
    tensor([3., 4.])
    """
    return values.new_zeros(count).index_add(0, index, values)


def summed(values: Tensor, weights: Tensor, index: Tensor, count: int) -> tuple[Floats, Floats]:
    """(count,) sums of the values and of the weights of predictions (N,) over the rows of each sample, float64 on the CPU."""
    rows = index.cpu().numpy()
    sums, counts = (
        np.bincount(rows, part.detach().to("cpu", torch.float64).numpy(), count) for part in (values, weights)
    )
    return sums.astype(np.float64), counts.astype(np.float64)


class Comparison(Metric):
    """A metric that compares the output with the unquantized one, and so has a curvature there, for signals from gradients.

    Attributes:
        kind: of the rows that it is made for.
    """

    compares: ClassVar[bool] = True
    kind: ClassVar[Kind] = "numbers"

    def of(self, model: nn.Module, batch: Batch, run: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """See `Metric.of`."""
        assert run is not None
        before = run if reference is None else reference
        values, weights = self.terms(self.rows(before.rows), self.rows(run.rows), run.index, run.samples)
        return summed(values, weights, run.index, run.samples)

    def rows(self, rows: Tensor) -> Tensor:
        """(N, C) the rows as this metric reads them: logits where the output is probabilities."""
        return rows

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """What each prediction adds; both can be differentiated.

        Args:
            reference: (N, C) of the unquantized model.
            rows: (N, C) to compare.
            index: (N,) sample of each.
            count: of samples.

        Returns:
            (N,) damages and (N,) weights, in the widest float of the device; the weights come from the reference alone.
        """
        raise NotImplementedError

    def weights(self, reference: Tensor, index: Tensor, count: int) -> Tensor:
        """(N,) weights of `terms` alone."""
        return self.terms(reference, reference, index, count)[1]

    def mean(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> Tensor:
        """The mean of a batch, a scalar."""
        values, weights = self.terms(reference, rows, index, count)
        return values.sum() / weights.sum()

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """H^(1/2) times values (N, C), H the Hessian of the summed damages at the unquantized output."""
        raise NotImplementedError

    def random_output(self, rows: Tensor, index: Tensor, count: int, draw: Draw) -> Tensor:
        """(N, C) random u of covariance H, so that E[<u, change>^2] / 2 is the damage of a small change of the output.

        u = H^(1/2) z with random signs z, which the draws of one seed multiply by the rows of a Hadamard matrix: a power of two
        of draws, of no less than the numbers of a sample, gives the expectation exactly.

        Args:
            rows: (N, C) of the unquantized model, without gradient; of a metric `by_rows` they may be the next of many.
            index: (N,) sample of each, in order.
            count: of samples.
            draw: the random numbers; those of these rows are used up.

        Returns:
            in the type of the rows.
        """
        u = torch.empty_like(rows)
        sizes = piece_sizes(*rows.shape) if self.by_rows else [len(rows)]
        for part, before, samples in zip(u.split(sizes), rows.split(sizes), index.split(sizes), strict=True):
            part.copy_(self._random_rows(before, samples, count, draw))
        return u

    def _random_rows(self, rows: Tensor, index: Tensor, count: int, draw: Draw) -> Tensor:
        """A piece of `random_output`, in the widest float of the device."""
        size, width = rows.shape
        signs = draw.signs(draw.common, size, width)
        place = (draw.places(index) * width)[:, None] + torch.arange(width)
        odd = torch.zeros_like(signs)
        for bit in range(draw.number.bit_length()):
            if draw.number >> bit & 1:
                odd ^= (place >> bit & 1).to(torch.int8)
        return self.root(rows, wide((signs * (1 - 2 * odd)).to(rows.device)), index, count)

    def drawn(self, rows: Tensor, index: Tensor, count: int, draw: Draw) -> Tensor:
        """A scalar whose gradient has mean 0 and covariance H, summed over predictions: -log p of an output that is drawn."""
        return inner_product(self.random_output(rows.detach(), index, count, draw), rows)


def inner_product(u: Tensor, rows: Tensor) -> Tensor:
    """<u, rows>, whose gradient is u, without a copy of either in a wider type.

    >>> rows = torch.ones(1, 2, requires_grad=True)
    >>> product = inner_product(torch.tensor([[2.0, 3.0]]), rows)
    >>> float(product), *torch.autograd.grad(product, rows)
    (5.0, tensor([[2., 3.]]))
    """
    product: Tensor = _InnerProduct.apply(u, rows)  # type: ignore[no-untyped-call]
    return product


class _InnerProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, rows: Tensor) -> Tensor:
        """The sum in the widest float of the device."""
        ctx.save_for_backward(u)
        return by_pieces(lambda a, b: (wide(a) * wide(b)).sum(-1), u, rows.detach()).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        """The first factor."""
        (u,) = ctx.saved_tensors
        return None, (u * gradients[0]).to(u)
