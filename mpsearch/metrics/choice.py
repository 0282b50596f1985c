"""Which metric fits a model: what its outputs and the targets of the data are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import EstimatorError, nearest, warn
from mpsearch.metrics.divergences import KL, BernoulliKL, Divergence
from mpsearch.metrics.metric import Comparison, Kind, Metric
from mpsearch.metrics.own import Own
from mpsearch.metrics.pieces import by_pieces
from mpsearch.metrics.registry import METRICS
from mpsearch.metrics.runs import fits
from mpsearch.metrics.squared_errors import MSE, PSNR, RelativeError
from mpsearch.metrics.targets import Accuracy, Loss, model_loss
from mpsearch.models.data.batches import missing_labels
from mpsearch.models.running import Batch, first_tensor, inputs_of, logits_of, predictions, shifts_labels, targets_of

#: Parts of an output that models return beside what they are made for.
_BESIDE = (
    "last_hidden_state",
    "token_embeddings",
    "loss",
    "past_key_values",
    "hidden_states",
    "attentions",
    "cross_attentions",
    "mems",
    "router_logits",
    "aux_loss",
)
#: Names of the parts of an output that are features, not scores.
_FEATURES = (
    "last_hidden_state",
    "pooler_output",
    "sentence_embedding",
    "token_embeddings",
    "image_embeds",
    "text_embeds",
)
#: So many numbers, all from 0 to 1, are taken for probabilities without a sigmoid among the modules.
_ENOUGH = 24
#: What this many different rows, of so many, have in common is no chance.
_DIFFERENT, _LOOKED_AT = 3, 64
#: So many numbers, as many as go in, are a reconstruction sooner than scores of classes.
_WIDE = 16
#: How to say it oneself.
_ASK = "give metric='kl', 'bernoulli-kl', 'relative-error', 'mse', ... to choose"


@dataclass(frozen=True)
class Reading:
    """What the outputs of a model are.

    Attributes:
        kind: classes, 0/1 labels, or numbers.
        scored: the targets fit them, so that there is a loss.
        reason: why they are taken for that.
        assumed: nothing tells it for sure.
        softmax: the rows are probabilities of classes.
        sigmoid: the numbers are probabilities of labels.
        unmeasured: parts of the output that do not count.
    """

    kind: Kind
    scored: bool
    reason: str
    assumed: bool = False
    softmax: bool = False
    sigmoid: bool = False
    unmeasured: tuple[str, ...] = ()


@dataclass(frozen=True)
class MetricChoice:
    """What is measured.

    Attributes:
        metric: of plans.
        comparison: with the unquantized output, for tables: the metric itself, or where that is none the default one.
        reading: of the outputs.
        sentence: the choice and its reason.
        asked: it is not the default.
    """

    metric: Metric
    comparison: Comparison
    reading: Reading
    sentence: str
    asked: bool

    @property
    def loss(self) -> Metric | None:
        """The loss with the data's targets, where they fit."""
        return _loss(self.reading) if self.reading.scored else None

    @property
    def accuracy(self) -> Metric | None:
        """The accuracy, where the data has labels."""
        return _accuracy(self.reading) if self.reading.scored and self.reading.kind != "numbers" else None

    def warn(self) -> None:
        """Warn of what was assumed, and of what is not measured."""
        if self.reading.unmeasured or (self.reading.assumed and not (self.asked and self.metric is self.comparison)):
            warn(self.sentence)


def choose(
    model: nn.Module,
    batches: Sequence[Batch],
    output: Any,
    example: Batch,
    metric: str | Metric | Callable[..., Any] | None = None,
    *,
    loss: Callable[..., Any] | None = None,
    higher_is_better: bool = False,
) -> MetricChoice:
    """The metric of a run.

    Args:
        model: tells what transformers say of it.
        batches: all data; their targets are looked at.
        output: all that the unquantized model returns for `example`.
        example: a batch, or its first samples.
        metric: a name, an object, a function, or None for what fits outputs and targets.
        loss: of one's own, for `metric="loss"`.
        higher_is_better: direction of a function.

    Raises:
        EstimatorError: for an unknown name, or a metric that has nothing to work on.
    """
    reading = read(model, batches, output, example)
    default: dict[Kind, Comparison] = {
        "classes": KL(reading.softmax),
        "labels": BernoulliKL(reading.sigmoid),
        "numbers": RelativeError(),
    }
    fitting = default[reading.kind]
    silent = not logits_of(output).any()
    if reading.kind == "numbers" and silent:
        fitting, reading = MSE(), replace(reading, reason=f"{reading.reason}, and the unquantized output is all 0")
    measured: Metric
    if metric is None:
        measured = fitting
    elif isinstance(metric, Metric):
        measured = metric
    elif callable(metric):
        measured = Own(metric, higher_is_better)
    elif metric == "loss":
        measured = _the_loss(model, batches, reading, loss)
    elif metric == "accuracy":
        _check_targets("accuracy", batches, reading)
        measured = _accuracy(reading)
    elif metric == "kl":
        _check_classes(output)
        measured = KL(reading.softmax)
    else:
        measured = BernoulliKL(reading.sigmoid) if metric == "bernoulli-kl" else named(metric)()
    if silent and measured.unit in (RelativeError.unit, PSNR.unit):
        raise EstimatorError(f"the unquantized output is all 0, so there is no {measured.name}; give metric='mse'")
    if isinstance(measured, PSNR) and _flat(logits_of(output)):
        raise EstimatorError(
            f"the unquantized output (shape {tuple(logits_of(output).shape)}) is the same number all over each sample, so there is no peak "
            "for psnr; give metric='relative-error' or 'mse'"
        )
    comparison = measured if isinstance(measured, Comparison) else fitting
    return MetricChoice(
        measured, comparison, reading, _sentence(metric, measured, comparison, reading), metric is not None
    )


def named(name: str) -> type[Metric]:
    """The metric of a name.

    Raises:
        EstimatorError: for an unknown one.
    """
    if not isinstance(name, str) or name not in METRICS:
        raise EstimatorError(
            f"unknown metric {name!r}{nearest(str(name), METRICS)}; expected {', '.join(METRICS)}, or a function (model, batch) or "
            "(output, reference, batch)"
        )
    return METRICS[name]


def check_metric(metric: Any) -> None:
    """Refuse, before any work, what can be no metric.

    Raises:
        EstimatorError: for an unknown name, or a function of other parameters.
    """
    if metric is None or isinstance(metric, Metric):
        return
    if callable(metric):
        Own(metric)
    else:
        named(metric)


def _sentence(request: Any, measured: Metric, comparison: Comparison, reading: Reading) -> str:
    title = measured.title if isinstance(measured, Own) else measured.name
    parts = []
    if request is None and not reading.assumed:
        parts.append(f"measured: {title} [{measured.unit}], since {reading.reason}")
    elif request is None:
        parts.append(f"measured: {title} [{measured.unit}], assumed since {reading.reason}; {_ASK}")
    else:
        parts.append(f"measured: {title} [{measured.unit}], as asked")
    if measured is not comparison:
        why = f"{'assumed ' if reading.assumed else ''}since {reading.reason}"
        parts.append(f"tables by {comparison.name} [{comparison.unit}], {why}")
    if isinstance(comparison, Divergence) and comparison.probabilities:
        parts.append(f"the output is probabilities already, so their {comparison.taken} are taken")
    if reading.unmeasured:
        parts.append(f"other parts of the output are not measured: {', '.join(reading.unmeasured)}")
    return "; ".join(parts)


def _loss(reading: Reading) -> Loss:
    return Loss(
        reading.kind, reading.softmax if reading.kind == "classes" else reading.kind == "labels" and reading.sigmoid
    )


def _accuracy(reading: Reading) -> Accuracy:
    return Accuracy(reading.kind, reading.kind == "labels" and reading.sigmoid)


def _the_loss(model: nn.Module, batches: Sequence[Batch], reading: Reading, loss: Callable[..., Any] | None) -> Metric:
    if loss is not None:
        return Own(loss, title="loss")
    whole = all(isinstance(batch, Mapping) and batch.get("labels") is not None for batch in batches)
    if not reading.scored and whole and hasattr(model, "config"):
        return Own(model_loss, title="loss")
    _check_targets("loss", batches, reading)
    return _loss(reading)


def _check_targets(metric: str, batches: Sequence[Batch], reading: Reading) -> None:
    for number, batch in enumerate(batches):
        if targets_of(batch) is None:
            raise EstimatorError(
                f"the {metric} needs labels, batch {number} has {missing_labels(batch)}; give (inputs, targets), or the "
                "metric 'kl'"
            )
    if not reading.scored:
        raise EstimatorError(
            f"the targets do not fit the output ({reading.reason}), so there is no {metric}; give a function (model, batch)"
        )
    if metric == "accuracy" and reading.kind == "numbers":
        raise EstimatorError(f"there is no accuracy: {reading.reason}; give metric='relative-error' or 'loss'")


def _flat(output: Tensor) -> bool:
    """True where no sample has two different numbers."""
    numbers = output.detach().reshape(len(output), -1) if output.ndim else output.detach().reshape(1, 1)
    return bool((numbers == numbers[:, :1]).all())


def _check_classes(output: Any) -> None:
    shape = tuple(logits_of(output).shape)
    if len(shape) < 2 or shape[1 if len(shape) > 3 else -1] == 1:
        raise EstimatorError(
            f"the model has one output (shape {shape}), so its KL is always 0; give metric='bernoulli-kl', 'relative-error', or "
            "metric(model, batch)"
        )


def read(model: nn.Module, batches: Sequence[Batch], output: Any, example: Batch) -> Reading:
    """What the outputs are, from the targets of all batches, the output of one, and what transformers say of the model."""
    counted = logits_of(output).detach()
    if counted.ndim == 0:
        return Reading("numbers", False, "the output is one number")
    rows, labels, _ = predictions(model, counted, example)
    width = rows.shape[1]
    low, high = (float(rows.amin()), float(rows.amax())) if rows.numel() else (0.0, -1.0)
    within = low >= 0 and high <= 1 and low < high
    softmax = (
        within
        and width > 1
        and _many(rows)
        and bool(((by_pieces(lambda part: part.double().sum(1), rows) - 1).abs() < 1e-3).all())
    )
    sure = rows.numel() >= _ENOUGH or any(isinstance(module, nn.Sigmoid) for module in model.modules())
    sigmoid = within and not softmax and sure
    kind, scored, reason, assumed = _kind(model, batches, output, counted, rows, labels, softmax, sigmoid)
    return Reading(kind, scored, reason, assumed, softmax, sigmoid, _unmeasured(output, counted))


_Found = tuple[Kind, bool, str, bool]


def _kind(
    model: nn.Module,
    batches: Sequence[Batch],
    output: Any,
    counted: Tensor,
    rows: Tensor,
    labels: Tensor | None,
    softmax: bool,
    sigmoid: bool,
) -> _Found:
    """Kind of the rows, whether the targets fit them, why, and whether that is assumed."""
    shape, width = tuple(counted.shape), rows.shape[1]
    every = [targets_of(batch) for batch in batches]
    targets = [labels_of_batch for labels_of_batch in every if isinstance(labels_of_batch, Tensor)]
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if not targets or len(targets) < len(every):
        return _without_targets(model, batches[0], output, counted, rows, softmax, sigmoid, problem)
    first = targets[0]
    fact = f"the targets are {'floats' if first.is_floating_point() else 'integers'} of shape {tuple(first.shape)}"
    aligned = fits(first.shape[1:], counted.shape[1:])
    if labels is not None and width > 1:
        if sigmoid:
            return "labels", True, "the targets are class labels and the output is a probability for each class", False
        return "classes", True, "the targets are one integer label a prediction", False
    if (labels is not None or aligned) and _binary(targets):
        if width > 1 and aligned and _sum_to_one(model, targets, counted):
            return "classes", False, f"{fact}, one class of {width} each", False
        return "labels", True, f"the targets are 0 or 1 for each output of {shape[1:] or 'a sample'}", False
    if labels is not None or aligned:
        if width > 1 and first.is_floating_point() and _sum_to_one(model, targets, counted):
            return "classes", False, f"{fact}, shares of {width} classes", False
        return "numbers", True, f"{fact}, numbers for each output", False
    if first.is_floating_point():
        return "numbers", False, f"{fact}, the output has shape {shape}", True
    if width > 1 and fits(first.shape[1:], torch.Size()):
        return "classes", False, "the targets are one integer label a sample", False
    return _without_targets(model, batches[0], output, counted, rows, softmax, sigmoid, problem)


def _without_targets(
    model: nn.Module,
    batch: Batch,
    output: Any,
    counted: Tensor,
    rows: Tensor,
    softmax: bool,
    sigmoid: bool,
    problem: str | None,
) -> _Found:
    """The same as `_kind` where there are no targets that tell: from the output, the model and its configuration."""
    shape, width = tuple(counted.shape), rows.shape[1]
    x = first_tensor(inputs_of(batch))
    part = _part(output, counted)
    kinds: dict[str, Kind] = {
        "regression": "numbers",
        "single_label_classification": "classes",
        "multi_label_classification": "labels",
    }
    if problem in kinds:
        return kinds[problem], False, f"the model's configuration says {problem}", False
    if width == 1:
        return (
            ("labels" if sigmoid else "numbers"),
            False,
            f"the output is one number a prediction, shape {shape}",
            True,
        )
    if softmax:
        return "classes", False, "the outputs of a prediction are probabilities that add up to 1", False
    if _many(rows) and bool((by_pieces(lambda part: part.double().logsumexp(1), rows).abs() < 1e-3).all()):
        return "classes", False, "the outputs of a prediction are logarithms of probabilities that add up to 1", False
    if part == "logits" or shifts_labels(model):
        return "classes", False, "the model returns logits", False
    if part in _FEATURES:
        return "numbers", False, f"the output is {part}, an embedding", False
    if (
        len(shape) == 2
        and _many(rows)
        and bool(((by_pieces(lambda part: part.double().norm(dim=1), rows) - 1).abs() < 1e-3).all())
    ):
        return "numbers", False, "the outputs of a sample are a vector of length 1, an embedding", False
    if x.is_floating_point() and x.shape[1:] == counted.shape[1:] and width >= _WIDE:
        return "numbers", False, "the output has the shape of the input", True
    if len(shape) > 3 or (len(shape) == 3 and x.is_floating_point()):
        return "numbers", False, f"there are no labels and the output is a signal or image, shape {shape}", True
    if not x.is_floating_point():
        sizes = [(m.num_embeddings, m.embedding_dim) for m in model.modules() if isinstance(m, nn.Embedding)]
        if len(shape) == 3 and any(vocabulary == width for vocabulary, _ in sizes):
            return "classes", False, f"there is one output for each of {width} tokens", False
        if any(size == width for _, size in sizes):
            return "numbers", False, f"there are no labels and the output has the width of the embedding, {width}", True
    if sigmoid and len(shape) == 2:
        return "labels", False, "there are no labels and all outputs lie between 0 and 1", True
    return "classes", False, f"there are no labels and the output has shape {shape}: scores of classes?", True


def _many(rows: Tensor) -> bool:
    """True for enough different rows that what all of them add up to is no chance."""
    return len(torch.unique(rows[:_LOOKED_AT], dim=0)) >= _DIFFERENT


def _binary(targets: Sequence[Tensor]) -> bool:
    """True where all targets that count are 0 or 1."""
    return all(bool(((labels == 0) | (labels == 1) | (labels == -100)).all()) for labels in targets)


def _sum_to_one(model: nn.Module, targets: Sequence[Tensor], counted: Tensor) -> bool:
    """True where the targets of each prediction are shares of its classes."""
    dim = 1 if counted.ndim > 3 else -1
    return all(
        shares.ndim > 1 and bool((shares >= 0).all()) and bool(((shares.double().sum(dim) - 1).abs() < 1e-3).all())
        for shares in targets
    )


def _parts(output: Any) -> list[tuple[str, Any]]:
    """Names and values of the parts of an output."""
    if isinstance(output, Mapping):
        return [(str(name), part) for name, part in output.items()]
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", None) or [f"part {number}" for number in range(len(output))]
        return list(zip(names, output, strict=True))
    held = {} if isinstance(output, Tensor) else getattr(output, "__dict__", {})
    return [(name, part) for name, part in held.items() if name[:1] != "_"]


def _part(output: Any, counted: Tensor) -> str:
    """Name of the part that counts; empty for an output without parts."""
    return next((name for name, part in _parts(output) if _same(part, counted)), "")


def _unmeasured(output: Any, counted: Tensor) -> tuple[str, ...]:
    """Parts that hold further numbers of the model's answer."""
    return tuple(
        name
        for name, part in _parts(output)
        if name not in _BESIDE
        and not name.startswith("encoder_")
        and isinstance(part, Tensor)
        and part.is_floating_point()
        and part.ndim
        and not _same(part, counted)
    )


def _same(part: Any, counted: Tensor) -> bool:
    return isinstance(part, Tensor) and part.data_ptr() == counted.data_ptr() and part.shape == counted.shape
