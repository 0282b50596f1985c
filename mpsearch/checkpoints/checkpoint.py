"""Finished work on disk, so that a killed run loses nothing."""

import contextlib
import hashlib
import io
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from mpsearch.errors import EstimatorError
from mpsearch.models.fingerprints import difference

_VERSION = "3"
_VERSION_NAME = "checkpoint version"
#: Name -> the SQL that makes it, as SQLite keeps it.
_TABLES = {
    "identity": "CREATE TABLE identity (name TEXT PRIMARY KEY, value TEXT)",
    "result": "CREATE TABLE result (name TEXT PRIMARY KEY, value BLOB, checksum BLOB)",
}
#: Those of version 2, whose results have neither passes nor checksums.
_TABLES_2 = {**_TABLES, "result": "CREATE TABLE result (name TEXT PRIMARY KEY, value BLOB)"}
#: Passes that some work took, forward and backward, by the name of the work.
Works = Mapping[str, tuple[float, float]]


class Results(Protocol):
    """Finished work by its name."""

    def get(self, name: str) -> Any:
        """What `put` stored under a name; None where nothing is."""
        ...

    def put(self, name: str, value: Any) -> None:
        """Store tensors, numbers, text, and lists and dicts of them."""
        ...

    def drop(self, names: Sequence[str]) -> None:
        """Remove results."""
        ...


class Checkpoint:
    """A file of named results, each durable once `put` returns.

    An SQLite database in write-ahead mode: a process killed at any moment leaves every finished `put` and nothing of
    an unfinished one. Every result carries a checksum.

    Args:
        path: the file; made where it does not exist.
        identity: what the results depend on (fingerprints of weights, data, output, quantizer, settings), by name; compared by
            `identity.difference`.

    Raises:
        EstimatorError: where the file is none of ours, damaged, of another version, or was written for something else; it names what
            differs.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "run.db")
    >>> with Checkpoint(path, {"weights": "a"}) as checkpoint:
    ...     checkpoint.put("layer w4", [1.0, 2.0])
    >>> with Checkpoint(path, {"weights": "a"}) as checkpoint:
    ...     checkpoint.get("layer w4"), checkpoint.get("layer w2")
    ([1.0, 2.0], None)
    >>> Checkpoint(path, {"weights": "b"})    # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mpsearch.errors.EstimatorError: ...run.db was written for other weights: it has a, this run has b; give another file
    """

    def __init__(self, path: str | Path, identity: Mapping[str, str]) -> None:
        self.path = Path(path)
        if not os.fspath(path) or (self.path.exists() and not self.path.is_file()):
            raise EstimatorError(f"{os.fspath(path)!r} cannot be opened: it is no file; give another name")
        try:
            self._file = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            raise EstimatorError(f"{path} cannot be opened: {error}") from None
        try:
            with self._readable():
                self._open(identity)
        except EstimatorError:
            self._file.close()
            raise

    @classmethod
    def of_bytes(cls, path: str | Path, data: bytes, identity: Mapping[str, str]) -> "Checkpoint":
        """What a closed file holds, in memory; also of the version before.

        Args:
            path: of the file, for messages.
            data: its content.
            identity: as for the file itself.

        Raises:
            EstimatorError: as for the file itself.
        """
        checkpoint = cls(":memory:", {})
        checkpoint.path = Path(path)
        with checkpoint._readable():
            checkpoint._file.deserialize(data[:18] + b"\1\1" + data[20:])  # closed: its write-ahead log is empty
            checkpoint._upgrade()
            checkpoint._open(identity)
        return checkpoint

    @classmethod
    def to_bytes(cls, rows: Mapping[str, bytes], identity: Mapping[str, str]) -> bytes:
        """The content of a file with the results of another one (`rows`)."""
        with cls(":memory:", identity) as checkpoint:
            checkpoint.fill(rows)
            return checkpoint._file.serialize()

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR")):
                raise EstimatorError(f"{self.path} cannot be written or read: {error}") from None
            raise EstimatorError(
                f"{self.path} is no checkpoint of mpsearch, or a damaged one: {error}; give another file"
            ) from None

    def _open(self, identity: Mapping[str, str]) -> None:
        tables = self._tables()
        version = self._identity().get(_VERSION_NAME) if "identity" in tables else None
        if version not in (None, _VERSION) or tables == _TABLES_2:
            raise EstimatorError(
                f"{self.path} is of version {version} of the checkpoints, this mpsearch goes on from version {_VERSION}; "
                "give another file"
            )
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("PRAGMA synchronous=FULL")
        with self._whole():
            for sql in _TABLES.values():
                self._file.execute(sql.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
            stored, wanted = self._identity(), {_VERSION_NAME: _VERSION, **identity}
            reason = difference(stored, wanted) if stored else None
            if reason is not None:
                raise EstimatorError(f"{self.path} was written for {reason}; give another file")
            if not stored:
                self._file.executemany("INSERT INTO identity VALUES (?, ?)", wanted.items())

    def _tables(self) -> dict[str, str]:
        """Name -> SQL of all that the file holds; that of others, such as a view or a trigger, is never run."""
        self._file.execute("PRAGMA trusted_schema=OFF")
        tables = {}
        for kind, name, sql in self._file.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
            if sql not in (_TABLES.get(name), _TABLES_2.get(name)):
                raise EstimatorError(
                    f"{self.path} is a database with the {kind} {name!r} ({sql}), no checkpoint of mpsearch; "
                    "give another file"
                )
            tables[name] = sql
        return tables

    def _identity(self) -> dict[str, str]:
        return dict(self._file.execute("SELECT name, value FROM identity"))

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """All that is written inside, or nothing."""
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._file.execute("COMMIT")
        finally:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")

    def _upgrade(self) -> None:
        """From version 2."""
        if self._tables() != _TABLES_2 or self._identity().get(_VERSION_NAME) != "2":
            return
        rows = dict(self._file.execute("SELECT name, value FROM result"))
        self._file.execute("DROP TABLE result")
        self._file.execute(_TABLES["result"])
        self._file.execute("UPDATE identity SET value = ? WHERE name = ?", (_VERSION, _VERSION_NAME))
        self.fill({name: _packed(self._unpacked(name, value), {}) for name, value in rows.items()})

    def get(self, name: str) -> Any:
        """What `put` stored under a name; None where nothing is."""
        stored = self.stored(name)
        return None if stored is None else stored[0]

    def stored(self, name: str) -> tuple[Any, Works] | None:
        """A result and the passes that it took; None where nothing is.

        Raises:
            EstimatorError: where the result is damaged: others may be too, or may have come of it.
        """
        with self._readable():
            row = self._file.execute("SELECT value, checksum FROM result WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        value, works = self._unpacked(name, self._checked(name, *row))
        return value, works

    def _checked(self, name: Any, value: Any, checksum: Any) -> bytes:
        if isinstance(name, str) and isinstance(value, bytes) and checksum == _checksum(name, value):
            return value
        raise EstimatorError(
            f"{self.path} is damaged: the result {str(name)[:60]!r} does not fit its checksum; give another file"
        )

    def _unpacked(self, name: str, value: bytes) -> Any:
        try:
            return torch.load(io.BytesIO(value), weights_only=True)
        except Exception as error:  # of unpickling, which says everything
            raise EstimatorError(
                f"{self.path} is damaged: the result {name[:60]!r} cannot be read ({type(error).__name__}); give another file"
            ) from None

    def put(self, name: str, value: Any, works: Works | None = None) -> None:
        """Store tensors, numbers, text, and lists and dicts of them; on the disk when this returns.

        Args:
            name: of the result.
            value: the result.
            works: passes that it took, by the name of the work.
        """
        self.fill({name: _packed(value, works or {})})

    def drop(self, names: Sequence[str]) -> None:
        """Remove results."""
        with self._readable():
            self._file.executemany("DELETE FROM result WHERE name = ?", [(name,) for name in names])

    def rows(self) -> dict[str, bytes]:
        """All results as they are stored, to `fill` another file with.

        Raises:
            EstimatorError: where one is damaged.
        """
        with self._readable():
            rows = self._file.execute("SELECT name, value, checksum FROM result").fetchall()
        return {row[0]: self._checked(*row) for row in rows}

    def fill(self, rows: Mapping[str, bytes]) -> None:
        """Store the results of another file."""
        checked = [(name, value, _checksum(name, value)) for name, value in rows.items()]
        with self._readable(), self._whole():
            self._file.executemany("INSERT OR REPLACE INTO result VALUES (?, ?, ?)", checked)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class NoCheckpoint(contextlib.nullcontext["NoCheckpoint"]):
    """Keeps nothing."""

    def __enter__(self) -> "NoCheckpoint":
        return self

    def get(self, name: str) -> Any:
        """Nothing."""
        return None

    def stored(self, name: str) -> tuple[Any, Works] | None:
        """Nothing."""
        return None

    def put(self, name: str, value: Any, works: Works | None = None) -> None:
        """Forget the value."""

    def drop(self, names: Sequence[str]) -> None:
        """Nothing is there."""


class Counted:
    """A checkpoint for one run, that stores with each result the passes it took, and tells those of what it finds.

    Passes since the result before belong to the next one. Results that are stored with no pass between them come of the same work,
    which counts once.

    Args:
        file: the checkpoint.
        passes: of this run so far, forward and backward.

    >>> run = [0.0, 0.0]
    >>> file = Checkpoint(":memory:", {})
    >>> first = Counted(file, lambda: (run[0], run[1]))
    >>> run[0] = 3.0
    >>> first.put("kl of w4", 0.1)
    >>> first.put("mse of w4", 0.2)          # of the same run of the model
    >>> second = Counted(file, lambda: (0.0, 0.0))
    >>> second.get("kl of w4"), second.get("mse of w4"), second.earlier
    (0.1, 0.2, (3.0, 0.0))
    """

    def __init__(self, file: Checkpoint | NoCheckpoint, passes: Callable[[], tuple[float, float]]) -> None:
        self._file, self._passes = file, passes
        self._counted = passes()
        self._of_rows: dict[str, Works] = {}  # of each row that was found or put
        self._own: set[str] = set()  # rows put in this run
        self._found: Works = {}
        self._last: Works = {}
        self._dropped: Works = {}

    @property
    def earlier(self) -> tuple[float, float]:
        """Passes, forward and backward, that earlier runs took for what this one found."""
        forward, backward = (
            (sum(works) for works in zip(*self._found.values(), strict=True)) if self._found else (0.0, 0.0)
        )
        return forward, backward

    def get(self, name: str) -> Any:
        """What is stored under a name; None where nothing is."""
        stored = self._file.stored(name)
        if stored is None:
            return None
        value, works = stored
        if name not in self._own:
            self._of_rows[name] = works
            self._found = _joined(self._found, works)
        return value

    def put(self, name: str, value: Any) -> None:
        """Store a result, with the passes since the one before."""
        now, before = self._passes(), self._of_rows.get(name, {})
        if now != self._counted:
            forward, backward = before.get(name, (0.0, 0.0))
            self._last = {name: (forward + now[0] - self._counted[0], backward + now[1] - self._counted[1])}
            self._counted = now
        self._of_rows[name] = _joined(_joined(before, self._last), self._dropped)
        self._dropped = {}
        self._own.add(name)
        self._file.put(name, value, self._of_rows[name])

    def drop(self, names: Sequence[str]) -> None:
        """Remove results; their passes go to the next one."""
        for name in names:
            self._dropped = _joined(self._dropped, self._of_rows.pop(name, {}))
        self._file.drop(names)


def _joined(first: Works, second: Works) -> Works:
    """Passes of all works, each counted once: what is known of it last is the most."""
    return {name: max(first.get(name, (0.0, 0.0)), second.get(name, (0.0, 0.0))) for name in (*first, *second)}


def _packed(value: Any, works: Works) -> bytes:
    buffer = io.BytesIO()
    torch.save((value, dict(works)), buffer)
    return buffer.getvalue()


def _checksum(name: str, value: bytes) -> bytes:
    return hashlib.blake2b(name.encode() + b"\0" + value, digest_size=16).digest()
