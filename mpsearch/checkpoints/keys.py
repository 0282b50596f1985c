"""Keys of finished work: a record for each kind, and the one place that writes them as text and reads them back."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

from torch import Tensor

V_co = TypeVar("V_co", covariant=True)


@dataclass(frozen=True)
class Key(Generic[V_co]):
    """Names a piece of finished work. Its fields are text, whole numbers, and tuples of text.

    Attributes:
        kind: name of the kind of work in a file.
        value: type of what is stored under the key.
    """

    kind: ClassVar[str]
    value: ClassVar[Any]


@dataclass(frozen=True, eq=False)
class PlanRuns:
    """A plan on the first batches of a part of the data.

    Attributes:
        sums: (n,) damage over the predictions of each sample.
        counts: (n,) predictions of each sample.
        runs: for each batch, how often the model ran for it.
        again: the unquantized model has to run again for each plan.
    """

    sums: Tensor
    counts: Tensor
    runs: list[int]
    again: bool


@dataclass(frozen=True)
class PlanKey(Key[PlanRuns]):
    """A plan measured on a part of the data: the precision of each decision."""

    part: str
    precisions: tuple[str, ...]
    kind = "plan"
    value = PlanRuns


@dataclass(frozen=True)
class TablesKey(Key[float]):
    """Passes that the starting tables of a family of estimators took; `estimators` is a digest of their settings and code."""

    estimators: str
    kind = "tables"
    value = float


@dataclass(frozen=True)
class CellKey(Key[list[float]]):
    """Sums of the damage of one perturbation over a turn of batches, by one estimator (a digest of its settings and code)."""

    estimator: str
    decision: str
    perturbation: str
    turn: int
    kind = "cell"
    value = list[float]


@dataclass(frozen=True)
class TurnKey(Key[bool]):
    """A turn of batches whose replayed outputs were those of the whole model."""

    turn: int
    kind = "turn"
    value = bool


@dataclass(frozen=True, eq=False)
class SweepState:
    """A sweep of gradients after some batches.

    Attributes:
        batches: how many are done.
        states: what each estimator has summed up.
    """

    batches: int
    states: list[Any]


@dataclass(frozen=True)
class SweepKey(Key[SweepState]):
    """A sweep of gradients for some estimators (a digest of their settings and code) over so many decisions."""

    estimators: str
    decisions: int
    kind = "sweep"
    value = SweepState


@dataclass(frozen=True)
class TraceKey(Key[tuple[list[float], list[float]]]):
    """Traces of the Hessian on one batch, and their variances."""

    estimator: str
    batch: int
    kind = "trace"
    value = tuple[list[float], list[float]]


@dataclass(frozen=True)
class DeltaLossKey(Key[list[float]]):
    """Score of each decision at a precision, on one batch, by `DeltaLoss`."""

    precision: str
    batch: int
    kind = "delta loss"
    value = list[float]


@dataclass(frozen=True)
class PathKey(Key[list[float]]):
    """Share of each decision in the damage at a precision on one batch, and that damage, by `PathShapley`."""

    nodes: int
    precision: str
    batch: int
    kind = "path"
    value = list[float]


@dataclass(frozen=True, eq=False)
class ShiftIndex:
    """Which predictions shifts of the output are known for.

    Attributes:
        rows: fingerprints of the unquantized outputs of these predictions.
        squares: shifts are summed as squares; False: they are of log probabilities.
    """

    rows: list[str]
    squares: bool


@dataclass(frozen=True)
class ShiftIndexKey(Key[ShiftIndex]):
    """Which predictions shifts of the output are known for."""

    kind = "shift index"
    value = ShiftIndex


@dataclass(frozen=True)
class ReferenceKey(Key[Tensor]):
    """Unquantized output of some predictions, (N, K)."""

    rows: str
    kind = "reference"
    value = Tensor


@dataclass(frozen=True)
class ShiftKey(Key[Tensor]):
    """What one perturbation adds to the output of some predictions, (N, K)."""

    rows: str
    decision: int
    precision: str
    kind = "shift"
    value = Tensor


@dataclass(frozen=True)
class FormulaKey(Key[list[list[float]]]):
    """Scores that a formula gives the decisions of each model."""

    formula: str
    kind = "formula"
    value = list[list[float]]


@dataclass(frozen=True)
class BatchKey(Key[Any]):
    """Whatever an estimator from elsewhere stores of a batch.

    Attributes:
        estimator: its name and settings, such as `digest(described(self))` of `mpsearch.models.fingerprints`.
        batch: number of the batch.
        name: where it stores several things of a batch.
    """

    estimator: str
    batch: int
    name: str = ""
    kind = "batch"
    value = Any


#: Name in a file -> its record.
KINDS: dict[str, type[Key[Any]]] = {
    "batch": BatchKey,
    "cell": CellKey,
    "delta loss": DeltaLossKey,
    "formula": FormulaKey,
    "path": PathKey,
    "plan": PlanKey,
    "reference": ReferenceKey,
    "shift": ShiftKey,
    "shift index": ShiftIndexKey,
    "sweep": SweepKey,
    "tables": TablesKey,
    "trace": TraceKey,
    "turn": TurnKey,
}


def encode(key: Key[Any]) -> str:
    """A key as text: JSON in ASCII, the kind and then the fields in their order.

    >>> encode(PlanKey("select", ("w4", "w2")))
    '["plan","select",["w4","w2"]]'
    """
    return json.dumps(
        [key.kind, *(getattr(key, field.name) for field in dataclasses.fields(key))], separators=(",", ":")
    )


def decode(text: str) -> Key[Any]:
    """The key that `encode` wrote.

    Raises:
        ValueError: for other text.

    >>> decode('["plan","select",["w4","w2"]]')
    PlanKey(part='select', precisions=('w4', 'w2'))
    """
    try:
        kind, *fields = json.loads(text)
        record = KINDS[kind]
        key = record(*(tuple(field) if isinstance(field, list) else field for field in fields))
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError(f"{text[:60]!r} is no key of finished work") from None
    hints = get_type_hints(record)
    if encode(key) != text or not all(
        _fits(getattr(key, field.name), hints[field.name]) for field in dataclasses.fields(key)
    ):
        raise ValueError(f"{text[:60]!r} is no key of finished work")
    return key


def span(kind: type[Key[Any]]) -> tuple[str, str]:
    """Texts between which those of all keys of a kind lie, the first included and the second not."""
    name = json.dumps(kind.kind)
    return f"[{name}", f"[{name}^"  # a comma or a bracket follows the name, and both come before ^


def _fits(value: object, kind: Any) -> bool:
    if kind in (str, int):
        return type(value) is kind
    return type(value) is tuple and all(type(item) is str for item in value)
