"""The contract suite of importers: every registered one passes, every way to cheat is caught."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import nn

import mpsearch as mps
from mpsearch.imports import IMPORTERS, TABLE_IMPORTERS, Importer
from mpsearch.imports.importer import imported
from mpsearch.testing import importer_checks

NNCF = b"""<net><layers>
<layer name="self.first.weight_compressed" type="Const"><data element_type="i4" shape="8,2,32"/></layer>
<layer name="self.second.weight" type="Const"><data element_type="f32" shape="8,64"/></layer>
</layers></net>"""
OPTION = {"accuracy": 0.9, "total_bits": 16384, "first": {"bits": [4, 3], "bits_prop": [0.1, 0.9]}}
EXLLAMAV2 = json.dumps({"measurement": {"model.0.mlp": [OPTION]}}).encode()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)


def registered_checks() -> Iterator[Any]:
    """Every check of every registered importer; what no exporter writes is written by hand above."""
    blocks = nn.ModuleDict({"model": nn.ModuleList([nn.ModuleDict({"mlp": Net()})])})
    own: dict[str, dict[str, Any]] = {"nncf": {"file": NNCF, "model": Net()}}
    tables: dict[str, dict[str, Any]] = {
        "exllamav2": {"file": EXLLAMAV2, "model": blocks},
        "modelopt": {"file": b"skipped"},
    }
    for known, files in ((IMPORTERS, own), (TABLE_IMPORTERS, tables)):
        for name, importer in known.items():
            if name != "gguf":
                for check_name, check in importer_checks(importer, **files.get(name, {})):
                    yield pytest.param(check, id=f"{name}-{check_name}")


@pytest.mark.parametrize("check", list(registered_checks()))
def test_registered_importers(check: Callable[[], None]) -> None:
    check()


@pytest.mark.filterwarnings("ignore")
def test_gguf(llama):
    plan = mps.Plan(
        {
            "model.layers.0.mlp.down_proj": mps.Precision("q8_0"),
            "model.layers.0.self_attn.o_proj": mps.Precision("q4_0"),
        }
    )
    for _, check in importer_checks(IMPORTERS["gguf"], model=llama, plan=plan):
        check()


def test_names_are_those_of_the_registries():
    for known in (IMPORTERS, TABLE_IMPORTERS):
        assert {name: importer.name for name, importer in known.items()} == {name: name for name in known}


def failing(importer: Importer[Any]) -> list[str]:
    names = []
    for name, check in importer_checks(importer):
        try:
            check()
        except AssertionError:
            names.append(name)
    return names


honest = IMPORTERS["gptqmodel"].read


def drops_a_layer(path, model=None):
    plan = honest(path, model)
    return replace(plan, layers={name: p for name, p in plan.items() if "o_proj" not in name})


def forgets_where_from(path, model=None):
    return replace(honest(path, model), origin={})


def stumbles(path, model=None):
    try:
        return honest(path, model)
    except mps.PlanError as error:
        raise RuntimeError(str(error)) from None


def reads_anything(path, model=None):
    try:
        return honest(path, model)
    except (mps.PlanError, OSError):
        return mps.Plan({"x": mps.Precision("4")}, origin={"imported": "gptqmodel"})


def writes(path, model=None):
    plan = honest(path, model)
    with open(path, "a") as file:
        file.write(" ")
    return plan


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (honest, []),
        (drops_a_layer, ["what was exported comes back"]),
        (forgets_where_from, ["reads its file"]),
        (stumbles, ["other files refused", "damaged files"]),
        (reads_anything, ["missing file", "other files refused"]),
        (writes, ["file and model untouched"]),
    ],
)
def test_cheats_fail_what_they_break_and_nothing_else(read: Callable[..., Any], names: list[str]) -> None:
    assert failing(replace(IMPORTERS["gptqmodel"], read=read)) == names


def test_a_false_declaration_is_caught():
    assert failing(replace(IMPORTERS["gptqmodel"], needs_model=True)) == ["without a model"]


def test_what_an_importer_stumbles_over_is_told_as_the_damage_of_the_file(tmp_path):
    with pytest.raises(mps.PlanError, match=r"x: not as odd writes it \(KeyError: 'bits'\)"):
        imported(Importer("odd", lambda path, model: {}["bits"]), tmp_path / "x", None, mps.PlanError)
