"""What files of older versions held of a search, for results that were saved then.

Their keys were sentences and their values what `torch.save` makes. Measured plans and shifts of the output are read; other work was
known by code that has changed since, so no run would ask for it.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from mpsearch.checkpoints.keys import Key, PlanKey, PlanRuns, ReferenceKey, ShiftIndex, ShiftIndexKey, ShiftKey
from mpsearch.checkpoints.memory import MemoryStore
from mpsearch.checkpoints.store import Store
from mpsearch.checkpoints.values import checksum

OLDER_VERSIONS = ("2", "3")
#: Name -> the SQL that made it, in the versions before.
OLDER_TABLES = {
    "result": (
        "CREATE TABLE result (name TEXT PRIMARY KEY, value BLOB)",
        "CREATE TABLE result (name TEXT PRIMARY KEY, value BLOB, checksum BLOB)",
    ),
}
_PLAN = re.compile(r"plan \| (\w+) \| (.*)")
_REFERENCE = re.compile(r"logit shift \| (\w+)")
_SHIFT = re.compile(r"logit shift \| (\w+) \| (\d+) (\S+)")
_INDEX, _SQUARES = "logit shift | index", "logit shift | squares"


def converted(store: Store, rows: Sequence[tuple[Any, ...]], version: str | None) -> dict[Key[Any], bytes]:
    """Packed entries of today from named results of an older version.

    Args:
        store: they came from; tells of damage.
        rows: name, and what `torch.save` made of the value; in version 3 of the value and the passes that it took, and a checksum.
        version: one of `OLDER_VERSIONS`.

    Raises:
        EstimatorError: where a result is damaged.
    """
    results: dict[str, bytes] = {}
    for name, data, *sums in rows:
        if not isinstance(name, str) or not isinstance(data, bytes) or sums not in ([], [checksum(name, data)]):
            raise store.damaged(name, "does not fit its checksum")
        results[name] = data

    def value(name: str) -> Any:
        loaded = torch.load(io.BytesIO(results[name]), weights_only=True)
        return loaded if version == "2" else loaded[0]

    copy = MemoryStore({})
    for name in results:
        try:
            for key, content in _entries(name, value, results):
                copy.put(key, content)
        except Exception as error:  # of unpickling, which raises everything
            raise store.damaged(name, f"cannot be read ({type(error).__name__})") from None
    return copy.rows()


def _entries(name: str, value: Callable[[str], Any], names: Mapping[str, bytes]) -> Iterator[tuple[Key[Any], Any]]:
    if match := _PLAN.fullmatch(name):
        yield PlanKey(match[1], tuple(match[2].split())), PlanRuns(**value(name))
    elif name == _INDEX:
        yield ShiftIndexKey(), ShiftIndex(list(value(name)), bool(_SQUARES in names and value(_SQUARES)))
    elif name != _SQUARES and (match := _REFERENCE.fullmatch(name)):
        yield ReferenceKey(match[1]), value(name)
    elif match := _SHIFT.fullmatch(name):
        yield ShiftKey(match[1], int(match[2]), match[3]), value(name)
