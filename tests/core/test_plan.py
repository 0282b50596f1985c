import json

import pytest

from mpsearch import Plan, PlanError, Precision


def plan():
    return Plan(
        {"conv1": Precision("4", "8"), "fc": Precision("8")},
        {"memory_bytes": 1e6},
        {"sensitivity": 0.1 / 3, "status": "optimal"},
        {"memory_bytes": 999.0},
        {"solver": "Exact()"},
    )


def test_the_round_trip_is_exact(tmp_path):
    plan().save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan()
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["mpsearch_plan"] == 2
    assert content["layers"] == {"conv1": "w4a8", "fc": "w8"}


def test_it_is_a_mapping():
    assert dict(plan())["fc"] == Precision("8")
    assert "conv1" in plan()
    with pytest.raises(KeyError, match="did you mean 'conv1'"):
        plan()["conv"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "no mpsearch plan"),
        ("{}", "no mpsearch plan"),
        ('{"mpsearch_plan": 3, "layers": {"a": "w4"}}', "version 3"),
        ('{"mpsearch_plan": 1}', "the key 'layers' is missing"),
        ('{"mpsearch_plan": 1, "layers": {"a": "w4"}, "budget": {"x": [1]}}', "got list"),
        ('{"mpsearch_plan": 1, "layers": {}}', "no layers"),
        ('{"mpsearch_plan": 1, "layers": {"a": "w99"}}', "at $.layers['a']"),
        ('{"mpsearch_plan": 1, "layers": {"a": 4}}', "expected text at $.layers['a']"),
        ('{"mpsearch_plan": 1, "layers": {"a": "w4"}, "budgets": {}}', "did you mean 'budget'"),
        ('{"mpsearch_plan": 1, "layers": {"a": "w4", "a": "w8"}}', "occurs twice"),
        ('{"mpsearch_plan": 1, "layers": {"a": "w4"}, "usage": 3}', "expected an object at $.usage"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path, text, words):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanError) as caught:
        Plan.load(tmp_path / "plan.json")
    assert words in str(caught.value)
    assert "plan.json" in str(caught.value)
    assert "\n" not in str(caught.value)
