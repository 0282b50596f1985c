"""What is measured of a model: one object a metric, and the numbers that each makes of the samples of a batch."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from mpsearch.errors import EstimatorError, MpsearchError
from mpsearch.metrics.seeds import seeded_generator
from mpsearch.metrics.statistics import cross_entropy, kl_divergence, log_softmax, wide
from mpsearch.models.data.batches import given_of, missing_labels
from mpsearch.models.running import (
    Batch,
    device_of,
    inputs_of,
    logits_of,
    moved,
    output_of,
    predictions,
    samples,
    targets_of,
)

Floats = NDArray[np.float64]
#: What a row of the output is: scores of classes that exclude each other, logits of 0/1 labels, or numbers.
Kind = Literal["classes", "labels", "numbers"]


@dataclass(frozen=True, eq=False)
class Run:
    """What a model, as it stands, makes of one batch.

    Attributes:
        output: all that it returns.
        shape: of the part that counts (`model.logits_of`).
        rows: (N, C) numbers of that part, one row for each prediction that counts (`model.predictions`).
        labels: (N,) int64, where there is one integer label a prediction.
        index: (N,) sample of each prediction.
        samples: of the batch.
    """

    output: Any
    shape: torch.Size
    rows: Tensor
    labels: Tensor | None
    index: Tensor
    samples: int

    @property
    def bytes(self) -> int:
        """Size of the rows, and of the whole output where that is kept."""
        parts = [self.rows, *(part for part in tree_iter(self.output) if isinstance(part, Tensor))]
        return sum(part.numel() * part.element_size() for part in parts)


def run(model: nn.Module, batch: Batch) -> Run:
    """Run a model on a batch.

    Raises:
        EstimatorError: where it fails, or returns no floating-point numbers.
    """
    output = output_of(model, batch)
    counted = logits_of(output)
    rows, labels, index = predictions(model, counted, batch)
    return Run(output, counted.shape, rows, labels, index, samples(batch))


def target_rows(model: nn.Module, batch: Batch, run: Run) -> Tensor | None:
    """(N, C) targets laid out as the rows of a run; None where they are not one number for each of the output.

    Targets may have dimensions of 1 more or less than the output: (B,) fits (B, 1).
    """
    if run.labels is not None:
        return run.labels[:, None] if run.rows.shape[1] == 1 else None
    targets = targets_of(batch)
    if not isinstance(targets, Tensor) or not fits(targets.shape, run.shape):
        return None
    laid_out = targets.to(run.rows.device, run.rows.dtype).reshape(run.shape)
    return predictions(model, laid_out, batch)[0]


def fits(targets: torch.Size, output: torch.Size) -> bool:
    """True where two shapes are equal but for dimensions of 1."""
    return [d for d in targets if d != 1] == [d for d in output if d != 1]


def by_sample(values: Tensor, index: Tensor, count: int) -> Tensor:
    """(count,) sums of (N,) values over the rows of each sample.

    >>> by_sample(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), 2)
    tensor([3., 4.])
    """
    return values.new_zeros(count).index_add(0, index, values)


@dataclass(frozen=True)
class Metric:
    """A number for each sample of a batch, larger = worse, as a sum over a weight: the mean of all is sum / sum.

    Attributes:
        name: in `METRICS`.
        unit: of the damage, `nats`, `mse`, ..., of `table.UNITS`.
        compares: the metric compares with the unquantized output, so that the unquantized model has 0; of the others the rise
            over the unquantized model is the damage.
        reads_output: the metric is given all that the model returns.
        runs_model: the metric runs the model itself.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    compares: ClassVar[bool] = False
    reads_output: ClassVar[bool] = False
    runs_model: ClassVar[bool] = False

    def of(self, model: nn.Module, batch: Batch, found: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """What the model, as it stands, does on one batch.

        Args:
            model: run again by a metric that does so itself.
            batch: the batch.
            found: what the model makes of it; None for a metric that runs the model.
            reference: the same of the unquantized model; None where this is it.

        Returns:
            (n,) sums and (n,) weights of the samples. What is one number for the batch counts as one sample, the first.

        Raises:
            EstimatorError: where targets are needed and missing.
        """
        raise NotImplementedError

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name

    @property
    def shown_unit(self) -> str:
        """Unit of what is shown."""
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


def _summed(values: Tensor, weights: Tensor, index: Tensor, count: int) -> tuple[Floats, Floats]:
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

    def of(self, model: nn.Module, batch: Batch, found: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """See `Metric.of`."""
        assert found is not None
        before = found if reference is None else reference
        values, weights = self.terms(self.rows(before.rows), self.rows(found.rows), found.index, found.samples)
        return _summed(values, weights, found.index, found.samples)

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

    def mean(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> Tensor:
        """The mean of a batch, a scalar."""
        values, weights = self.terms(reference, rows, index, count)
        return values.sum() / weights.sum()

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """H^(1/2) times values (N, C), H the Hessian of the summed damages at the unquantized output."""
        raise NotImplementedError

    def random_output(self, rows: Tensor, index: Tensor, count: int, seed: tuple[int, int], draw: int) -> Tensor:
        """(N, C) random u of covariance H, so that E[<u, change>^2] / 2 is the damage of a small change of the output.

        u = H^(1/2) z with random signs z, which the draws of one seed multiply by the rows of a Hadamard matrix: a power of two
        of draws, of no less than the numbers of a sample, gives the expectation exactly.

        Args:
            rows: (N, C) of the unquantized model, without gradient.
            index: (N,) sample of each, in order.
            count: of samples.
            seed: of the source, and number of the batch.
            draw: number of the draw.
        """
        signs = 2 * torch.randint(0, 2, rows.shape, generator=seeded_generator(*seed, 0)) - 1
        first = torch.searchsorted(index.cpu(), index.cpu())  # the first row of the same sample
        width = rows.shape[1]
        place = ((torch.arange(len(rows)) - first) * width)[:, None] + torch.arange(width)
        odd = torch.zeros_like(place)
        for bit in range(draw.bit_length()):
            if draw >> bit & 1:
                odd ^= place >> bit & 1
        return self.root(rows, (signs * (1 - 2 * odd)).to(wide(rows)), index, count)

    def drawn(self, rows: Tensor, index: Tensor, count: int, seed: tuple[int, int], draw: int) -> Tensor:
        """A scalar whose gradient has mean 0 and covariance H, summed over predictions: -log p of an output that is drawn."""
        return (self.random_output(rows.detach(), index, count, seed, draw) * wide(rows)).sum()


@dataclass(frozen=True)
class KL(Comparison):
    """KL divergence from the unquantized prediction over classes that exclude each other.

        sum_c p_c (log p_c - log q_c),   p = softmax(unquantized), q = softmax(output)   [nats]

    Blind to a common shift of all outputs, as the predictions are.

    Attributes:
        probabilities: the network ends in a softmax; its logarithm is taken.
    """

    probabilities: bool = False
    name: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats"
    kind: ClassVar[Kind] = "classes"

    def rows(self, rows: Tensor) -> Tensor:
        """(N, C) logits."""
        return logits("classes", rows) if self.probabilities else rows

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) divergences."""
        values = kl_divergence(reference, rows)
        return values, torch.ones_like(values)

    def random_output(self, rows: Tensor, index: Tensor, count: int, seed: tuple[int, int], draw: int) -> Tensor:
        """sqrt(p) z - p <sqrt(p), z> with random signs z, of covariance diag(p) - p p^T."""
        p = log_softmax(rows).exp()
        signs = (2 * torch.randint(0, 2, p.shape, generator=_generator(seed, draw)) - 1).to(p)
        noise = p.sqrt() * signs
        return noise - p * noise.sum(1, keepdim=True)

    def drawn(self, rows: Tensor, index: Tensor, count: int, seed: tuple[int, int], draw: int) -> Tensor:
        """-log p(y), labels y drawn from the model's own predictions."""
        log_p = log_softmax(rows)
        p = log_p.detach().exp()
        uniform = torch.rand(len(p), 1, generator=_generator(seed, draw), dtype=torch.float64).to(p)
        labels = (p.cumsum(1) < uniform * p.sum(1, keepdim=True)).sum(1, keepdim=True).clamp(max=p.shape[1] - 1)
        return -log_p.gather(1, labels).sum()


@dataclass(frozen=True)
class BernoulliKL(Comparison):
    """KL divergence of 0/1 labels that do not exclude each other: the sum over the labels of a prediction.

        sum_c p_c log(p_c / q_c) + (1 - p_c) log((1 - p_c) / (1 - q_c)),   p = sigmoid(unquantized)   [nats]

    Attributes:
        probabilities: the network ends in a sigmoid; the logits are taken.

    >>> values, _ = BernoulliKL().terms(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1).long(), 1)
    >>> values                                                  # ln 2 - ln(3) / 2, as of two classes
    tensor([0.1438], dtype=torch.float64)
    """

    probabilities: bool = False
    name: ClassVar[str] = "bernoulli-kl"
    unit: ClassVar[str] = "nats"
    kind: ClassVar[Kind] = "labels"

    def rows(self, rows: Tensor) -> Tensor:
        """(N, C) logits."""
        return logits("labels", rows) if self.probabilities else rows

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) divergences."""
        a, b = wide(reference), wide(rows)
        log = torch.nn.functional.logsigmoid
        values = (a.sigmoid() * (log(a) - log(b)) + (-a).sigmoid() * (log(-a) - log(-b))).sum(-1)
        return values, torch.ones_like(values)

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """sqrt(p (1 - p)) times values."""
        a = wide(reference)
        return (a.sigmoid() * (-a).sigmoid()).sqrt() * values

    def drawn(self, rows: Tensor, index: Tensor, count: int, seed: tuple[int, int], draw: int) -> Tensor:
        """-log p(y), labels y drawn from the model's own predictions."""
        a = wide(rows)
        uniform = torch.rand(a.shape, generator=_generator(seed, draw), dtype=torch.float64).to(a)
        labels = (uniform < a.detach().sigmoid()).to(a)
        return torch.nn.functional.binary_cross_entropy_with_logits(a, labels, reduction="sum")


@dataclass(frozen=True)
class MSE(Comparison):
    """Mean squared error over the numbers of the output: (y - y0)^2.

    >>> MSE().terms(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), torch.zeros(1).long(), 1)[0]    # (2^2 + 0) / 2
    tensor([2.], dtype=torch.float64)
    """

    name: ClassVar[str] = "mse"
    unit: ClassVar[str] = "mse"

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) mean squared errors."""
        values = (wide(rows) - wide(reference)).square().mean(-1)
        return values, torch.ones_like(values)

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """sqrt(2 / C) times values: the Hessian is 2 / C times the identity."""
        return math.sqrt(2 / values.shape[1]) * values


@dataclass(frozen=True)
class RelativeError(Comparison):
    """Noise over signal: sum ||y - y0||^2 / sum ||y0||^2 over all samples, a ratio of sums; 1 for an output of zeros.

    >>> values, weights = RelativeError().terms(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 3.0]]), torch.zeros(1).long(), 1)
    >>> float(values / weights)                                # 1 / 25
    0.04
    """

    name: ClassVar[str] = "relative-error"
    unit: ClassVar[str] = "relative error"

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) squared errors and (N,) squared lengths of the unquantized rows."""
        before = wide(reference)
        return (wide(rows) - before).square().sum(-1), before.square().sum(-1)

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """sqrt(2) times values."""
        return math.sqrt(2) * values


@dataclass(frozen=True)
class PSNR(Comparison):
    """Peak signal-to-noise ratio, shown in dB: -10 log10 of the damage.

        damage = sum ||y - y0||^2 / sum n peak^2,   peak = max y0 - min y0 of the sample's n numbers   [mse / peak^2]

    >>> values, weights = PSNR().terms(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.1, 1.0]]), torch.zeros(1).long(), 1)
    >>> round(PSNR().shown(float(values / weights)), 2)        # 0.1^2 over two numbers: 10 log10(200)
    23.01
    """

    name: ClassVar[str] = "psnr"
    unit: ClassVar[str] = "mse / peak^2"

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) squared errors and (N,) squared peaks times numbers."""
        before = wide(reference)
        high = before.new_full((count,), -math.inf).scatter_reduce(0, index, before.amax(-1), "amax")
        low = before.new_full((count,), math.inf).scatter_reduce(0, index, before.amin(-1), "amin")
        return (wide(rows) - before).square().sum(-1), (before.shape[1] * (high - low).square())[index]

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """sqrt(2) times values."""
        return math.sqrt(2) * values

    @property
    def shown_unit(self) -> str:
        """A logarithm."""
        return "dB"

    def shown(self, value: float) -> float:
        """In dB; infinite without any error."""
        return math.inf if value == 0 else -10 * math.log10(value)

    def shown_se(self, value: float, se: float) -> float:
        """In dB."""
        return math.nan if value == 0 else 10 / math.log(10) * se / value


@dataclass(frozen=True)
class Cosine(Comparison):
    """One minus the cosine between the output of a sample and the unquantized one, all its numbers taken as one vector.

    Blind to a change of length. Two zero vectors are at distance 0, one zero vector and another at 1.

    >>> values, _ = Cosine().terms(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]), torch.zeros(1).long(), 1)
    >>> round(float(values), 4)                                # 1 - 1 / sqrt(2)
    0.2929
    """

    name: ClassVar[str] = "cosine"
    unit: ClassVar[str] = "cosine distance"

    def terms(self, reference: Tensor, rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(N,) shares of the distance of each sample, and shares of 1."""
        before, after = wide(reference), wide(rows)
        (a, zero), (b, gone) = _directions(before, index, count), _directions(after, index, count)
        share = (1 / torch.bincount(index, minlength=count).clamp(min=1).to(before))[index]
        # 1 - cos = |a - b|^2 / 2: no cancellation for small angles
        return torch.where((zero ^ gone)[index], share, (a - b).square().sum(-1) / 2), share

    def root(self, reference: Tensor, values: Tensor, index: Tensor, count: int) -> Tensor:
        """What is at right angles to the sample's output, over its length."""
        before = wide(reference)
        a, _ = _directions(before, index, count)
        along = by_sample((a * values).sum(-1), index, count)
        return (values - a * along[index, None]) / _length(before, index, count)[index, None]


def _length(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """(count,) length of the vector of each sample; tiny, not 0, for a zero vector."""
    return by_sample(rows.square().sum(-1), index, count).clamp(min=torch.finfo(rows.dtype).tiny).sqrt()


def _directions(rows: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N, C) rows over the length of their sample's vector, and (count,) whether that is zero."""
    return rows / _length(rows, index, count)[index, None], by_sample((rows != 0).sum(-1), index, count) == 0


@dataclass(frozen=True)
class Loss(Metric):
    """The loss with the targets of the data, by what they are.

    The cross-entropy of integer labels; the sum over labels of the binary cross-entropy of 0/1 labels; the mean squared error of
    floating-point targets of the output's shape.

    Attributes:
        kind: of the rows.
        probabilities: the network ends in a softmax or sigmoid.
    """

    kind: Kind = "classes"
    probabilities: bool = False
    name: ClassVar[str] = "loss"

    @property
    def unit(self) -> str:  # type: ignore[override]
        """Nats, or `mse`."""
        return "mse" if self.kind == "numbers" else "nats"

    def rows(self, rows: Tensor) -> Tensor:
        """(N, C) logits, or the numbers."""
        return logits(self.kind, rows) if self.probabilities else rows

    @property
    def comparison(self) -> Comparison:
        """With the unquantized output: what the loss rises by where the targets are drawn from the model's own predictions."""
        if self.kind == "numbers":
            return MSE()
        return KL(self.probabilities) if self.kind == "classes" else BernoulliKL(self.probabilities)

    def targets(self, model: nn.Module, batch: Batch, found: Run) -> Tensor | None:
        """(N,) integer labels, or (N, C) numbers; None where the batch has none that fit."""
        return found.labels if self.kind == "classes" else target_rows(model, batch, found)

    def values(self, rows: Tensor, targets: Tensor) -> Tensor:
        """(N,) loss of each prediction from what `rows` and `targets` give; can be differentiated."""
        if self.kind == "classes":
            return cross_entropy(rows, targets)
        if self.kind == "labels":
            binary = torch.nn.functional.binary_cross_entropy_with_logits
            return binary(wide(rows), wide(targets), reduction="none").sum(-1)
        return (wide(rows) - wide(targets)).square().mean(-1)

    def of(self, model: nn.Module, batch: Batch, found: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """See `Metric.of`."""
        assert found is not None
        values = self.values(self.rows(found.rows), _needed(self.targets(model, batch, found), batch, "loss"))
        return _summed(values, torch.ones_like(values), found.index, found.samples)


@dataclass(frozen=True)
class Accuracy(Metric):
    """The share of predictions that are right; of 0/1 labels, the mean share of labels that are. Shown as it is, measured as its drop.

    Attributes:
        kind: of the rows.
        probabilities: the network ends in a sigmoid: a label is told at one half.
    """

    kind: Kind = "classes"
    probabilities: bool = False
    name: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "relative"

    def of(self, model: nn.Module, batch: Batch, found: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """See `Metric.of`."""
        assert found is not None
        if self.kind == "labels":
            targets = _needed(target_rows(model, batch, found), batch, "accuracy")
            right = ((found.rows > (0.5 if self.probabilities else 0.0)) == (targets > 0.5)).double().mean(-1)
        else:
            right = (found.rows.argmax(-1) == _needed(found.labels, batch, "accuracy")).double()
        return _summed(-right, torch.ones_like(right), found.index, found.samples)

    @property
    def shown_unit(self) -> str:
        """A share."""
        return "accuracy"

    def shown(self, value: float) -> float:
        """The share itself."""
        return 0.0 - value


def _needed(targets: Tensor | None, batch: Batch, metric: str) -> Tensor:
    if targets is None:
        raise EstimatorError(
            f"the {metric} needs labels that fit the output, the batch has {missing_labels(batch)}; give (inputs, targets), or the "
            "metric 'kl'"
        )
    return targets


@dataclass(frozen=True)
class Own(Metric):
    """A metric, or loss, of one's own.

    Attributes:
        function: `(model, batch)`, or `(output, reference, batch)` with all that the model and the unquantized model return; gives one
            number, the mean over the batch, or of the second form also (B,) numbers, one a sample.
        higher_is_better: its direction.
        title: `metric` or `loss`, which is its unit too.
    """

    function: Callable[..., Any]
    higher_is_better: bool = False
    title: str = "metric"
    name: ClassVar[str] = "own"

    def __post_init__(self) -> None:
        _arguments(self.function)

    @property
    def unit(self) -> str:  # type: ignore[override]
        """None that is known; that of the loss, for a loss."""
        return "loss" if self.title == "loss" else "relative"

    @property
    def shown_unit(self) -> str:
        """Its name."""
        return self.title

    @property
    def runs_model(self) -> bool:  # type: ignore[override]
        """True for `(model, batch)`."""
        return _arguments(self.function) == 2

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        """True for `(output, reference, batch)`."""
        return _arguments(self.function) == 3

    def of(self, model: nn.Module, batch: Batch, found: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """See `Metric.of`."""
        count, given = samples(batch), given_of(batch)
        arguments: tuple[Any, ...] = (model, given)
        if self.reads_output:
            assert found is not None
            arguments = (found.output, found.output if reference is None else reference.output, given)
        wanted = f"{'(output, reference, batch)' if self.reads_output else '(model, batch)'} -> one number"
        try:
            value = self.function(*arguments)
            numbers = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        except MpsearchError:
            raise
        except Exception as error:
            told = [*str(error).splitlines(), ""][0]
            raise EstimatorError(
                f"the {self.title} fails, expected {self.title}{wanted}: {type(error).__name__}: {told}"
            ) from error
        sign = -1.0 if self.higher_is_better else 1.0
        if self.reads_output and numbers.shape == (count,) and count > 1:
            return sign * numbers.numpy(), np.ones(count)
        if numbers.numel() != 1:
            raise EstimatorError(
                f"the {self.title} fails, expected {self.title}{wanted}{f' or ({count},)' if self.reads_output else ''}: it returned "
                f"shape {tuple(numbers.shape)}"
            )
        sums, weights = np.zeros(count), np.zeros(count)
        sums[0], weights[0] = sign * float(numbers) * count, count
        return sums, weights

    def shown(self, value: float) -> float:
        """As the function returns it."""
        return 0.0 - value if self.higher_is_better else value


def _arguments(function: Callable[..., Any]) -> int:
    """2 for a metric `(model, batch)`, 3 for `(output, reference, batch)`: positional parameters without a default.

    Raises:
        EstimatorError: for any other number of them, or where it cannot be told (`*args`, built-in functions).

    >>> _arguments(lambda model, batch: 0.0), _arguments(lambda output, reference, batch, scale=1.0: 0.0)
    (2, 3)
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    further = [p.name for p in parameters if p.default is p.empty and p.kind is p.KEYWORD_ONLY]
    if len(needed) not in (2, 3) or further:
        named = ", ".join([p.name for p in needed] + further) or "none that can be told"
        name = getattr(function, "__qualname__", type(function).__qualname__)
        raise EstimatorError(
            f"the metric {name} needs the parameters ({named}), expected 2, (model, batch), or 3, (output, reference, batch); those "
            "with a default do not count"
        )
    return len(needed)


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model of transformers computes itself from the batch's `labels`.

    Raises:
        EstimatorError: where it returns none.
    """
    inputs = {**inputs_of(batch), "labels": batch["labels"]}
    loss = getattr(model(**moved(inputs, device_of(model))), "loss", None)
    if not isinstance(loss, Tensor):
        raise EstimatorError(f"{type(model).__name__} returns no loss for batches with labels")
    return loss


def logits(kind: Kind, rows: Tensor) -> Tensor:
    """(N, C) logits of rows of probabilities: their logarithm, or that of p / (1 - p); extremes are moved by one rounding.

    >>> logits("labels", torch.tensor([[0.5, 0.75]])).exp().round(decimals=6)
    tensor([[1., 3.]], dtype=torch.float64)
    """
    p = wide(rows)
    tiny = torch.finfo(rows.dtype).tiny
    if kind == "classes":
        return p.clamp(min=tiny).log()
    return p.clamp(min=tiny).log() - (1 - p).clamp(min=torch.finfo(rows.dtype).eps / 2).log()


def _generator(seed: tuple[int, int], draw: int) -> torch.Generator:
    source, number = seed
    return seeded_generator(source, draw, number)


#: Name -> metric.
METRICS: Mapping[str, type[Metric]] = {
    "kl": KL,
    "bernoulli-kl": BernoulliKL,
    "mse": MSE,
    "relative-error": RelativeError,
    "psnr": PSNR,
    "cosine": Cosine,
    "loss": Loss,
    "accuracy": Accuracy,
}
