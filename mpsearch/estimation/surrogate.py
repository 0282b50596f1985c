"""The additive-output surrogate: shifts of the output by single perturbations, added up."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.checkpoints.keys import ReferenceKey, ShiftIndex, ShiftIndexKey, ShiftKey
from mpsearch.checkpoints.memory import MemoryStore
from mpsearch.checkpoints.store import Store
from mpsearch.core.precision import Precision
from mpsearch.errors import EstimatorError
from mpsearch.estimation.context import Context
from mpsearch.estimation.probes import Output, Probe
from mpsearch.metrics.divergences import KL
from mpsearch.metrics.statistics import log_softmax, wide
from mpsearch.models.running import fingerprint


@dataclass(eq=False)
class OutputShifts:
    """Takes from a run of one perturbation at a time the shift of the output that each cell makes, on a fixed sample of predictions.

    An observer (`mpsearch.estimation.context.OutputObserver`): it adds no run. Of the KL, shifts are those of the log probabilities; of
    other metrics those of H^(1/2) times the output, whose summed squares are the damage, on a random sample of the numbers. `surrogate`
    of it is the product.

    Attributes:
        store: where shifts go as they are seen, and are found again; by default in memory.
        predictions: how many are taken, spread over the batches.
        classes: how many classes are told apart: the likeliest ones of the unquantized model, and all others as one; of other
            metrics, how many numbers of a prediction are taken.
    """

    store: Store = field(default_factory=lambda: MemoryStore({}))
    predictions: int = 256
    classes: int = 64

    @property
    def settings(self) -> str:
        """See `OutputObserver.settings`."""
        return f"shifts of {self.classes} numbers of {self.predictions} predictions"

    def observe(self, context: Context, probe: Probe, reference: Output, output: Output) -> None:
        """See `OutputObserver.observe`.

        Raises:
            EstimatorError: for a loss that compares with nothing.
        """
        metric = context.comparison
        if metric is None:
            raise EstimatorError(
                "shifts of the output compare with the unquantized output, which a loss of one's own does not"
            )
        rows = math.ceil(self.predictions / len(context.batches))
        if isinstance(metric, KL):
            before, classes = _coarse(reference.logits[:rows], self.classes, None)
            after, _ = _coarse(output.logits[:rows], self.classes, classes)
            batch, shift = fingerprint([before]), after - before
        else:
            batch = fingerprint([reference.logits])
            change = wide(output.logits) - wide(reference.logits)
            whitened = metric.root(reference.logits, change, reference.index, reference.samples) / math.sqrt(2)
            shift = _sampled(whitened, rows, self.classes)
            before = torch.zeros_like(shift)
        index = self.store.get(ShiftIndexKey())
        known = [] if index is None else index.rows
        if batch not in known:
            self.store.put(ReferenceKey(batch), before)
            self.store.put(ShiftIndexKey(), ShiftIndex([*known, batch], not isinstance(metric, KL)))
        self.store.put(ShiftKey(batch, probe.decision, probe.name), shift)

    def surrogate(self, decisions: int, precisions: Sequence[Precision]) -> "Surrogate | None":
        """What was seen, as a model of the damage; None where that is nothing.

        Args:
            decisions: how many.
            precisions: the options.
        """
        return surrogate(self.store, decisions, precisions)


def _sampled(values: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) of a matrix at most, the same places for matrices of one shape."""
    generator = torch.Generator().manual_seed(0)
    chosen = (
        torch.randperm(size, generator=generator)[:most]
        for size, most in zip(values.shape, (rows, columns), strict=True)
    )
    for dim, places in enumerate(chosen):
        values = values.index_select(dim, places.to(values.device))
    return values.cpu()


def _coarse(logits: Tensor, classes: int, chosen: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(N, K) log probabilities, the unlikely classes taken as one; and the classes that are told apart."""
    log_p = log_softmax(logits)
    if log_p.shape[1] <= classes:
        return log_p.cpu(), None
    if chosen is None:
        chosen = log_p.topk(classes - 1, dim=1).indices
    kept = log_p.gather(1, chosen)
    rest = log_p.scatter(1, chosen, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([kept, rest], 1).cpu(), chosen


@dataclass(eq=False)
class Surrogate:
    """Damage of a plan without running the model: KL(p || softmax(log p + sum_d shift[d, plan(d)])), mean over a sample.

    Of other metrics it is the mean of |sum_d shift[d, plan(d)]|^2, in proportion to the damage.

    It sees how errors of layers add and cancel at the output, but not how one layer's error changes another's: a proposer,
    not the judge. On some networks its plans are worse than those of the tables.

    Attributes:
        log_p: (N, K) log probabilities of the unquantized model; 0 where squares are summed.
        shifts: (D, P, N, K) what each cell adds to them, alone.
        squares: the damage is the sum of squares.

    >>> shifts = np.array([[[[1.0, -1.0]]], [[[-1.0, 1.0]]]])      # two cells that cancel
    >>> surrogate = Surrogate(np.log(np.array([[0.5, 0.5]])), shifts)
    >>> float(surrogate.damage(np.array([0, 0])))
    0.0
    """

    log_p: NDArray[np.float64]
    shifts: NDArray[np.float64]
    squares: bool = False
    _rows: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._rows = np.arange(len(self.shifts))
        self._p = np.exp(self.log_p)

    def damage(self, options: NDArray[np.int64]) -> float:
        """Damage of one plan, the (D,) columns of its options."""
        return float(self._damage(self.log_p + self.shifts[self._rows, options].sum(0)[None])[0])

    def damage_of_changes(
        self, options: NDArray[np.int64], changes: list[tuple[tuple[int, int], ...]]
    ) -> NDArray[np.float64]:
        """(M,) damage of a plan after each of M lists of changes (decision, column)."""
        total = self.log_p + self.shifts[self._rows, options].sum(0)
        moved = np.repeat(total[None], len(changes), 0)
        for number, change in enumerate(changes):
            for decision, column in change:
                moved[number] += self.shifts[decision, column] - self.shifts[decision, options[decision]]
        return self._damage(moved)

    def _damage(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """(M,) mean damage for (M, N, K) shifted log probabilities."""
        damage: NDArray[np.float64]
        if self.squares:
            damage = np.square(logits).sum((1, 2)) / len(self.log_p)
            return damage
        top = logits.max(-1, keepdims=True)
        log_q = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        damage = np.einsum("nk,mnk->m", self._p, self.log_p - log_q) / len(self.log_p)
        return damage


def surrogate(checkpoint: Store, decisions: int, precisions: Sequence[Precision]) -> Surrogate | None:
    """The surrogate from what `OutputShifts` has put into a store; None where that is nothing.

    A cell that changes nothing has no shift.
    """
    index = checkpoint.get(ShiftIndexKey())
    if index is None or not index.rows:
        return None
    log_p = [value for rows in index.rows if (value := checkpoint.get(ReferenceKey(rows))) is not None]
    names = [str(precision) for precision in precisions]
    shifts = [
        [[checkpoint.get(ShiftKey(rows, decision, name)) for rows in index.rows] for name in names]
        for decision in range(decisions)
    ]
    if len(log_p) != len(index.rows) or not all(
        value is None or (value.is_floating_point() and value.ndim == 2 and value.shape == reference.shape)
        for cell in itertools.chain(*shifts)
        for value, reference in zip(cell, log_p, strict=True)
    ):
        raise EstimatorError("the checkpoint holds shifts of the output that do not fit each other; give another file")
    return Surrogate(
        torch.cat(log_p).numpy(),
        np.array(
            [
                [
                    torch.cat(
                        [torch.zeros_like(r) if v is None else v for v, r in zip(cell, log_p, strict=True)]
                    ).numpy()
                    for cell in row
                ]
                for row in shifts
            ]
        ),
        index.squares,
    )
