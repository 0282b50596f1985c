"""Plain files, read by other readers."""

import csv
import json
import re

import pytest
import yaml
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.files.yaml_writing import yaml_text

PLAN = mps.Plan(
    {
        "layers.1.fc": mps.Precision("4", "8", 128),
        "layers.11.fc": mps.Precision("fp8_e4m3"),
        "no": mps.Precision("16"),
    }
)


@pytest.mark.parametrize("ending", [".csv", ".json", ".yaml", ".yml"])
def test_the_file_says_what_the_plan_says(tmp_path, ending):
    path = tmp_path / f"plan{ending}"
    made = export.neutral(PLAN, path=path)
    if ending == ".csv":
        with path.open() as file:
            read = {row.pop("layer"): row for row in csv.DictReader(file)}
        made = {k: {n: "" if v is None else str(v) for n, v in row.items()} for k, row in made.items()}
    else:
        read = json.loads(path.read_text()) if ending == ".json" else yaml.safe_load(path.read_text())
    assert read == made
    assert {k: str(v["weight_bits"]) for k, v in read.items()} == {"layers.1.fc": "4", "layers.11.fc": "8", "no": "16"}


def test_each_pattern_matches_one_layer():
    patterns = list(export.neutral(PLAN, keys="regex"))
    for name in PLAN:
        assert [bool(re.search(pattern, name)) for pattern in patterns].count(True) == 1
    assert not any(re.search(pattern, "layersX1.fc") for pattern in patterns)


def test_bad_endings_and_names(tmp_path):
    with pytest.raises(mps.ExportError, match=r"ends in \.csv, \.json or \.yaml, not '\.toml'"):
        export.neutral(PLAN, path=tmp_path / "plan.toml")
    with pytest.raises(mps.ExportError, match="no quantizable layer"):
        export.neutral(PLAN, nn.Sequential(nn.Linear(2, 2)))


VALUES = [{}, [], "a", {"a": {}}, [[1, [2]], {"x": None}], {"a": [{"b": 1}]}, {"null": True, "1": "yes", "ü:\n": -1.5}]


@pytest.mark.parametrize("value", VALUES)
def test_yaml_reads_back(value):
    assert yaml.safe_load(yaml_text(value)) == value


@pytest.mark.parametrize(
    "name", ["no", "y", "1e5", "0x1f", "~", "null", "1:2", "a: b", "# a", "-", "ü\u2028\U0001f600", "x " * 90]
)
def test_no_name_of_a_layer_is_read_as_anything_else(name):
    text = yaml_text({"layers": {name: name}})
    assert yaml.safe_load(text) == {"layers": {name: name}}
    assert "\\\n" not in text  # no line is folded
    assert text.count('"') >= 6  # readers of YAML 1.2 take more words for numbers


def test_small_numbers_stay_numbers_and_what_occurs_twice_is_written_twice():
    part = [1, 2]
    text = yaml_text({"a": 1e-7, "b": part, "c": part})
    assert yaml.safe_load(text) == {"a": 1e-7, "b": part, "c": part}
    assert "&" not in text
