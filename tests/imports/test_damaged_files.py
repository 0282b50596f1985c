"""Files of other tools with any part of them gone or of another kind: a plan or table that can be kept, or one line."""

import copy
import json

import pytest
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.imports import import_plan, import_table

PLAN = mps.Plan({"first": mps.Precision("3", "16", 32), "second": mps.Precision("8"), "lm_head": mps.Precision("16")})
DAMAGE = ["removed", "renamed", None, [], {}, "x", "re:(", 0, -1, 10**30, True, [None], {"a": None}]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.lm_head = (nn.Linear(64, 64) for _ in range(3))


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def damaged(content, path, how):
    made = copy.deepcopy(content)
    place = made
    for key in path[:-1]:
        place = place[key]
    if how == "removed":
        del place[path[-1]]
    elif how == "renamed" and isinstance(place, dict):
        place["("] = place.pop(path[-1])
    else:
        place[path[-1]] = how
    return made


OPTION = {"accuracy": 0.9, "total_bits": 16384, "first": {"bits": [4, 3], "bits_prop": [0.1, 0.9]}}
FILES = {
    "compressed-tensors": export.llm_compressor(PLAN)["quant_stage"]["quant_modifiers"]["QuantizationModifier"],
    "gptqmodel": export.gptqmodel(PLAN),
    "modelopt": export.modelopt(PLAN),
    "exllamav2": {"measurement": {"model.0.mlp": [OPTION]}},
}


@pytest.mark.parametrize("tool", FILES)
def test_one_line_or_what_can_be_kept(tool, tmp_path):
    path, content = tmp_path / "file.json", json.loads(json.dumps(FILES[tool]))
    layers = nn.ModuleDict({"model": nn.ModuleList([nn.ModuleDict({"mlp": Net()})])}) if tool == "exllamav2" else Net()
    told = []
    for place in list(places(content))[1:]:
        for how in DAMAGE:
            path.write_text(json.dumps(damaged(content, place, how)))
            for model in (None, layers):
                try:
                    found = import_table(path, tool, model) if tool == "exllamav2" else import_plan(path, tool, model)
                except mps.MpsearchError as error:
                    told.append(str(error))
                else:
                    found.save(tmp_path / ("out.csv" if tool == "exllamav2" else "out.json"))
    assert len(told) > 50
    assert all(str(path) in line and "\n" not in line for line in told)
