"""What a model returns for one batch, laid out as one row a prediction."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from mpsearch.models.running import Batch, logits_of, output_of, predictions, samples, targets_of


@dataclass(frozen=True, eq=False)
class Run:
    """What a model, as it stands, returns for one batch.

    Attributes:
        output: all that it returns.
        shape: of the part that counts (`mpsearch.models.running.logits_of`).
        rows: (N, C) numbers of that part, one row for each prediction that counts (`mpsearch.models.running.predictions`).
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
        """Size of the rows, and of the whole output where that is kept; what lies in one memory once."""
        parts = [self.rows, *(part for part in tree_iter(self.output) if isinstance(part, Tensor))]
        return sum({part.data_ptr(): part.numel() * part.element_size() for part in reversed(parts)}.values())


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
