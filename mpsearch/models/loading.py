"""Models, data and plugins named on the command line."""

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpsearch.core.precision import Precision
from mpsearch.core.settings import check_settings
from mpsearch.errors import MpsearchError, nearest


class UsageError(MpsearchError, ValueError):
    """The command line asks for something that is not there."""


def load(spec: str, what: str) -> Any:
    """The object that `file.py:name` or `package.module:name` names.

    Raises:
        UsageError: where the file, module or name does not exist, or importing it fails.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise UsageError(f"{what} {spec!r}: expected file.py:function or package.module:function")
    module = _from_file(place, what) if place.endswith(".py") else _from_name(place, what)
    if not hasattr(module, name):
        raise UsageError(
            f"{what} {spec!r}: {place} has no {name!r}{nearest(name, [n for n in vars(module) if n[0] != '_'])}"
        )
    return getattr(module, name)


def call(spec: str, what: str) -> Any:
    """What the function that `spec` names returns, called without arguments.

    Raises:
        UsageError: where there is no such function, or it fails.
    """
    function = load(spec, what)
    if not callable(function):
        raise UsageError(f"{what} {spec!r} is a {type(function).__name__}, expected a function without arguments")
    with _one_line(f"{what} {spec!r} failed"):
        return function()


def loaded_batches(spec: str) -> list[Any]:
    """The batches that the function returns, or yields.

    Raises:
        UsageError: where there is no such function, it fails, or it returns something else.
    """
    batches = call(spec, "data")
    if isinstance(batches, str | bytes | Mapping) or hasattr(batches, "ndim") or not hasattr(batches, "__iter__"):
        raise UsageError(
            f"data {spec!r} returned one {type(batches).__name__}, expected a sequence of batches; return [batch]"
        )
    with _one_line(f"data {spec!r} failed"):
        return list(batches)


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Whatever the user's code raises, `sys.exit` included, as one line."""
    try:
        yield
    except MpsearchError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what}: {type(error).__name__}: {error}") from error


def part(name: str, known: Mapping[str, type], what: str, options: Sequence[str]) -> Any:
    """An estimator or solver by its name, or `module:Class`, with `name=value` options.

    Raises:
        UsageError: for an unknown name or option, or a value of the wrong kind.
    """
    if name in known:
        cls: Any = known[name]
    elif ":" in name:
        cls = load(name, what)
        if not isinstance(cls, type):
            raise UsageError(f"{what} {name!r} is a {type(cls).__name__}, expected a class")
    else:
        raise UsageError(f"unknown {what} {name!r}{nearest(name, known)}")
    fields = {field.name: field for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    hints = typing.get_type_hints(cls) if fields else {}
    settings = {}
    for option in options:
        key, equals, text = option.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise UsageError(f"option {option!r}: expected name=value")
        if key not in fields:
            raise UsageError(f"{what} {name!r} has no option {key!r}{nearest(key, fields) or '; it has none'}")
        settings[key] = _value(hints[key], text.strip(), f"option {key} of {name}")
    with _one_line(f"{what} {name!r} cannot be made"):
        instance = cls(**settings)
    needed = {
        "estimator": "estimate",
        "solver": "choose",
        "resource": "__call__",
        "quantizer": "__call__",
        "proposer": "propose",
    }.get(what)
    if needed and not callable(getattr(instance, needed, None)):
        raise UsageError(f"{what} {name!r} has no method {needed!r}")
    check_settings(instance, UsageError)
    return instance


def _value(hint: Any, text: str, what: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if text not in arguments:
            raise UsageError(f"{what} is {text!r}{nearest(text, map(str, arguments))}")
        return text
    if origin in (typing.Union, types.UnionType):
        kinds = [kind for kind in arguments if kind is not type(None)]
        if type(None) in arguments and text.lower() == "none":
            return None
        return _value(kinds[0], text, what)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UsageError(f"{what} is {text!r}, expected true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise UsageError(
                f"{what} is {text!r}, expected {'a whole number' if hint is int else 'a number'}"
            ) from None
    if hint is str:
        return text
    if hint is Precision:
        return Precision.parse(text)
    return load(text, what)


def _from_file(place: str, what: str) -> types.ModuleType:
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"{what}: no file {place}")
    title = path.stem if path.stem not in sys.modules else f"{path.stem} of {path.resolve()}"
    spec = importlib.util.spec_from_file_location(title, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[title] = module  # dataclasses and pickling look classes up there
    folder = str(path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        with _one_line(f"{what}: {place} fails to load"):
            spec.loader.exec_module(module)
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return module


def _from_name(place: str, what: str) -> types.ModuleType:
    sys.path.insert(0, "")
    try:
        with _one_line(f"{what}: {place} fails to load"):
            try:
                return importlib.import_module(place)
            except ModuleNotFoundError as error:
                raise UsageError(f"{what}: no module {place!r} ({error})") from None
    finally:
        if "" in sys.path:
            sys.path.remove("")
