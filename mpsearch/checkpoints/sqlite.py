"""Finished work in a file, so that a killed run loses nothing."""

import contextlib
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpsearch.checkpoints.keys import Key, decode, encode, span
from mpsearch.checkpoints.memory import MemoryStore
from mpsearch.checkpoints.older import OLDER_TABLES, OLDER_VERSIONS, converted
from mpsearch.checkpoints.store import Store
from mpsearch.checkpoints.values import checksum
from mpsearch.errors import EstimatorError
from mpsearch.models.fingerprints import difference

#: Of the tables, the keys and the packed values.
VERSION = "4"
_VERSION_NAME = "checkpoint version"
#: Name -> the SQL that makes it, as SQLite keeps it.
_TABLES = {
    "identity": "CREATE TABLE identity (name TEXT PRIMARY KEY, value TEXT)",
    "result": "CREATE TABLE result (key TEXT PRIMARY KEY, value BLOB, checksum BLOB)",
}


class SQLiteStore(Store):
    """A file of finished work; each entry is durable once `put` returns, and carries a checksum.

    An SQLite database in write-ahead mode: a process killed at any moment leaves every finished `put` and nothing of
    an unfinished one. Several processes may have it open.

    Args:
        path: the file; made where it does not exist.
        identity: what the work depends on, compared by `fingerprints.difference`.

    Raises:
        EstimatorError: where the file is none of ours, damaged, of another version, or was written for something else; it names what
            differs.

    >>> import tempfile, os
    >>> from mpsearch.checkpoints.keys import CellKey
    >>> path = os.path.join(tempfile.mkdtemp(), "run.db")
    >>> with SQLiteStore(path, {"weights": "a"}) as store:
    ...     store.put(CellKey("kl", "0", "w4", 0), [1.0, 2.0])
    >>> with SQLiteStore(path, {"weights": "a"}) as store:
    ...     store.get(CellKey("kl", "0", "w4", 0)), store.get(CellKey("kl", "0", "w2", 0))
    ([1.0, 2.0], None)
    >>> SQLiteStore(path, {"weights": "b"})    # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mpsearch.errors.EstimatorError: ...run.db was written for other weights: it has a, this run has b; give another file
    """

    durable = True

    def __init__(self, path: str | Path, identity: Mapping[str, str]) -> None:
        self.name, self.identity = os.fspath(path), dict(identity)
        if not self.name or (Path(path).exists() and not Path(path).is_file()):
            raise EstimatorError(f"{self.name!r} cannot be opened: it is no file; give another name")
        try:
            self._file = sqlite3.connect(path, isolation_level=None)
        except sqlite3.Error as error:
            raise EstimatorError(f"{path} cannot be opened: {error}") from None
        try:
            with self._readable():
                self._open()
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def read(cls, path: str | Path, data: bytes, identity: Mapping[str, str]) -> MemoryStore:
        """What a closed file holds; of older versions what another search can go on from.

        Args:
            path: of the file, for messages.
            data: its content.
            identity: as for the file itself.

        Raises:
            EstimatorError: as for the file itself.
        """
        with cls(":memory:", {}) as store:
            store.name, store.identity = str(path), dict(identity)
            with store._readable():
                store._file.deserialize(data[:18] + b"\1\1" + data[20:])  # closed: its write-ahead log is empty
                version = store._version(store._schema())
                if version not in OLDER_VERSIONS:
                    store._open()
                    return MemoryStore(identity, store.rows(), name=store.name)
                stored = {name: text for name, text in store._stored_identity().items() if name != _VERSION_NAME}
                reason = difference(stored, identity)
                if reason is not None:
                    raise EstimatorError(f"{path} was written for {reason}; give another file")
                results = store._file.execute("SELECT * FROM result").fetchall()
        return MemoryStore(identity, converted(store, results, version), name=store.name)

    @classmethod
    def content(cls, store: Store) -> bytes:
        """The content of a file with all that another store holds."""
        with cls(":memory:", store.identity) as copy:
            copy.fill(store.rows())
            return copy._file.serialize()

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR")):
                raise EstimatorError(f"{self.name} cannot be written or read: {error}") from None
            raise EstimatorError(
                f"{self.name} is no checkpoint of mpsearch, or a damaged one: {error}; give another file"
            ) from None

    def _open(self) -> None:
        version = self._version(self._schema())
        if version not in (None, VERSION):
            raise EstimatorError(
                f"{self.name} is of version {version} of the checkpoints, this mpsearch goes on from version {VERSION}; "
                "give another file"
            )
        self._file.execute("PRAGMA journal_mode=WAL")
        self._file.execute("PRAGMA synchronous=FULL")
        with self._whole():
            for sql in _TABLES.values():
                self._file.execute(sql.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS"))
            stored, wanted = self._stored_identity(), {_VERSION_NAME: VERSION, **self.identity}
            reason = difference(stored, wanted) if stored else None
            if reason is not None:
                raise EstimatorError(f"{self.name} was written for {reason}; give another file")
            if not stored:
                self._file.executemany("INSERT INTO identity VALUES (?, ?)", wanted.items())

    def _schema(self) -> dict[str, str]:
        """Name -> SQL of all that the file holds; that of others, such as a view or a trigger, is never run."""
        self._file.execute("PRAGMA trusted_schema=OFF")
        tables = {}
        for kind, name, sql in self._file.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL"):
            if sql != _TABLES.get(name) and sql not in OLDER_TABLES.get(name, ()):
                raise EstimatorError(
                    f"{self.name} is a database with the {kind} {name!r} ({sql}), no checkpoint of mpsearch; "
                    "give another file"
                )
            tables[name] = sql
        return tables

    def _version(self, tables: Mapping[str, str]) -> str | None:
        """What the file says of itself; None for an empty file.

        Raises:
            EstimatorError: where its tables are those of another version.
        """
        version = self._stored_identity().get(_VERSION_NAME) if "identity" in tables else None
        shape = tables.get("result", _TABLES["result"])
        if (shape == _TABLES["result"]) == (version in OLDER_VERSIONS) and "result" in tables:
            raise EstimatorError(
                f"{self.name} is damaged: it says that it is of version {version} of the checkpoints, and its tables are of another "
                f"version; this mpsearch goes on from version {VERSION}; give another file"
            )
        return version

    def _stored_identity(self) -> dict[str, str]:
        return dict(self._file.execute("SELECT name, value FROM identity"))

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """All that is written inside, or nothing."""
        if self._file.in_transaction:  # of a write that was interrupted
            self._file.execute("ROLLBACK")
        self._file.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._file.execute("COMMIT")
        finally:
            if self._file.in_transaction:
                self._file.execute("ROLLBACK")

    def row(self, key: Key[Any]) -> bytes | None:
        """See `Store.row`."""
        text = encode(key)
        with self._readable():
            row = self._file.execute("SELECT value, checksum FROM result WHERE key = ?", (text,)).fetchone()
        return None if row is None else self._checked(text, *row)

    def rows(self, kind: type[Key[Any]] | None = None) -> dict[Key[Any], bytes]:
        """See `Store.rows`."""
        sql = "SELECT key, value, checksum FROM result"
        with self._readable():
            if kind is None:
                lines = self._file.execute(sql).fetchall()
            else:
                lines = self._file.execute(f"{sql} WHERE key >= ? AND key < ?", span(kind)).fetchall()
        return {self._key(row[0]): self._checked(*row) for row in lines}

    def _key(self, text: Any) -> Key[Any]:
        try:
            return decode(text)
        except (ValueError, TypeError):
            raise self.damaged(text, "has a key that cannot be read") from None

    def _checked(self, text: Any, value: Any, stored: Any) -> bytes:
        if isinstance(text, str) and isinstance(value, bytes) and stored == checksum(text, value):
            return value
        raise self.damaged(text, "does not fit its checksum")

    def fill(self, rows: Mapping[Key[Any], bytes]) -> None:
        """See `Store.fill`."""
        texts = {encode(key): value for key, value in rows.items()}
        lines = [(text, value, checksum(text, value)) for text, value in texts.items()]
        with self._readable(), self._whole():
            self._file.executemany("INSERT OR REPLACE INTO result VALUES (?, ?, ?)", lines)

    def delete(self, keys: Collection[Key[Any]]) -> None:
        """See `Store.delete`."""
        with self._readable(), self._whole():
            self._file.executemany("DELETE FROM result WHERE key = ?", [(encode(key),) for key in keys])

    def close(self) -> None:
        """See `Store.close`."""
        self._file.close()
