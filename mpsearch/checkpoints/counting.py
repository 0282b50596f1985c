"""A store for one run that knows what each entry cost."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from mpsearch.checkpoints.keys import Key
from mpsearch.checkpoints.store import Passes, Store

V = TypeVar("V")


class CountingStore(Store):
    """Stores with each value the passes that it took, and adds up those of the values that it hands out.

    Passes since the `put` before belong to the next one. Values that are stored with no pass between them come of the same work,
    which counts once.

    Args:
        store: where entries really go.
        passes: of this run so far, forward and backward.

    >>> from mpsearch.checkpoints.keys import CellKey
    >>> from mpsearch.checkpoints.memory import MemoryStore
    >>> kl, mse = CellKey("kl", "0", "w4", 0), CellKey("mse", "0", "w4", 0)
    >>> run, store = [0.0, 0.0], MemoryStore({})
    >>> first = CountingStore(store, lambda: (run[0], run[1]))
    >>> run[0] = 3.0
    >>> first.put(kl, [0.1])
    >>> first.put(mse, [0.2])          # of the same run of the model
    >>> second = CountingStore(store, lambda: (0.0, 0.0))
    >>> second.get(kl), second.get(mse), second.earlier
    ([0.1], [0.2], (3.0, 0.0))
    """

    durable = False

    def __init__(self, store: Store, passes: Callable[[], tuple[float, float]]) -> None:
        self.name, self.identity = store.name, store.identity
        self._store, self._passes = store, passes
        self._counted = passes()
        self._known: dict[Key[Any], Passes] = {}  # of each entry that was handed out or put
        self._own: set[Key[Any]] = set()  # put in this run
        self._handed_out: Passes = {}
        self._last: Passes = {}
        self._deleted: Passes = {}

    @property
    def earlier(self) -> tuple[float, float]:
        """Passes, forward and backward, that earlier runs took for what this one was handed."""
        if not self._handed_out:
            return 0.0, 0.0
        forward, backward = map(sum, zip(*self._handed_out.values(), strict=True))
        return forward, backward

    def get(self, key: Key[V]) -> V | None:
        """See `Store.get`."""
        entry = self._store.entry(key)
        if entry is None:
            return None
        if key not in self._own:
            self._known[key] = entry.passes
            self._handed_out = _joined(self._handed_out, entry.passes)
        return entry.value

    def put(self, key: Key[V], value: V, passes: Passes | None = None) -> None:
        """See `Store.put`; the passes are those since the `put` before."""
        now, before = self._passes(), self._known.get(key, {})
        if now != self._counted:
            forward, backward = before.get(key, (0.0, 0.0))
            self._last = {key: (forward + now[0] - self._counted[0], backward + now[1] - self._counted[1])}
            self._counted = now
        self._known[key] = _joined(_joined(before, self._last), self._deleted)
        self._deleted = {}
        self._own.add(key)
        self._store.put(key, value, self._known[key])

    def delete(self, keys: Collection[Key[Any]]) -> None:
        """See `Store.delete`; their passes go to the next `put`."""
        for key in keys:
            self._deleted = _joined(self._deleted, self._known.pop(key, {}))
        self._store.delete(keys)

    def row(self, key: Key[Any]) -> bytes | None:
        """See `Store.row`; it does not count as handed out."""
        return self._store.row(key)

    def rows(self, kind: type[Key[Any]] | None = None) -> dict[Key[Any], bytes]:
        """See `Store.rows`; they do not count as handed out."""
        return self._store.rows(kind)

    def fill(self, rows: Mapping[Key[Any], bytes]) -> None:
        """See `Store.fill`."""
        self._store.fill(rows)

    def close(self) -> None:
        """See `Store.close`."""
        self._store.close()


def _joined(first: Passes, second: Passes) -> Passes:
    """Passes of all works, each counted once: what is known of it last is the most."""
    return {key: max(first.get(key, (0.0, 0.0)), second.get(key, (0.0, 0.0))) for key in (*first, *second)}
