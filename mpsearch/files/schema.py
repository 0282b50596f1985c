"""JSON of files: read whole, and held against the shape that it should have, with the place of what is not.

The one reader of JSON, on own code: msgspec 0.23 takes the last of two equal keys, lets unknown keys of a `TypedDict` pass, and names
no key in its places (`$[...]` for `$['conv1']`); cattrs starts from content that is parsed already. What they would take over is the
recursion of `_checked`.
"""

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from mpsearch.errors import FileError, nearest

#: Mark of an object that may have further keys: `Annotated[Keys, OPEN]`.
OPEN = "open"
#: Objects and lists one in another, at most; writing and showing them recurses.
_DEEPEST = 100
_WORDS = {str: "text", float: "a number", int: "a whole number", bool: "true or false", type(None): "null"}

_T = TypeVar("_T")


def parse_json(data: str | bytes) -> Any:
    """What JSON text holds; every key once.

    Raises:
        FileError: for anything else, with the place; also for more than 100 levels of nesting, and half characters.

    >>> parse_json('{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> parse_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    mpsearch.errors.FileError: the key 'a' occurs twice
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        content = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise FileError(f"not JSON (byte {error.start} is not UTF-8 text)") from None
    except FileError:
        raise
    except ValueError as error:  # also of a number with thousands of digits
        raise FileError(f"not JSON ({error})") from None
    except RecursionError:
        raise FileError(f"objects and lists nested in more than {_DEEPEST} levels") from None
    _check_depth(content)
    if "\\u" in text:
        try:
            json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise FileError(r"half of a character (\ud800 to \udfff)") from None
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise FileError(f"the key {key!r} occurs twice")
        content[key] = value
    return content


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(_DEEPEST):
        level = [
            part
            for value in level
            if isinstance(value, dict | list)
            for part in (value.values() if isinstance(value, dict) else value)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise FileError(f"objects and lists nested in more than {_DEEPEST} levels")


def read_json(data: str | bytes, shape: type[_T], *, version: str, known: Sequence[int]) -> _T:
    """A file of one of mpsearch's own formats: JSON, of a version that this mpsearch reads, with the shape of that format.

    Args:
        data: content of the file.
        shape: as for `checked`; an object.
        version: key that holds the version, by which the format is known.
        known: versions that are read.

    Raises:
        FileError: for anything else, with the place.

    >>> class File(typing.TypedDict):
    ...     mpsearch_plan: int
    >>> read_json('{"mpsearch_plan": 2}', File, version="mpsearch_plan", known=(1, 2))
    {'mpsearch_plan': 2}
    >>> read_json('{"mpsearch_plan": 3}', File, version="mpsearch_plan", known=(1, 2))
    Traceback (most recent call last):
    mpsearch.errors.FileError: version 3 of 'mpsearch_plan', this mpsearch reads 1 and 2
    """
    content = parse_json(data)
    if not isinstance(content, dict) or version not in content:
        raise FileError(f"no {version.replace('_', ' ')}: the key {version!r} is missing")
    number = content[version]
    if type(number) is not int or number not in known:
        raise FileError(f"version {number!r} of {version!r}, this mpsearch reads {' and '.join(map(str, known))}")
    return checked(content, shape)


@typing.overload
def checked(value: Any, shape: type[_T], place: str = "$") -> _T: ...


@typing.overload
def checked(value: Any, shape: Any, place: str = "$") -> Any: ...


def checked(value: Any, shape: Any, place: str = "$") -> Any:
    """A value of JSON, held against a shape.

    Args:
        value: what `parse_json` returned, or a part of it.
        shape: `str`, `int`, `float` (also a whole number), `bool`, `Any`, `X | None`, `list[X]`, `dict[str, X]`, `tuple[X, Y]` (a list of
            so many), a `TypedDict` (its keys and no others, but for `Annotated[Keys, OPEN]`), or a dataclass, which is made; null stands
            for nan in its fields of type `float`.
        place: of the value, for the message.

    Returns:
        The value.

    Raises:
        FileError: with the place, what is expected there, and what is there.

    >>> checked({"a": [1, 2.5]}, dict[str, list[float]])
    {'a': [1, 2.5]}
    >>> checked({"a": [1, "x"]}, dict[str, list[float]])
    Traceback (most recent call last):
    mpsearch.errors.FileError: expected a number at $['a'][1], got 'x'
    """
    return _checked(value, shape, place)


def _checked(value: Any, shape: Any, place: str) -> Any:
    origin, arguments = typing.get_origin(shape), typing.get_args(shape)
    if shape is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(value, shape, arguments, place)
    if origin is Annotated:
        return _keys(value, arguments[0], place, closed=OPEN not in arguments[1:])
    if typing.is_typeddict(shape):
        return _keys(value, shape, place, closed=True)
    if dataclasses.is_dataclass(shape):
        return _instance(value, shape, place)
    if origin is list or origin is tuple:
        kinds = arguments if origin is tuple else arguments * (len(value) if isinstance(value, list) else 0)
        if not isinstance(value, list) or len(value) != len(kinds):
            raise _unexpected(value, shape, place)
        return [_checked(part, kind, f"{place}[{i}]") for i, (part, kind) in enumerate(zip(value, kinds, strict=True))]
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise _unexpected(value, shape, place)
        return {key: _checked(part, arguments[1], f"{place}[{key!r}]") for key, part in value.items()}
    if not _fits(value, shape):
        raise _unexpected(value, shape, place)
    return value


def _fits(value: Any, shape: Any) -> bool:
    if shape is not float:
        return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1023)


def _one_of(value: Any, shape: Any, kinds: tuple[Any, ...], place: str) -> Any:
    for kind in kinds:
        try:
            return _checked(value, kind, place)
        except FileError as error:
            deeper = error
            if isinstance(value, dict) and (typing.is_typeddict(kind) or dataclasses.is_dataclass(kind)):
                raise deeper from None
    raise _unexpected(value, shape, place)


def _keys(value: Any, shape: Any, place: str, *, closed: bool) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unexpected(value, shape, place)
    hints = _hints(shape)
    for key in value:
        if closed and key not in hints:
            raise FileError(f"unknown key {key!r}{_below(place)}{nearest(key, hints)}")
    for key in hints:
        if key in shape.__required_keys__ and key not in value:
            raise FileError(f"the key {key!r} is missing{_below(place)}")
    return {key: _checked(part, hints.get(key, Any), f"{place}.{key}") for key, part in value.items()}


def _instance(value: Any, shape: Any, place: str) -> Any:
    if not isinstance(value, dict):
        raise _unexpected(value, shape, place)
    hints = {field.name: _hints(shape)[field.name] for field in dataclasses.fields(shape) if field.init}
    needed = (dataclasses.MISSING, dataclasses.MISSING)
    for field in dataclasses.fields(shape):
        if field.init and (field.default, field.default_factory) == needed and field.name not in value:
            raise FileError(f"the key {field.name!r} is missing{_below(place)}")
    for key in value:
        if key not in hints:
            raise FileError(f"unknown key {key!r}{_below(place)}{nearest(key, hints)}")
    return shape(
        **{
            key: math.nan if part is None and hints[key] is float else _checked(part, hints[key], f"{place}.{key}")
            for key, part in value.items()
        }
    )


@functools.cache
def _hints(shape: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(shape, include_extras=True)
    marks = (typing.Required, typing.NotRequired)
    return {key: typing.get_args(hint)[0] if typing.get_origin(hint) in marks else hint for key, hint in hints.items()}


def _below(place: str) -> str:
    return "" if place == "$" else f" at {place}"


def _unexpected(value: Any, shape: Any, place: str) -> FileError:
    shown = type(value).__name__ if isinstance(value, dict | list) else repr(value)
    return FileError(f"expected {_named(shape)} at {place}, got {shown}")


def _named(shape: Any) -> str:
    origin, arguments = typing.get_origin(shape), typing.get_args(shape)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_named, arguments)))
    if origin is tuple:
        return f"a list of {len(arguments)} ({', '.join(map(_named, arguments))})"
    if origin is list:
        return "a list"
    return str(_WORDS.get(shape, "an object"))
