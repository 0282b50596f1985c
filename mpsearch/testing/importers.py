"""The contract of an importer, checked on a file that its tool or our exporter writes, and on that file with any part of it damaged."""

import copy
import functools
import json
import tempfile
import unittest
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpsearch.core.packages import version
from mpsearch.core.plan import Plan
from mpsearch.core.precision import Precision
from mpsearch.core.table import CostTable
from mpsearch.errors import MissingPackage, MpsearchError, PlanError
from mpsearch.export import EXPORTERS
from mpsearch.imports.importer import Importer, imported
from mpsearch.testing.exporters import small_transformer
from mpsearch.testing.named_checks import Checks

_OTHERS = {
    "an empty file": b"",
    "an empty object": b"{}",
    "an empty list": b"[]",
    "zeros": b"\0" * 100,
    "text": b"w4 w8",
    "no UTF-8": b"\xff\xfe\xfa",
    "XML of something else": b"<net></net>",
}
_DAMAGE: tuple[Any, ...] = (None, [], {}, "x", "re:(", 0, -1, 10**30, True, [None], {"a": None})
_REMOVED, _RENAMED = object(), object()


def importer_checks(
    importer: Importer[Any], *, file: bytes | None = None, model: nn.Module | None = None, plan: Plan | None = None
) -> Checks:
    """The contract of an importer as named checks.

    It reads what its tool writes, and says in `origin` that it did; what its exporter wrote comes back decision by decision; without a
    model it reads the same layers, or refuses, as it declares; twice the same; file and model stay as they are. A missing file is an
    `OSError`. Files of something else are refused, and a file with any part of it cut off, removed, renamed or of another kind gives
    something that can be saved, or one line that names the file.

    Args:
        importer: one of `mpsearch.imports.IMPORTERS` or `TABLE_IMPORTERS`, or your own.
        file: what its tool writes; by default its exporter writes one.
        model: whose layers the file names; by default a small transformer with the names of Llama.
        plan: of that model, for the exporter.

    Yields:
        Name and check, a function without arguments that raises AssertionError with what was expected and what came.

    >>> from mpsearch.imports import IMPORTERS
    >>> for name, check in importer_checks(IMPORTERS["gptqmodel"]):
    ...     check()
    """
    suite = _Suite(importer, file, small_transformer() if model is None else model, _PLAN if plan is None else plan)
    yield "reads its file", suite.check_file
    if file is None:
        yield "what was exported comes back", suite.check_round_trip
    yield "without a model", suite.check_without_model
    yield "deterministic", suite.check_again
    yield "file and model untouched", suite.check_untouched
    yield "missing file", suite.check_missing
    yield "other files refused", suite.check_others
    yield "damaged files", suite.check_damage


_FOUR, _EIGHT = Precision("4", "16", 32), Precision("8")
#: All layers of the block, since without a model some exporters cannot name what is left alone.
_PLAN = Plan(
    {f"model.layers.0.self_attn.{name}": _FOUR for name in ("q_proj", "k_proj", "v_proj")}
    | {f"model.layers.0.mlp.{name}": _FOUR for name in ("gate_proj", "up_proj")}
    | {"model.layers.0.mlp.down_proj": _EIGHT, "model.layers.0.self_attn.o_proj": _EIGHT}
)


@dataclass(frozen=True)
class _Suite:
    """One importer, a file, and the model that it is of."""

    importer: Importer[Any]
    file: bytes | None
    model: nn.Module
    plan: Plan

    @functools.cached_property
    def content(self) -> bytes:
        """The file: given, or written by the exporter without a model where that gives a file, else with one."""
        for package in (self.importer.package, *self._packages_of_exporter()):
            if package:
                try:
                    version(package)
                except MissingPackage as error:
                    raise unittest.SkipTest(str(error)) from None
        if self.file is not None:
            return self.file
        exporter = EXPORTERS.get(self.importer.exporter)
        assert exporter is not None, f"{self.importer.name} has no exporter: give a file that its tool writes"
        with _scratch() as path, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exporter(self.plan, self.model if self.importer.needs_model else None, path=path)
            return path.read_bytes()

    def _packages_of_exporter(self) -> list[str]:
        exporter = EXPORTERS.get(self.importer.exporter)
        return [exporter.package] if self.file is None and exporter is not None and exporter.write_needs_package else []

    def read(self, content: bytes, model: nn.Module | None) -> Any:
        """Plan or table of a file."""
        with _scratch() as path:
            path.write_bytes(content)
            return imported(self.importer, path, model, PlanError)

    def check_file(self) -> None:
        result = self.read(self.content, self.model)
        assert isinstance(result, Plan | CostTable), (
            f"{self.importer.name} read {type(result).__name__}, expected a plan or a table"
        )
        decisions = result if isinstance(result, Plan) else result.layers
        assert len(decisions), f"{self.importer.name} read no layer"
        origin = result.origin.get("imported")
        assert origin == self.importer.name, f"origin['imported'] is {origin!r}, expected {self.importer.name!r}"

    def check_round_trip(self) -> None:
        expected = {name: p for name, p in self.plan.items() if p.quantizes_weight}
        plan = self.read(self.content, self.model)
        for what in expected.keys() | {name for name, p in plan.items() if p.quantizes_weight}:
            assert plan.get(what) == expected.get(what), (
                f"{what!r} comes back as {plan.get(what)}, exported was {expected.get(what)}"
            )

    def check_without_model(self) -> None:
        if not self.importer.needs_model:
            self.read(self.content, None)
            return
        content, refusal = self.content, ""
        try:
            self.read(content, None)
        except MpsearchError as error:
            refusal = str(error)
        assert refusal, f"{self.importer.name} reads without a model, and declares needs_model=True"
        assert "model" in refusal, f"without a model: {refusal}; expected a line that asks for it"

    def check_again(self) -> None:
        first, second = (self._saved(self.read(self.content, self.model)) for _ in range(2))
        assert first == second, f"{self.importer.name} read {first!r} and then {second!r} from one file"

    def _saved(self, result: Any) -> str:
        """A plan or table as its own file, without the path that it came from."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("result.json" if isinstance(result, Plan) else "result.csv")
            result.save(path)
            lines = path.read_text().splitlines()
        return "\n".join(line for line in lines if _NAME not in line)

    def check_untouched(self) -> None:
        state = {name: x.clone() for name, x in self.model.state_dict().items()}
        with _scratch() as path:
            path.write_bytes(self.content)
            imported(self.importer, path, self.model, PlanError)
            assert path.read_bytes() == self.content, f"{self.importer.name} changed the file"
        assert all(torch.equal(x, state[name]) for name, x in self.model.state_dict().items()), "the model changed"

    def check_missing(self) -> None:
        with _scratch() as path:
            try:
                imported(self.importer, path, self.model, PlanError)
            except OSError:
                return
            except MissingPackage as error:
                raise unittest.SkipTest(str(error)) from None
        raise AssertionError(f"{self.importer.name} read a file that is not there")

    def check_others(self) -> None:
        assert self.content
        for name, content in _OTHERS.items():
            result = self._refused(content, name)
            assert result is None, f"{self.importer.name} reads {name} as {result!r}"

    def check_damage(self) -> None:
        content = self.content
        for cut in range(1, 16):
            self._refused(content[: len(content) * cut // 16], f"its file cut after {cut}/16")
        try:
            parsed = json.loads(content)
        except ValueError:
            return
        for path in list(_places(parsed))[1:]:
            for how in (_REMOVED, _RENAMED, *_DAMAGE):
                label = (
                    {_REMOVED: "removed", _RENAMED: "renamed"}.get(how) if how in (_REMOVED, _RENAMED) else repr(how)
                )
                self._refused(json.dumps(_damaged(parsed, path, how)).encode(), f"its file with {path} {label}")

    def _refused(self, content: bytes, what: str) -> Any:
        """None where the file is refused in one line; else what can be saved."""
        with _scratch() as path:
            path.write_bytes(content)
            try:
                result = imported(self.importer, path, self.model, PlanError)
            except MissingPackage:
                raise
            except MpsearchError as error:
                line = str(error)
                assert str(path) in line, f"{self.importer.name}, {what}: {line!r} does not name the file"
                assert "\n" not in line, f"{self.importer.name}, {what}: {line!r}, expected one line"
                return None
            except Exception as error:
                raise AssertionError(
                    f"{self.importer.name}, {what}: {error!r}, expected one line of an MpsearchError"
                ) from error
        self._saved(result)
        return result


_NAME = "file-of-the-tool"


@contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / _NAME


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of parsed JSON, from the whole inwards."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from _places(part, (*path, key))


def _damaged(content: Any, path: tuple[Any, ...], how: Any) -> Any:
    """A copy with one place removed, renamed or replaced."""
    whole = copy.deepcopy(content)
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    if how is _REMOVED:
        del holder[path[-1]]
    elif how is _RENAMED and isinstance(holder, dict):
        holder["("] = holder.pop(path[-1])
    else:
        holder[path[-1]] = None if how is _RENAMED else how
    return whole
