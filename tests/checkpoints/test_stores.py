"""The contract of stores, over both of them; and stores that break it."""

import contextlib
import dataclasses
import sqlite3
import struct
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mpsearch.checkpoints.keys import KINDS, CellKey, Key, decode, encode, span
from mpsearch.checkpoints.memory import MemoryStore, NoStore
from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.checkpoints.store import Store
from mpsearch.checkpoints.values import pack, typed, unpack
from mpsearch.testing.checkpoints import checkpoint_checks, same

Identity = Mapping[str, str]


def in_memory(_folder: Path, identity: Identity) -> Store:
    return MemoryStore(identity)


def in_a_file(folder: Path, identity: Identity) -> Store:
    return SQLiteStore(folder / "run.db", identity)


def set_version(folder: Path, version: str) -> None:
    file = sqlite3.connect(folder / "run.db")
    with file:
        file.execute("UPDATE identity SET value = ? WHERE name = 'checkpoint version'", (version,))
    file.close()


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=f"{kind}: {name}")
        for kind, make in (("memory", in_memory), ("file", in_a_file))
        for name, check in checkpoint_checks(make, set_version=set_version)
    ],
)
def test_the_contract(check: Callable[[], None]) -> None:
    check()


class Forgets(MemoryStore):
    """Loses the third row."""

    def fill(self, rows: Mapping[Key[Any], bytes]) -> None:
        super().fill({key: row for key, row in rows.items() if len(self.rows()) != 2})


class First(MemoryStore):
    """What was put first stays."""

    def fill(self, rows: Mapping[Key[Any], bytes]) -> None:
        super().fill({key: row for key, row in rows.items() if self.row(key) is None})


class Torn(MemoryStore):
    """Removes the old value before it has the new one."""

    def put(self, key: Key[Any], value: Any, passes: Any = None) -> None:
        self.delete([key])
        super().put(key, value, passes)


class Trusting(MemoryStore):
    """Serves every run."""

    def check(self, identity: Identity) -> None:
        pass


class Unchecked(SQLiteStore):
    """Hands out what the file holds."""

    def _checked(self, text: Any, value: Any, stored: Any) -> bytes:
        assert isinstance(value, bytes)
        return value


class Late(SQLiteStore):
    """Writes when it is closed."""

    def fill(self, rows: Mapping[Key[Any], bytes]) -> None:
        self.waiting = {**getattr(self, "waiting", {}), **rows}

    def row(self, key: Key[Any]) -> bytes | None:
        return getattr(self, "waiting", {}).get(key) or super().row(key)

    def rows(self, kind: type[Key[Any]] | None = None) -> dict[Key[Any], bytes]:
        waiting = {key: row for key, row in getattr(self, "waiting", {}).items() if kind in (None, type(key))}
        return {**super().rows(kind), **waiting}


BROKEN = {
    "Forgets": (lambda folder, identity: Forgets(identity), "items by kind"),
    "First": (lambda folder, identity: First(identity), "last put wins"),
    "Torn": (lambda folder, identity: Torn(identity), "an interrupted put leaves the old value"),
    "Trusting": (lambda folder, identity: Trusting(identity), "another identity is refused"),
    "Unchecked": (lambda folder, identity: Unchecked(folder / "run.db", identity), "a damaged entry is told"),
    "Late": (lambda folder, identity: Late(folder / "run.db", identity), "opened again"),
    "NoStore": (lambda folder, identity: NoStore(), "round trip: plan"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_store_that_breaks_the_contract_is_told(name: str) -> None:
    make, broken = BROKEN[name]
    check = dict(checkpoint_checks(make, set_version=set_version))[broken]
    with pytest.raises(AssertionError):
        check()


# ------------------------------------------------------------------------------------------------ keys and values


def keys_of(kind: type[Key[Any]]) -> st.SearchStrategy[Key[Any]]:
    text = st.text(st.characters(exclude_categories=()), max_size=8)
    fields = {str: text, int: st.integers(), tuple[str, ...]: st.lists(text, max_size=3).map(tuple)}
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: fields[hints[field.name]] for field in dataclasses.fields(kind)})


KEYS = st.one_of(*map(keys_of, KINDS.values()))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(KEYS, KEYS)
def test_keys_are_written_and_read_back(first: Key[Any], second: Key[Any]) -> None:
    assert decode(encode(first)) == first
    assert (encode(first) == encode(second)) == (first == second)
    assert encode(first).isascii()
    for kind in KINDS.values():
        low, high = span(kind)
        assert (low <= encode(first) < high) == (type(first) is kind)


@pytest.mark.parametrize(
    "text",
    [
        "", "plan", "[]", '["plan"]', '["plan", "select", ["w4"]]', '["plan","select","w4"]', '["plan","select",[4]]',
        '["turn","0"]', '["turn",true]', '["turn",0.0]', '["turn",0,0]', '["birds",0]', '{"turn":0}', "[" * 100_000,
        '[["turn"],0]', '["turn",[0]]', "plan | select | w4 w2",
    ],
)  # fmt: skip
def test_other_text_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match="is no key of finished work"):
        decode(text)


def test_kinds_are_named_once_and_say_what_is_stored() -> None:
    for name, kind in KINDS.items():
        assert kind.kind == name
        assert typing.get_args(kind.__orig_bases__[0]) == (kind.value,)  # type: ignore[attr-defined]


NUMBERS = arrays.arrays(
    st.sampled_from(["u1", "i2", "i4", "i8", "f2", "f4", "f8", "?", "c16"]), arrays.array_shapes(min_dims=0, min_side=0)
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | NUMBERS
    | NUMBERS.map(torch.tensor),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(VALUES)
def test_values_are_packed_and_unpacked_bit_for_bit(value: Any) -> None:
    assert same(unpack(pack(value)), value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(VALUES, st.data())
def test_damaged_values_are_refused_or_read_but_never_run_wild(value: Any, data: st.DataObject) -> None:
    packed = bytearray(pack([value, torch.ones(2), 1.5]))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        unpack(bytes(packed[: data.draw(st.sampled_from([len(packed), len(packed) // 2]))]))


def test_numbers_that_json_does_not_have_keep_their_bits() -> None:
    for bits in ("7ff8000000000001", "fff8000000000000", "7ff0000000000000", "8000000000000000"):
        (value,) = struct.unpack(">d", bytes.fromhex(bits))
        assert struct.pack(">d", unpack(pack([value]))[0]).hex() == bits


def test_a_device_that_is_not_there_is_told() -> None:
    packed = pack(torch.ones(3)).replace(b'"cpu"', b'"hpu"')
    with pytest.raises(ValueError, match="belong on 'hpu', which this machine does not have"):
        unpack(packed)


def test_steps_between_numbers_come_back() -> None:
    """Sums over a tensor take the same order, and so give the same bits."""
    value = torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)
    assert unpack(pack(value)).stride() == value.stride()


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        ([1.0, "a"], list[float], r"\$\[1\] is 'a', expected a float"),
        ((1.0,), tuple[float, float], r"\$ is a tuple, expected a tuple\[float, float\]"),
        (True, int, r"\$ is 'True', expected a int"),
        ({"rows": ["a"], "squares": 1}, KINDS["shift index"].value, r"\$\.squares is '1', expected a bool"),
        ({"rows": ["a"]}, KINDS["shift index"].value, r"\$ is a dict, expected a ShiftIndex"),
    ],
)
def test_another_type_is_told_with_the_place(value: Any, kind: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        typed(value, kind)


def test_a_row_of_another_type_is_damage(tmp_path: Path) -> None:
    """As a file made by hand may have it, its checksum in order."""
    key = CellKey("kl", "0", "w4", 0)
    with SQLiteStore(tmp_path / "run.db", {}) as store:
        store.fill({key: pack((["a"], {}))})
        with pytest.raises(Exception, match=r"run\.db is damaged: .*cell.* cannot be read .*expected a float"):
            store.get(key)
