"""The contract of a store of finished work: what was put comes back bit for bit, whatever happens."""

import contextlib
import math
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from mpsearch.checkpoints.keys import (
    KINDS,
    BatchKey,
    CellKey,
    DeltaLossKey,
    FormulaKey,
    Key,
    PathKey,
    PlanKey,
    PlanRuns,
    ReferenceKey,
    ShiftIndex,
    ShiftIndexKey,
    ShiftKey,
    SweepKey,
    SweepState,
    TablesKey,
    TraceKey,
    TurnKey,
)
from mpsearch.checkpoints.store import Store
from mpsearch.checkpoints.values import pack, plain
from mpsearch.errors import EstimatorError

#: Opens the store in a folder for an identity: the same one each time where it is durable.
MakeStore = Callable[[Path, Mapping[str, str]], Store]
_IDENTITY = {"weights": "a", "data": "b"}
_KEY = CellKey("kl", "layer", "w4", 0)


def checkpoint_checks(
    make_store: MakeStore, *, set_version: Callable[[Path, str], object] | None = None
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a `Store` promises, as named checks that raise AssertionError with what was expected and what came.

    Args:
        make_store: opens the store in a folder. Each check has a folder of its own.
        set_version: gives the closed store in a folder another version; needed for a durable store.

    Yields:
        A name and a function without arguments.

    >>> from mpsearch.checkpoints.memory import MemoryStore
    >>> for name, check in checkpoint_checks(lambda folder, identity: MemoryStore(identity)):
    ...     check()
    """
    with tempfile.TemporaryDirectory() as folder, make_store(Path(folder), _IDENTITY) as store:
        durable = store.durable
    checks: dict[str, Callable[[Path], None]] = {
        **{f"round trip: {key.kind}": _round_trip(make_store, key, value) for key, value in _examples()},
        **{f"value: {name}": _round_trip(make_store, BatchKey("x", 0), value) for name, value in _VALUES.items()},
        "last put wins": lambda folder: _last_put(make_store, folder),
        "unknown key": lambda folder: _unknown(make_store, folder),
        "delete": lambda folder: _delete(make_store, folder),
        "items by kind": lambda folder: _by_kind(make_store, folder),
        "passes of an entry": lambda folder: _passes(make_store, folder),
        "rows fill another store": lambda folder: _filled(make_store, folder),
        "another identity is refused": lambda folder: _identity(make_store, folder),
        "values of another type are refused": lambda folder: _other_type(make_store, folder),
        "what is handed out is a copy": lambda folder: _copied(make_store, folder),
        "an interrupted put leaves the old value": lambda folder: _interrupted(make_store, folder),
    }
    if durable:
        assert set_version is not None, "a durable store has a version: set_version is needed"
        change = set_version
        checks |= {
            "opened again": lambda folder: _reopened(make_store, folder),
            "opened for another identity": lambda folder: _reopened_for_another(make_store, folder),
            "read while it is written": lambda folder: _read_beside(make_store, folder),
            "a damaged entry is told": lambda folder: _damaged(make_store, folder),
            "another version is refused": lambda folder: _other_version(make_store, change, folder),
        }
    for name, check in checks.items():
        yield name, _in_a_folder(check)


def _in_a_folder(check: Callable[[Path], None]) -> Callable[[], None]:
    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            check(Path(folder))

    return run


def _examples() -> list[tuple[Key[Any], Any]]:
    """A key of each kind with a value."""
    numbers = torch.tensor([0.1, -0.0, math.nan, 1e-310], dtype=torch.float64)
    examples: list[tuple[Key[Any], Any]] = [
        (BatchKey("own(seed=1)", 3, "square"), {"sums": numbers}),
        (CellKey("0af1", "head.0", "w4a8g32", 2), [3.0, 0.1, 0.2]),
        (DeltaLossKey("w2", 0), [0.1, -0.2]),
        (FormulaKey("abs(weight) + log(x)"), [[0.1], []]),
        (PathKey(4, "w2", 1), [0.1, 0.2]),
        (PlanKey("select", ("w4", "w2", "w4a8")), PlanRuns(numbers, numbers + 1, [1, 2], True)),
        (ReferenceKey("0af1"), torch.ones(2, 3)),
        (ShiftIndexKey(), ShiftIndex(["0af1"], False)),
        (ShiftKey("0af1", 2, "w4"), torch.ones(2, 3)),
        (SweepKey("0af1", 12), SweepState(2, [{"sums": numbers}, None])),
        (TablesKey("0af1"), 1.25),
        (TraceKey("0af1", 1), ([0.1, 0.2], [0.3, math.inf])),
        (TurnKey(0), True),
    ]
    assert {key.kind for key, _ in examples} == KINDS.keys(), "each kind of key needs an example"
    return examples


_VALUES: dict[str, Any] = {
    "numbers": [0, -1, 10**30, 0.1, -0.0, math.inf, -math.inf, math.nan, 5e-324, True, None],
    "text": ["", "a | b", "\n\0\x1b", "größer ∞", "\ud800", '["plan"]'],
    "structure": {"a": (1, [2, (), []]), 3: {}, ("b", 4): None, "tensor": ["float32"]},
    "bytes": {"a": b"\0\xff", "b": b""},
    "tensors": [
        torch.arange(6).reshape(2, 3).to(dtype)
        for dtype in (torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32)
    ],
    "complex tensors": torch.tensor([1 + 2j, complex(math.nan, -0.0)]),
    "a transposed tensor": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
    "a strided tensor": torch.arange(24.0)[::3],
    "an expanded tensor": torch.ones(1, 3).expand(4, 3),
    "empty tensors": [torch.zeros(0), torch.zeros(2, 0, 3), torch.tensor(1.5)],
    "arrays": [np.arange(6, dtype=np.int16).reshape(2, 3), np.array([np.nan, -0.0]), np.zeros((0, 2), bool)],
}


def same(first: Any, second: Any) -> bool:
    """Equal to the last bit: types, signs of zero, bits of nan, shapes.

    >>> same([0.0], [0.0]), same([0.0], [-0.0]), same(1, 1.0)
    (True, False, False)
    """
    return type(plain(first)) is type(plain(second)) and pack(plain(first)) == pack(plain(second))


def _round_trip(make_store: MakeStore, key: Key[Any], value: Any) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        with make_store(folder, _IDENTITY) as store:
            store.put(key, value)
            stored: Any = store.get(key)
            assert type(stored) is type(value), f"{key}: put a {type(value).__name__}, got a {type(stored).__name__}"
            if isinstance(value, torch.Tensor):
                assert stored.dtype == value.dtype, f"{key}: put {value.dtype}, got {stored.dtype}"
                assert torch.equal(stored.nan_to_num(), value.nan_to_num()), f"{key}: put {value}, got {stored}"
            assert same(stored, value), f"{key}: put {value}, got {stored}"

    return check


def _last_put(make_store: MakeStore, folder: Path) -> None:
    with make_store(folder, _IDENTITY) as store:
        for number in range(3):
            store.put(_KEY, [float(number)])
        stored = store.get(_KEY)
        assert stored == [2.0], f"put 0, 1, 2 under one key: expected [2.0], got {stored}"
        assert len(store.rows()) == 1, f"one key, but {len(store.rows())} rows"


def _unknown(make_store: MakeStore, folder: Path) -> None:
    with make_store(folder, _IDENTITY) as store:
        store.put(_KEY, [1.0])
        for key in (CellKey("kl", "layer", "w4", 1), CellKey("kl", "layer w4", "", 0), TurnKey(0)):
            assert store.get(key) is None, f"nothing was put under {key}, got {store.get(key)}"
            assert store.entry(key) is None, f"nothing was put under {key}, got {store.entry(key)}"


def _delete(make_store: MakeStore, folder: Path) -> None:
    with make_store(folder, _IDENTITY) as store:
        store.put(_KEY, [1.0])
        store.put(TurnKey(0), True)
        store.delete([_KEY, TurnKey(5)])
        assert store.get(_KEY) is None, f"{_KEY} was deleted, got {store.get(_KEY)}"
        assert store.get(TurnKey(0)) is True, "another key was deleted too"


def _by_kind(make_store: MakeStore, folder: Path) -> None:
    examples = _examples()
    with make_store(folder, _IDENTITY) as store:
        for key, value in examples:
            store.put(key, value)
        for key, value in examples:
            items = list(store.items(type(key)))
            assert [item for item, _ in items] == [key], f"put one {key.kind!r}, got {[item for item, _ in items]}"
            assert same(items[0][1], value), f"{key}: put {value}, got {items[0][1]}"
        assert store.rows().keys() == {key for key, _ in examples}, f"other keys than put: {list(store.rows())}"


def _passes(make_store: MakeStore, folder: Path) -> None:
    passes = {_KEY: (0.1, 2.0), TurnKey(0): (1.0, 0.0)}
    with make_store(folder, _IDENTITY) as store:
        store.put(_KEY, [1.0], passes)
        entry = store.entry(_KEY)
        assert entry is not None, "the entry is gone"
        assert entry.passes == passes, f"expected {passes}, got {entry.passes}"


def _filled(make_store: MakeStore, folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    with make_store(folder / "a", _IDENTITY) as store, make_store(folder / "b", _IDENTITY) as other:
        for key, value in _examples():
            store.put(key, value, {key: (1.0, 0.0)})
        other.put(_KEY, [5.0])
        other.fill(store.rows())
        assert other.rows() == {**store.rows(), _KEY: other.row(_KEY)}, "rows differ from those that were filled in"
        for key, value in _examples():
            assert same(other.get(key), value), f"{key}: put {value}, got {other.get(key)}"


def _identity(make_store: MakeStore, folder: Path) -> None:
    with make_store(folder, _IDENTITY) as store:
        assert dict(store.identity) == _IDENTITY, f"made for {_IDENTITY}, says {dict(store.identity)}"
        store.check(_IDENTITY)
        with _refused("other data: it has b, this run has c"):
            store.check({**_IDENTITY, "data": "c"})


def _other_type(make_store: MakeStore, folder: Path) -> None:
    wrong: list[tuple[Key[Any], Any]] = [
        (_KEY, [1.0, "2"]),
        (_KEY, (1.0,)),
        (BatchKey("x", 0), {1: object()}),
        (BatchKey("x", 0), np.array(["a", None], dtype=object)),
        (PlanKey("select", ("w4",)), {"sums": torch.zeros(2)}),
    ]
    with make_store(folder, _IDENTITY) as store:
        store.put(_KEY, [5.0])
        for key, value in wrong:
            before = store.row(key)
            try:
                store.put(key, value)
            except TypeError:
                assert store.row(key) == before, f"{key}: {value!r} was refused, and the value before is gone"
            else:
                raise AssertionError(f"{key}: {value!r} was stored, expected a TypeError")


def _copied(make_store: MakeStore, folder: Path) -> None:
    value = torch.zeros(3)
    with make_store(folder, _IDENTITY) as store:
        store.put(ReferenceKey("x"), value)
        value += 1
        first = store.get(ReferenceKey("x"))
        assert first is not None, "the value is gone"
        first += 1
        second = store.get(ReferenceKey("x"))
        assert second is not None, "the value is gone"
        assert second.tolist() == [0.0] * 3, f"zeros were put and later changed outside: expected zeros, got {second}"


def _interrupted(make_store: MakeStore, folder: Path) -> None:
    """Stopped at every line of the store in turn, as by Ctrl-C."""
    old, new = [1.0] * 3, [2.0] * 3
    with make_store(folder, _IDENTITY) as store:
        modules = {part.__module__ for part in type(store).__mro__}
        for line in range(100_000):
            store.put(_KEY, old)
            if not _stopped(lambda: store.put(_KEY, new), line, modules):
                assert store.get(_KEY) == new, f"put {new}, got {store.get(_KEY)}"
                return
            stored = store.get(_KEY)
            assert stored in (old, new), f"a put of {new} over {old} was interrupted: got {stored}"


def _stopped(action: Callable[[], None], line: int, modules: Set[str]) -> bool:
    """Run an action, interrupted before a line of some modules; False where it has fewer lines."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        if frame.f_globals.get("__name__") not in modules:
            return None
        if event == "line":
            if count == line:
                count = -(10**9)  # once
                raise KeyboardInterrupt
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def _reopened(make_store: MakeStore, folder: Path) -> None:
    with make_store(folder, _IDENTITY) as store:
        for key, value in _examples():
            store.put(key, value)
    with make_store(folder, _IDENTITY) as store:
        for key, value in _examples():
            assert same(store.get(key), value), f"{key}: put {value}, got {store.get(key)} after opening again"
        store.put(_KEY, [9.0])
    with make_store(folder, _IDENTITY) as store:
        assert store.get(_KEY) == [9.0], f"put [9.0], got {store.get(_KEY)} after opening again"


def _reopened_for_another(make_store: MakeStore, folder: Path) -> None:
    with make_store(folder, _IDENTITY) as store:
        store.put(_KEY, [1.0])
    with _refused("other weights: it has a, this run has c"):
        make_store(folder, {**_IDENTITY, "weights": "c"}).close()
    with make_store(folder, _IDENTITY) as store:
        assert store.get(_KEY) == [1.0], f"refused for another run, and then {store.get(_KEY)} in place of [1.0]"


def _read_beside(make_store: MakeStore, folder: Path) -> None:
    first, last, errors = 0.0, 30.0, list[BaseException]()
    make_store(folder, _IDENTITY).close()

    def write() -> None:
        try:
            with make_store(folder, _IDENTITY) as writer:
                for number in range(int(last) + 1):
                    writer.put(_KEY, [float(number)] * 1000)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=write)
    with make_store(folder, _IDENTITY) as reader:
        thread.start()
        while thread.is_alive():
            stored = reader.get(_KEY)
            if stored is not None:
                assert len(stored) == 1000, f"half a value: {len(stored)} numbers of 1000"
                assert set(stored) == {stored[0]}, f"numbers of several puts in one value: {set(stored)}"
                assert stored[0] >= first, f"an older value, {stored[0]}, after a newer one, {first}"
                first = stored[0]
        thread.join()
        assert not errors, f"writing failed while another one read: {errors}"
        assert reader.get(_KEY) == [last] * 1000, "the last put is not seen"


def _damaged(make_store: MakeStore, folder: Path) -> None:
    marker = b"0123456789abcdef" * 4
    key = BatchKey("x", 0)
    with make_store(folder, _IDENTITY) as store:
        store.put(key, marker)
        store.put(_KEY, [1.0])
    changed = []
    for path in (path for path in folder.rglob("*") if path.is_file()):
        data = path.read_bytes()
        if marker in data:
            path.write_bytes(data.replace(marker, marker[:-1] + b"g"))
            changed.append(path)
    assert changed, "the bytes of a value are in none of the files"
    try:
        with make_store(folder, _IDENTITY) as store:
            stored = store.get(key)
    except EstimatorError as error:
        message = str(error)
        assert any(str(path) in message for path in changed), f"the message does not name the file: {message}"
        assert "\n" not in message, f"more than one line: {message}"
    else:
        assert stored is None, f"a byte was changed on the disk, and {stored!r} came back"


def _other_version(make_store: MakeStore, set_version: Callable[[Path, str], object], folder: Path) -> None:
    with make_store(folder, _IDENTITY) as store:
        store.put(_KEY, [1.0])
    set_version(folder, "987")
    with _refused("987"):
        make_store(folder, _IDENTITY).close()


@contextlib.contextmanager
def _refused(words: str) -> Iterator[None]:
    message = None
    try:
        yield
    except EstimatorError as error:
        message = str(error)
    assert message is not None, f"accepted, expected an EstimatorError with {words!r}"
    assert words in message, f"refused without the words {words!r}: {message}"
    assert "\n" not in message, f"more than one line: {message}"
