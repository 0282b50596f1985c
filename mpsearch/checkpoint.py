"""Finished work on disk, so that a killed run loses nothing."""

import contextlib
import io
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from mpsearch.errors import EstimatorError

_VERSION = "2"
#: Name -> the SQL that makes it, as SQLite keeps it.
_TABLES = {
    "identity": "CREATE TABLE identity (name TEXT PRIMARY KEY, value TEXT)",
    "result": "CREATE TABLE result (name TEXT PRIMARY KEY, value BLOB)",
}


class Checkpoint:
    """A file of named results, each durable once `put` returns.

    An SQLite database in write-ahead mode: a process killed at any moment leaves every finished `put` and nothing of
    an unfinished one.

    Args:
        path: the file; made where it does not exist.
        identity: what the results depend on (fingerprints of weights, data, quantizer, settings), by name.

    Raises:
        EstimatorError: where the file is none of ours, or was written for something else; it names what differs.

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
        try:
            self._file = sqlite3.connect(self.path, isolation_level=None)
        except sqlite3.Error as error:
            raise EstimatorError(f"{path} cannot be opened: {error}") from None
        try:
            with self._readable():
                self._open({"checkpoint version": _VERSION, **identity})
        except EstimatorError:
            self._file.close()
            raise

    @classmethod
    def copy_of(cls, path: str | Path, identity: Mapping[str, str]) -> "Checkpoint":
        """What a closed file holds, in memory: the file and its folder may be read-only.

        Raises:
            EstimatorError: as for the file itself.
        """
        made = cls(":memory:", {})
        made.path = Path(path)
        with made._readable():
            with contextlib.closing(sqlite3.connect(f"{made.path.absolute().as_uri()}?immutable=1", uri=True)) as file:
                file.backup(made._file)
            made._open({"checkpoint version": _VERSION, **identity})
        return made

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise EstimatorError(
                f"{self.path} is no checkpoint of mpsearch, or a damaged one: {error}; give another file"
            ) from None

    def _open(self, identity: Mapping[str, str]) -> None:
        self._file.execute("PRAGMA trusted_schema=OFF")
        for kind, name, sql in self._file.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
            if sql != _TABLES.get(
                name
            ):  # also a view, a trigger, a column that is computed: SQL of others is never run
                raise EstimatorError(
                    f"{self.path} is a database with the {kind} {name!r} ({sql}), no checkpoint of mpsearch; "
                    "give another file"
                )
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("PRAGMA synchronous=FULL")
        for sql in _TABLES.values():
            self._file.execute(sql.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
        self._check(identity)

    def _check(self, identity: Mapping[str, str]) -> None:
        found = dict(self._file.execute("SELECT name, value FROM identity"))
        if not found:
            self._file.execute("BEGIN")
            self._file.executemany("INSERT INTO identity VALUES (?, ?)", identity.items())
            self._file.execute("COMMIT")
            return
        for name in [*identity, *found]:
            if found.get(name) != identity.get(name):
                raise EstimatorError(
                    f"{self.path} was written for other {name}: it has {found.get(name)}, this run has "
                    f"{identity.get(name)}; give another file"
                )

    def get(self, name: str) -> Any:
        """What `put` stored under a name; None where nothing is.

        Raises:
            EstimatorError: where it is damaged.
        """
        with self._readable():
            row = self._file.execute("SELECT value FROM result WHERE name = ?", (name,)).fetchone()
        if row is None:
            return None
        try:
            return torch.load(io.BytesIO(row[0]), weights_only=True)
        except Exception as error:  # zipfile, pickle and torch raise what they like on damaged bytes
            reason = (str(error).splitlines() or [""])[0]
            raise EstimatorError(
                f"{self.path}: the result {name!r} is damaged ({type(error).__name__}: {reason}); give another file"
            ) from None

    def put(self, name: str, value: Any) -> None:
        """Store tensors, numbers, text, and lists and dicts of them; on the disk when this returns."""
        buffer = io.BytesIO()
        torch.save(value, buffer)
        with self._readable():
            self._file.execute("INSERT OR REPLACE INTO result VALUES (?, ?)", (name, buffer.getvalue()))

    def drop(self, names: Sequence[str]) -> None:
        """Remove results."""
        with self._readable():
            self._file.executemany("DELETE FROM result WHERE name = ?", [(name,) for name in names])

    def rows(self) -> dict[str, bytes]:
        """All results as they are stored, to `fill` another file with."""
        with self._readable():
            return dict(self._file.execute("SELECT name, value FROM result"))

    def fill(self, rows: Mapping[str, bytes]) -> None:
        """Store the results of another file."""
        with self._readable():
            self._file.execute("BEGIN")
            self._file.executemany("INSERT OR REPLACE INTO result VALUES (?, ?)", rows.items())
            self._file.execute("COMMIT")

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

    def put(self, name: str, value: Any) -> None:
        """Forget the value."""

    def drop(self, names: Sequence[str]) -> None:
        """Nothing is there."""
