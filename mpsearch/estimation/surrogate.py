"""The additive-output surrogate: shifts of the output by single perturbations, added up."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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
from mpsearch.metrics.pieces import by_pieces
from mpsearch.metrics.statistics import log_softmax, wide
from mpsearch.models.running import fingerprint

#: Largest shift of a log probability in half precision.
_MOST = torch.finfo(torch.float16).max


@dataclass(eq=False)
class OutputShifts:
    """Takes from a run of one perturbation at a time the shift of the output that each cell makes, on a fixed sample of predictions.

    An observer (`mpsearch.estimation.context.OutputObserver`): it adds no run. Of the KL, shifts are those of the log probabilities; of
    other metrics those of H^(1/2) times the output, whose summed squares are the damage, on a random sample of the numbers. `surrogate`
    of it is the product. Shifts are rounded, of the KL to half precision: 2 bytes a number, and 5e-4 of it.

    Attributes:
        store: where shifts go as they are seen, and are found again; by default in memory.
        predictions: how many are taken, spread over the batches.
        classes: how many classes are told apart: the likeliest ones of the unquantized model, and all others as one; of other
            metrics, how many numbers of a prediction are taken.
    """

    store: Store = field(default_factory=lambda: MemoryStore({}))
    predictions: int = 256
    classes: int = 64
    _references: weakref.WeakKeyDictionary[Output, tuple[Tensor, list[Tensor | None]]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )

    @property
    def settings(self) -> str:
        """See `OutputObserver.settings`."""
        return f"rounded shifts of {self.classes} numbers of {self.predictions} predictions"

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
            before, chosen = self._reference(reference, rows)
            after = torch.cat(
                [_coarse(piece.logits, part) for piece, part in zip(output.first(rows).pieces(), chosen, strict=True)]
            )
            batch, shift = fingerprint([before]), (after - before).clamp(-_MOST, _MOST).half()
        else:
            batch = fingerprint([reference.logits])
            change = wide(output.logits) - wide(reference.logits)
            whitened = metric.root(reference.logits, change, reference.index, reference.samples) / math.sqrt(2)
            shift = _sampled(whitened, rows, self.classes).float()  # of any size: half precision has few exponents
            before = torch.zeros_like(shift, dtype=torch.float64)
        index = self.store.get(ShiftIndexKey())
        known = [] if index is None else index.rows
        if batch not in known:
            self.store.put(ReferenceKey(batch), before)
            self.store.put(ShiftIndexKey(), ShiftIndex([*known, batch], not isinstance(metric, KL)))
        self.store.put(ShiftKey(batch, probe.decision, probe.name), shift)

    def _reference(self, reference: Output, rows: int) -> tuple[Tensor, list[Tensor | None]]:
        """(N, K) log probabilities of the unquantized model, made once, and for each piece of them the classes that are told apart."""
        if reference not in self._references:
            pieces = list(reference.first(rows).pieces())
            chosen = [_likeliest(piece.logits, self.classes) for piece in pieces]
            before = torch.cat([_coarse(piece.logits, part) for piece, part in zip(pieces, chosen, strict=True)])
            self._references[reference] = before, chosen
        return self._references[reference]

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


def _likeliest(logits: Tensor, classes: int) -> Tensor | None:
    """(N, K - 1) the classes of each prediction that are told apart; None: all of them."""
    if logits.shape[1] <= classes:
        return None
    return by_pieces(lambda rows: log_softmax(rows).topk(classes - 1, dim=1).indices, logits)


def _coarse(logits: Tensor, chosen: Tensor | None) -> Tensor:
    """(N, K) log probabilities, all classes that are not chosen taken as one."""
    if chosen is None:
        return by_pieces(log_softmax, logits).cpu()
    return by_pieces(_with_rest, logits, chosen).cpu()


def _with_rest(logits: Tensor, chosen: Tensor) -> Tensor:
    log_p = log_softmax(logits)
    kept = log_p.gather(1, chosen)
    rest = log_p.scatter(1, chosen, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([kept, rest], 1)


@dataclass(eq=False)
class Surrogate:
    """Damage of a plan without running the model: KL(p || softmax(log p + sum_d shift[d, plan(d)])), mean over a sample.

    Of other metrics it is the mean of |sum_d shift[d, plan(d)]|^2, in proportion to the damage.

    It sees how errors of layers add and cancel at the output, but not how one layer's error changes another's: a proposer,
    not the judge. On some networks its plans are worse than those of the tables.

    Attributes:
        log_p: (N, K) log probabilities of the unquantized model; 0 where squares are summed.
        shifts: (D, P, N, K) what each cell adds to them, alone; of any float type, sums are taken in float64.
        squares: the damage is the sum of squares.

    >>> shifts = np.array([[[[1.0, -1.0]]], [[[-1.0, 1.0]]]])      # two cells that cancel
    >>> surrogate = Surrogate(np.log(np.array([[0.5, 0.5]])), shifts)
    >>> float(surrogate.damage(np.array([0, 0])))
    0.0
    """

    log_p: NDArray[np.float64]
    shifts: NDArray[np.floating[Any]]
    squares: bool = False
    _rows: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._rows = np.arange(len(self.shifts))
        self._p = np.exp(self.log_p)

    def damage(self, options: NDArray[np.int64]) -> float:
        """Damage of one plan, the (D,) columns of its options."""
        return float(self._damage(self._total(options)[None])[0])

    def damage_of_changes(
        self, options: NDArray[np.int64], changes: list[tuple[tuple[int, int], ...]]
    ) -> NDArray[np.float64]:
        """(M,) damage of a plan after each of M lists of changes (decision, column)."""
        moved = np.repeat(self._total(options)[None], len(changes), 0)
        for number, change in enumerate(changes):
            for decision, column in change:
                moved[number] += self.shifts[decision, column]
                moved[number] -= self.shifts[decision, options[decision]]
        return self._damage(moved)

    def _total(self, options: NDArray[np.int64]) -> NDArray[np.float64]:
        """(N, K) log probabilities with the shifts of a plan."""
        total: NDArray[np.float64] = self.log_p + self.shifts[self._rows, options].sum(0, dtype=np.float64)
        return total

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
    references = [checkpoint.get(ReferenceKey(rows)) for rows in index.rows]
    shapes = {value.shape[1:] for value in references if value is not None}
    if any(value is None for value in references) or len(shapes) != 1:
        raise _unfit()
    log_p = torch.cat([value for value in references if value is not None]).double().numpy()
    shifts = np.zeros((decisions, len(precisions), *log_p.shape), np.float32 if index.squares else np.float16)
    end = 0
    for rows, reference in zip(index.rows, references, strict=True):
        assert reference is not None
        place = slice(end, end := end + len(reference))
        for decision, p in np.ndindex(shifts.shape[:2]):
            value = checkpoint.get(ShiftKey(rows, decision, str(precisions[p])))
            if value is not None:
                if not value.is_floating_point() or value.shape != reference.shape:
                    raise _unfit()
                shifts[decision, p, place] = value.numpy()
    return Surrogate(log_p, shifts, index.squares)


def _unfit() -> EstimatorError:
    return EstimatorError("the checkpoint holds shifts of the output that do not fit each other; give another file")
