"""Stores without a file."""

from collections.abc import Collection, Mapping
from typing import Any

from mpsearch.checkpoints.keys import Key
from mpsearch.checkpoints.store import Store


class MemoryStore(Store):
    """Finished work for as long as the process runs.

    Args:
        identity: what the work depends on.
        rows: packed entries to begin with (`Store.rows`).
        name: what messages call it.

    >>> from mpsearch.checkpoints.keys import CellKey
    >>> store = MemoryStore({"weights": "a"})
    >>> store.put(CellKey("kl", "0", "w4", 0), [1.0, 2.0])
    >>> store.get(CellKey("kl", "0", "w4", 0)), store.get(CellKey("kl", "0", "w2", 0))
    ([1.0, 2.0], None)
    """

    durable = False

    def __init__(
        self, identity: Mapping[str, str], rows: Mapping[Key[Any], bytes] | None = None, *, name: str = "this store"
    ) -> None:
        self.name, self.identity = name, dict(identity)
        self._rows = dict(rows or {})

    def row(self, key: Key[Any]) -> bytes | None:
        """See `Store.row`."""
        return self._rows.get(key)

    def rows(self, kind: type[Key[Any]] | None = None) -> dict[Key[Any], bytes]:
        """See `Store.rows`."""
        return {key: row for key, row in self._rows.items() if kind is None or type(key) is kind}

    def fill(self, rows: Mapping[Key[Any], bytes]) -> None:
        """See `Store.fill`."""
        self._rows |= rows

    def delete(self, keys: Collection[Key[Any]]) -> None:
        """See `Store.delete`."""
        for key in keys:
            self._rows.pop(key, None)

    def close(self) -> None:
        """No file is open."""


class NoStore(Store):
    """Takes work and has none: for runs without a checkpoint.

    >>> from mpsearch.checkpoints.keys import TurnKey
    >>> store = NoStore()
    >>> store.put(TurnKey(0), True)
    >>> print(store.get(TurnKey(0)))
    None
    """

    durable = False

    def __init__(self) -> None:
        self.name, self.identity = "no store", {}

    def put(self, key: Key[Any], value: Any, passes: Mapping[Key[Any], tuple[float, float]] | None = None) -> None:
        """Forget the value, unpacked."""

    def row(self, key: Key[Any]) -> bytes | None:
        """None, always."""
        return None

    def rows(self, kind: type[Key[Any]] | None = None) -> dict[Key[Any], bytes]:
        """Empty, always."""
        return {}

    def fill(self, rows: Mapping[Key[Any], bytes]) -> None:
        """Forget the rows."""

    def delete(self, keys: Collection[Key[Any]]) -> None:
        """There is nothing to remove."""

    def close(self) -> None:
        """No file is open."""
