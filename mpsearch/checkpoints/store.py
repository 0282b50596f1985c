"""Where finished work goes, and comes from after an interruption."""

import abc
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from mpsearch.checkpoints.keys import Key, decode, encode
from mpsearch.checkpoints.values import pack, plain, typed, unpack
from mpsearch.errors import EstimatorError
from mpsearch.models.fingerprints import difference

V = TypeVar("V")
#: Passes that some work took, forward and backward, by the key of the work.
Passes = Mapping[Key[Any], tuple[float, float]]


@dataclass(frozen=True)
class Entry(Generic[V]):
    """A value, and the passes that it took."""

    value: V
    passes: Passes = field(default_factory=dict)


class Store(abc.ABC):
    """Finished work by its key.

    A store written elsewhere has the five abstract methods below, which move packed entries (bytes); what packs and checks values is
    shared. `mpsearch.testing.checkpoint_checks` holds one to the contract: what was put last comes back bit for bit, an interrupted
    `put` leaves the value before.

    Attributes:
        durable: what was put outlives the process, and is there when the same place is opened again.
        name: what messages call it; a file's path.
        identity: what the work depends on (fingerprints of weights, data, output, quantizer, settings), by name.
    """

    durable: ClassVar[bool]
    name: str
    identity: Mapping[str, str]

    @abc.abstractmethod
    def row(self, key: Key[Any]) -> bytes | None:
        """The packed entry under a key; None where there is none.

        Raises:
            EstimatorError: where it is damaged.
        """

    @abc.abstractmethod
    def rows(self, kind: type[Key[Any]] | None = None) -> dict[Key[Any], bytes]:
        """All packed entries, or those of one kind, to `fill` another store with.

        Raises:
            EstimatorError: where one is damaged.
        """

    @abc.abstractmethod
    def fill(self, rows: Mapping[Key[Any], bytes]) -> None:
        """Store packed entries, all or none; each replaces the one under its key."""

    @abc.abstractmethod
    def delete(self, keys: Collection[Key[Any]]) -> None:
        """Remove entries; a key without one is no error."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of files."""

    def check(self, identity: Mapping[str, str]) -> None:
        """Refuse to serve work that depends on something else.

        Raises:
            EstimatorError: names what differs.
        """
        reason = difference(self.identity, identity)
        if reason is not None:
            raise EstimatorError(f"{self.name} was written for {reason}; give another file")

    def get(self, key: Key[V]) -> V | None:
        """The value under a key; None where there is none.

        Raises:
            EstimatorError: where it is damaged.
        """
        entry = self.entry(key)
        return None if entry is None else entry.value

    def put(self, key: Key[V], value: V, passes: Passes | None = None) -> None:
        """Store a value; a durable store has it on the disk when this returns.

        Args:
            key: of the work.
            value: of the type that the key's kind names.
            passes: that it took, by the key of the work that took them.

        Raises:
            TypeError: for a value of another type.
        """
        content = plain(value)
        typed(content, key.value)
        works = {encode(work): number for work, number in (passes or {}).items()}
        self.fill({key: pack((content, works))})

    def entry(self, key: Key[V]) -> Entry[V] | None:
        """The value under a key, and the passes that it took; None where there is none.

        Raises:
            EstimatorError: where it is damaged: others may be too, or may have come of it.
        """
        row = self.row(key)
        return None if row is None else cast(Entry[V], self._entry(key, row))

    def items(self, kind: type[Key[V]]) -> Iterator[tuple[Key[V], V]]:
        """Keys of a kind with their values.

        Raises:
            EstimatorError: where one is damaged.
        """
        for key, row in self.rows(kind).items():
            yield key, self._entry(key, row).value

    def _entry(self, key: Key[Any], row: bytes) -> Entry[Any]:
        try:
            value, works = typed(unpack(row), tuple[Any, dict])  # type: ignore[type-arg]
            passes = {decode(work): (float(forward), float(backward)) for work, (forward, backward) in works.items()}
            return Entry(typed(value, key.value), passes)
        except (ValueError, TypeError) as error:
            raise self.damaged(key, f"cannot be read ({error})") from None

    def damaged(self, key: object, fault: str) -> EstimatorError:
        """The error for an entry that cannot be used."""
        text = encode(key) if isinstance(key, Key) else str(key)
        return EstimatorError(f"{self.name} is damaged: the result {text[:60]!r} {fault}; give another file")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
