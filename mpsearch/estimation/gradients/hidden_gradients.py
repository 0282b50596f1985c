"""Gradients of hidden states behind which a head makes many logits: forward and backward of the head a few rows at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from mpsearch.errors import EstimatorError
from mpsearch.estimation.gradients.targets import GradientTarget
from mpsearch.metrics.metric import Comparison, inner_product
from mpsearch.metrics.runs import Run
from mpsearch.metrics.seeds import Draw
from mpsearch.metrics.targets import Loss

#: A scalar in the graph from a run that holds its rows: a sum over its predictions.
Target = Callable[[Run], Tensor]


class Receiver(Protocol):
    """Is handed what a head is called with, and the gradient of what it returns: all that its own weight's gradient is made of."""

    def __call__(self, target: int, hidden: Tensor, gradient: Tensor, index: Tensor) -> None:
        """See one piece.

        Args:
            target: number of the target.
            hidden: (n, H) hidden states.
            gradient: (n, C) of the rows.
            index: (n,) samples of them.
        """
        ...


def piece_target(metric: Comparison, target: GradientTarget, draw: int, number: int) -> Target:
    """What a target stands for, as a sum over pieces that come in order.

    Args:
        metric: of the run, one that is `by_rows`.
        target: what is differentiated.
        draw: its number.
        number: of the batch.

    Raises:
        EstimatorError: in a call, for the loss with labels where the run has none.
    """
    if target.kind == "given":
        return lambda run: Loss("classes").values(run.rows, _labels(run)).sum()
    numbers = Draw(target.seed, number, draw)
    if target.kind == "drawn":
        return lambda run: metric.drawn(run.rows, run.index, run.samples, numbers)

    def random(run: Run) -> Tensor:
        u = metric.random_output(run.rows.detach(), run.index, run.samples, numbers)
        return inner_product(u, run.rows)

    return random


def _labels(run: Run) -> Tensor:
    if run.labels is None:
        raise EstimatorError(
            "this estimator differentiates the loss, which needs labels; give batches (inputs, targets) or a loss"
        )
    return run.labels


def hidden_gradients(run: Run, targets: Sequence[Target], receiver: Receiver | None = None) -> list[Tensor]:
    """Gradients of sums over predictions with regard to the hidden states of a run: the rows of a piece are made once for all targets.

    Args:
        run: with a head.
        targets: T sums.
        receiver: of what the head's own gradient is made of.

    Returns:
        T tensors (N, H), in the type of the hidden states.

    >>> from mpsearch.models.head import Head
    >>> run = Run(torch.ones(1, 3), None, torch.zeros(1).long(), 1, Head(torch.ones(2, 3)))
    >>> hidden_gradients(run, [lambda run: run.rows.square().sum() / 2])      # rows (3, 3), each from three numbers
    [tensor([[6., 6., 6.]])]
    """
    assert run.head is not None
    found = [torch.empty_like(run.held) for _ in targets]
    end = 0
    for part in run.parts():
        place = slice(end, end := end + len(part.held))
        with torch.no_grad():
            rows = part.made().held
        rows.requires_grad_()
        for number, target in enumerate(targets):
            with torch.enable_grad():
                value = target(replace(part, held=rows, head=None))
            (gradient,) = torch.autograd.grad(value, rows)
            if receiver is not None:
                receiver(number, part.held.detach(), gradient, part.index)
            with torch.no_grad():
                found[number][place] = run.head.pulled_back(gradient)
    return found
