"""A metric that a user wrote."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from mpsearch.errors import EstimatorError, MpsearchError
from mpsearch.metrics.metric import Floats, Metric
from mpsearch.metrics.runs import Run
from mpsearch.models.data.batches import original_of
from mpsearch.models.running import Batch, samples


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
        """`metric` or `loss`: nothing is known of its unit."""
        return self.title

    @property
    def runs_model(self) -> bool:  # type: ignore[override]
        """True for a function `(model, batch)`, which runs the model itself."""
        return _arguments(self.function) == 2

    @property
    def reads_output(self) -> bool:  # type: ignore[override]
        """True for `(output, reference, batch)`."""
        return _arguments(self.function) == 3

    def of(self, model: nn.Module, batch: Batch, run: Run | None, reference: Run | None) -> tuple[Floats, Floats]:
        """See `Metric.of`."""
        count, content = samples(batch), original_of(batch)
        arguments: tuple[Any, ...] = (model, content)
        if self.reads_output:
            assert run is not None
            arguments = (run.output, run.output if reference is None else reference.output, content)
        wanted = f"{'(output, reference, batch)' if self.reads_output else '(model, batch)'} -> one number"
        try:
            value = self.function(*arguments)
            numbers = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
        except MpsearchError:
            raise
        except Exception as error:
            line = [*str(error).splitlines(), ""][0]
            raise EstimatorError(
                f"the {self.title} fails, expected {self.title}{wanted}: {type(error).__name__}: {line}"
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
