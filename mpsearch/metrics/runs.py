"""What a model returns for one batch, laid out as one row a prediction."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from mpsearch.metrics.pieces import piece_sizes
from mpsearch.models.head import Head, OutputLayer, too_large
from mpsearch.models.running import Batch, logits_of, output_of, predictions, samples, targets_of

#: Numbers of a piece of rows that a head makes at once, about; a few dozen rows of a large vocabulary.
_NUMBERS = 2**23


@dataclass(frozen=True, eq=False)
class Rows:
    """What a model says, one row for each prediction that counts (`mpsearch.models.running.predictions`).

    Attributes:
        held: (N, C) numbers; or, with a head, the (N, H) hidden states that it makes them from.
        labels: (N,) int64, where there is one integer label a prediction.
        index: (N,) sample of each prediction.
        samples: of the batch.
        head: makes the rows, with the weights of the run that gave the hidden states; None where the rows themselves are held.
    """

    held: Tensor
    labels: Tensor | None
    index: Tensor
    samples: int
    head: Head | None = None

    @property
    def rows(self) -> Tensor:
        """(N, C) rows; with a head all of them are made, at each look."""
        return self.held if self.head is None else self.head(self.held)

    @property
    def width(self) -> int:
        """C, numbers of a row."""
        return self.held.shape[1] if self.head is None else self.head.width

    def pieces(self) -> Iterator[Self]:
        """The same for a few predictions each, with their rows held, in order; without a head the whole itself.

        Their size comes from N and C alone, so that two runs of one batch have the same.
        """
        for part in self.parts():
            yield part.made()

    def parts(self) -> Iterator[Self]:
        """Pieces, before their rows are made."""
        if self.head is None:
            yield self
            return
        end = 0
        for size in piece_sizes(len(self.held), self.width, _NUMBERS):
            yield self._part(slice(end, end := end + size))

    def first(self, count: int) -> Self:
        """The same for the first predictions alone."""
        return self._part(slice(count))

    def made(self) -> Self:
        """The same with all rows held."""
        return self if self.head is None else replace(self, held=self.head(self.held), head=None)

    def _part(self, place: slice) -> Self:
        labels = None if self.labels is None else self.labels[place]
        return replace(self, held=self.held[place], labels=labels, index=self.index[place])


@dataclass(frozen=True, eq=False)
class Run(Rows):
    """What a model, as it stands, returns for one batch.

    Attributes:
        output: all that it returns, where that is kept.
        shape: of the part that counts (`mpsearch.models.running.logits_of`).
    """

    output: Any = None
    shape: torch.Size = field(default_factory=torch.Size)

    @property
    def bytes(self) -> int:
        """Size of what is held: rows or hidden states, and the whole output where that is kept; what lies in one memory once."""
        parts = [self.held, *(part for part in tree_iter(self.output) if isinstance(part, Tensor))]
        return sum({part.data_ptr(): part.numel() * part.element_size() for part in reversed(parts)}.values())


def run(model: nn.Module, batch: Batch, layer: OutputLayer | None = None) -> Run:
    """Run a model on a batch.

    Args:
        model: the model.
        batch: the batch.
        layer: is left out of the run, and hidden states are held in place of many logits; the output as a whole is not kept then.

    Raises:
        EstimatorError: where it fails, or returns no floating-point numbers.
    """
    if layer is None:
        output = output_of(model, batch)
        return run_of(model, batch, logits_of(output), output)
    with layer.left_out():
        hidden = logits_of(output_of(model, batch))
    return run_of(model, batch, hidden, head=layer.head())


def run_of(model: nn.Module, batch: Batch, counted: Tensor, output: Any = None, head: Head | None = None) -> Run:
    """The run that gave an output.

    Args:
        model: tells whether labels are shifted.
        batch: that was run.
        counted: what counts of the output, or the hidden states that a head makes it from.
        output: all that the model returned.
        head: makes the rows; at once where they are small.
    """
    shape = counted.shape
    if head is not None:
        shape = torch.Size([*shape[:-1], head.width])
        if not too_large(shape.numel() * counted.element_size()):
            counted, head = head(counted), None
    held, labels, index = predictions(model, counted, batch)
    return Run(held, labels, index, samples(batch), head, output, shape)


def target_rows(model: nn.Module, batch: Batch, run: Run) -> Tensor | None:
    """(N, C) targets laid out as the rows of a run; None where they are not one number for each of the output.

    Targets may have dimensions of 1 more or less than the output: (B,) fits (B, 1).
    """
    if run.labels is not None:
        return run.labels[:, None] if run.width == 1 else None
    targets = targets_of(batch)
    if not isinstance(targets, Tensor) or not fits(targets.shape, run.shape):
        return None
    laid_out = targets.to(run.held.device, run.held.dtype).reshape(run.shape)
    return predictions(model, laid_out, batch)[0]


def fits(targets: torch.Size, output: torch.Size) -> bool:
    """True where two shapes are equal but for dimensions of 1."""
    return [d for d in targets if d != 1] == [d for d in output if d != 1]
