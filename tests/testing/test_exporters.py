"""The contract suite of exporters: every registered one passes, every way to cheat is caught."""

import json
import time
import unittest
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mpsearch as mps
from mpsearch.export import EXPORTERS, Exporter, Setting
from mpsearch.files.writing import write_atomically
from mpsearch.testing import exporter_checks


def registered_checks() -> Iterator[Any]:
    """Every check of every registered exporter, under both names."""
    for name, exporter in EXPORTERS.items():
        if name != "gguf":
            for check_name, check in exporter_checks(exporter):
                yield pytest.param(check, id=f"{name}-{check_name}")


@pytest.mark.parametrize("check", list(registered_checks()))
def test_registered_exporters(check: Callable[[], None]) -> None:
    check()


def test_gguf(llama):
    for _, check in exporter_checks(EXPORTERS["gguf"], model=llama, example=torch.zeros(1, 8, dtype=int)):
        check()


def test_names_are_those_of_the_registry():
    assert {name: exporter.name for name, exporter in EXPORTERS.items()} == {name: name for name in EXPORTERS}


def failing(exporter: Exporter) -> list[str]:
    names = []
    for name, check in exporter_checks(exporter):
        try:
            check()
        except AssertionError:
            names.append(name)
    return names


def honest(plan, model=None, *, snap=False, path=None):
    """Precisions by layer; `torchao` is the target, which tells what is refused."""
    from mpsearch.export.fitting import fitted

    plan = fitted(plan, model, "torchao", snap=snap)
    write_atomically(path, json.dumps({name: str(precision) for name, precision in plan.items()}))


def drops_a_layer(plan, model=None, *, snap=False, path=None):
    honest(mps.Plan({name: p for name, p in plan.items() if "down_proj" not in name}), model, path=path)


def forgets_bits(plan, model=None, *, snap=False, path=None):
    honest(plan, model, path=path)
    path.write_text(json.dumps(sorted(json.loads(path.read_text()))))


def writes_first(plan, model=None, *, snap=False, path=None):
    path.write_text("{}")
    honest(plan, model, path=path)


def leaves_a_copy(plan, model=None, *, snap=False, path=None):
    honest(plan, model, path=path)
    Path(f"{path}.tmp").write_text(path.read_text())


def tells_the_time(plan, model=None, *, snap=False, path=None):
    honest(plan, model, path=path)
    path.write_text(path.read_text() + f"\n{time.perf_counter_ns()}")


def appends(plan, model=None, *, snap=False, path=None):
    before = path.read_text() if path.exists() else ""
    honest(plan, model, path=path)
    path.write_text(before + path.read_text())


def takes_any_layer(plan, model=None, *, snap=False, path=None):
    names = dict(model.named_modules())
    honest(mps.Plan({name: p for name, p in plan.items() if name in names}), model, path=path)


def breaks_the_model(plan, model=None, *, snap=False, path=None):
    honest(plan, model, path=path)
    model.lm_head.weight.data.add_(1.0)


def refuses_in_its_own_way(plan, model=None, *, snap=False, path=None):
    try:
        honest(plan, model, path=path)
    except mps.ExportError as error:
        raise mps.PlanError(str(error)) from None


REFUSALS = ["refuses what it cannot express", "refuses a layer that the model lacks"]


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (honest, []),
        (drops_a_layer, ["every decision is written", "refuses what it cannot express", REFUSALS[1]]),
        (forgets_bits, ["every decision is written"]),
        (writes_first, REFUSALS),
        (leaves_a_copy, ["one whole file"]),
        (tells_the_time, ["one whole file", "deterministic"]),
        (appends, ["one whole file"]),
        (takes_any_layer, ["refuses a layer that the model lacks"]),
        (breaks_the_model, ["plan and model untouched"]),
        (refuses_in_its_own_way, REFUSALS),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_cheats_fail_what_they_break_and_nothing_else(write: Callable[..., Any], names: list[str]) -> None:
    assert failing(Exporter("torchao", write)) == names


def test_a_layer_that_the_tool_does_not_get_is_read_back():
    honest_reader = EXPORTERS["torchao"].read
    assert honest_reader is not None

    def drops(plan, model, *, symmetric=False):
        return honest_reader(mps.Plan({name: p for name, p in plan.items() if "down_proj" not in name}), model)

    assert failing(EXPORTERS["torchao"]) == []
    assert failing(replace(EXPORTERS["torchao"], read=drops)) == ["read back"]


@pytest.mark.parametrize(
    "lie",
    [
        {"settings": {}},
        {"settings": {"keys": Setting(str, "regex")}},
        {"write_example": True},
        {"stable_bytes": False},
    ],
)
def test_a_false_declaration_is_caught(lie: dict[str, Any]) -> None:
    name, check = next(iter(exporter_checks(replace(EXPORTERS["neutral"], **lie))))
    assert name == "declaration"
    with pytest.raises(AssertionError):
        check()


def test_what_is_not_installed_is_skipped_and_an_undeclared_need_is_told():
    from mpsearch.core.packages import package

    def needs_it(plan, model=None, *, snap=False, path=None):
        package("no_such_tool", "none")

    for name, check in exporter_checks(Exporter("torchao", needs_it, "no-such-tool", write_needs_package=True)):
        if name != "declaration":
            with pytest.raises(unittest.SkipTest, match="no-such-tool is not installed"):
                check()
    assert "takes a plan" in failing(Exporter("torchao", needs_it))
