"""The benchmark of growing models: what it writes are whole models, whose sizes it tells, and rows are held against their bars."""

import sys

import pandas as pd
import pytest
import torch

from tests.benchmarks.conftest import script


@pytest.fixture
def scale(models, monkeypatch):
    pytest.importorskip("transformers")
    yield script("scale", monkeypatch)
    for name in ("scale", "rows"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("experts", [0, 4])
def test_random_models_are_whole(scale, monkeypatch, experts):
    shape = scale.Shape(32, 2, 16, 4, 2, vocabulary=50, experts=experts, tied=not experts)
    monkeypatch.setattr(scale, "SHAPES", {"small": shape})
    folder = scale.folder_of("small")
    assert len(list(folder.glob("*.safetensors"))) == 4
    model, loading = scale.transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.weights
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert shape.largest_layer == max(32 * 50, 16 * 32)


def test_sizes_are_what_their_names_say(scale):
    sizes = {name: shape.weights / 1e9 for name, shape in scale.SHAPES.items()}
    for name in ("0.1B", "0.3B", "1B", "7B"):
        assert sizes[name] == pytest.approx(float(name[:-1]), rel=0.05)


def test_rows_are_held_against_their_bars(scale):
    common = {"weights_bytes": 100, "largest_layer_bytes": 10, "tokens": 8, "damage": 0.5, "plan": "a"}
    resident = {**common, "row": "0.1B resident", "activations_bytes": 20, "peak_memory_bytes": 151}
    rows = pd.DataFrame([resident])
    assert scale.held(resident, rows).startswith("ABOVE")
    assert scale.held({**resident, "peak_memory_bytes": 150}, rows).startswith("within")
    streamed = {**common, "row": "0.1B streamed", "limit_bytes": None}
    assert scale.held(streamed, rows) == "same bits"
    assert scale.held({**streamed, "damage": 0.5 * (1 + 1e-7)}, rows) == "damage differs by 1e-07"
    assert scale.held({**streamed, "plan": "b"}, rows) == "ANOTHER PLAN, same bits"
    assert scale.held({"row": "0.1B limited", "problem": "exit status 1"}, rows) == "exit status 1"


def test_finished_rows_stay(scale, tmp_path):
    path = tmp_path / "scale.csv"
    row = {"row": "0.1B opened", "weights_bytes": 1, "seconds": 1.0}
    scale.merge(path, {**row, "row": "0.3B opened"})
    scale.merge(path, row)
    rows = scale.merge(path, {**row, "seconds": 2.0})
    assert list(rows["row"]) == ["0.1B opened", "0.3B opened"]
    assert list(pd.read_csv(path)["seconds"]) == [2.0, 1.0]
