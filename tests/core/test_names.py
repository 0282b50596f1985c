"""Names of layers survive every file, whatever signs they are made of; names that stand twice are refused."""

import csv
import io
import json

import numpy as np
import pytest
import yaml
from hypothesis import example, given, seed, settings
from hypothesis import strategies as st
from torch import nn

import mpsearch as mps
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.export.tools.neutral import neutral
from mpsearch.imports import import_plan
from mpsearch.plan_search.results.measured_front import measured_front

BREAKS = "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
SIGNS = st.one_of(
    st.characters(exclude_characters="\0", exclude_categories=("Cs",)), st.sampled_from(BREAKS + " \t,;\"'=#+-@\ufeff")
)
NAMES = st.lists(st.text(SIGNS, min_size=1, max_size=6), min_size=1, max_size=4, unique=True)
OPTIONS = mps.precisions("w2 w4a8")
HARD = [
    "a\rb",
    "c\x85",
    "\u2028",
    " d ",
    "=1+1",
    'e"f',
    "g,h",
    "\n",
    "#",
    "damage_se",
    "damage",
    "sensitivity",
    "\U0001f600",
]

fast = [seed(0), settings(database=None, deadline=None, max_examples=25)]


def names(test):
    for decorate in [example(["damage_se"]), example(HARD), given(NAMES), *fast]:
        test = decorate(test)
    return test


def plans(names):
    usage = {"memory_bytes": 3.0}
    return [mps.Plan(dict.fromkeys(names, OPTIONS[i % 2]), usage=usage) for i in range(2)]


def table(names, resource="memory_bytes"):
    layers = [mps.Layer(name, kind=name, weight_shape=(2, 3), group=name) for name in names]
    numbers = np.arange(2.0 * len(names)).reshape(-1, 2)
    pairs = mps.Interactions([(0, 0)], [(1, 1)], [0.5]) if len(names) > 1 else None
    return mps.CostTable(layers, OPTIONS, numbers, usage={resource: numbers + 1}, interactions=pairs)


@names
def test_tables(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("t")
    for path in (folder / "t.csv", folder / "t.npz"):
        table(names).save(path)
        read = mps.CostTable.load(path)
        assert [(layer.name, layer.kind, layer.group) for layer in read.layers] == [
            (name, name, name) for name in names
        ]
        assert read == table(names)
    resource = names[0] if names[0] not in ("sensitivity",) else "x"
    table(["a"], resource).save(folder / "r.csv")
    assert mps.CostTable.load(folder / "r.csv").resources == (resource,)


@names
def test_plans(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("p") / "plan.json"
    plans(names)[0].save(path)
    assert mps.Plan.load(path) == plans(names)[0]


@names
@pytest.mark.parametrize("se", [None, [0.5, 0.25]])
def test_measured_plans(tmp_path_factory, se, names):
    path = tmp_path_factory.mktemp("m") / "plans.csv"
    measured = MeasuredPlans(tuple(plans(names)), [1.0, 2.0], se)
    measured.save(path)
    read = MeasuredPlans.load(path)
    assert read.layers == tuple(names)
    assert [dict(plan) for plan in read.plans] == [dict(plan) for plan in measured.plans]
    assert read.damage.tolist() == [1.0, 2.0]
    assert se is None or read.damage_se.tolist() == se


@names
def test_fronts(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("f") / "front.csv"
    front = mps.pareto(table(names), "memory_bytes")
    front.save(path)
    rows = list(csv.reader(io.StringIO(path.read_bytes().decode(), newline="")))
    assert rows[0] == ["memory_bytes", "sensitivity", "gap", *names]
    assert [row[3:] for row in rows[1:]] == [[str(point.plan[name]) for name in names] for point in front]
    measured = measured_front(MeasuredPlans(tuple(plans(names)), [1.0, 2.0], [0.0, 0.0]), "memory_bytes")
    measured.save(path)
    assert path.read_text().startswith("memory_bytes,damage,damage_se,uniform\n")


@names
def test_files_for_other_tools(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("n")
    plan = plans(names)[0]
    for suffix in (".json", ".yaml", ".csv"):
        neutral(plan, path=folder / f"plan{suffix}")
    assert list(json.loads((folder / "plan.json").read_text())) == names
    assert list(yaml.safe_load((folder / "plan.yaml").read_bytes().decode())) == names
    text = (folder / "plan.csv").read_bytes().decode()
    assert [row[0] for row in csv.reader(io.StringIO(text, newline=""))][1:] == names


@pytest.mark.parametrize("name", ["a\0", "\0", "\ud800"])
def test_names_that_no_file_keeps_are_no_layers(name):
    with pytest.raises(mps.TableError, match="which no file keeps"):
        mps.Layer(name)


def test_a_resource_with_the_name_of_a_column(tmp_path):
    odd = table(["a"], "macs")
    with pytest.raises(mps.TableError, match="the resource 'macs' has the name of a column"):
        odd.save(tmp_path / "t.csv")
    odd.save(tmp_path / "t.npz")
    assert mps.CostTable.load(tmp_path / "t.npz") == odd


def test_lines_of_errors_count_breaks_in_names(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(b'layer,precision,sensitivity\n"a\nb",w4,1\n\n"c\rd",w4,x\n')
    with pytest.raises(mps.TableError, match=r"line 5: sensitivity of layer 'c\\rd'"):
        mps.CostTable.load(path)
    path.write_bytes(b'damage,"a\nb"\n1,w4\nx,w4\n')
    with pytest.raises(mps.PlanError, match="line 4: damage is 'x'"):
        MeasuredPlans.load(path)


def test_tables_made_by_hand_may_have_blanks_around_columns(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("layer, precision , sensitivity\r\na,w4,1\r\nb,w4,2\r\n")
    assert mps.CostTable.load(path).sensitivity.ravel().tolist() == [1, 2]
    path.write_text("damage, a ,b\n1,w4,w2\n")
    assert MeasuredPlans.load(path).layers == ("a", "b")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sensitivity": np.ones((1, 2), complex)}, "sensitivity"),
        ({"usage:memory_bytes": np.ones((1, 2), complex)}, "memory_bytes"),
        ({"sensitivity_se": np.ones((1, 2), complex)}, "sensitivity_se"),
        ({"weight_shape": np.array(["-2x3"])}, "weight_shape of layer 'a' is '-2x3'"),
        ({"macs": np.array([-1])}, "layer 'a' has the shape"),
        ({"interactions:value": np.ones(1, complex)}, "interaction"),
        ({"peak:p": np.ones((1, 1, 2), complex), "peak_fixed:p": np.ones(1)}, "p"),
    ],
)
def test_complex_and_negative_cells_are_refused(tmp_path, values, words):
    path = tmp_path / "t.npz"
    table(["a"]).save(path)
    arrays = dict(np.load(path)) | values
    if "interactions:value" in values:
        arrays |= {f"interactions:{name}": np.zeros((1, 2), int) for name in ("first", "second")}
    np.savez(path, **arrays)
    with pytest.raises(mps.TableError, match=words) as caught:
        mps.CostTable.load(path)
    assert str(path) in str(caught.value)


def test_negative_shapes_in_csv(tmp_path):
    path = tmp_path / "t.csv"
    table(["a"]).save(path)
    path.write_text(path.read_text().replace("[2, 3]", "[-2, -3]"))
    with pytest.raises(mps.TableError, match=r"layer 'a' has the shape \(-2, -3\)"):
        mps.CostTable.load(path)


# ------------------------------------------------------------------------------------------------ what stands twice


WEIGHTS = {"num_bits": 4, "strategy": "channel"}


def groups(tmp_path, content, **more):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"config_groups": content, **more}))
    return path


@pytest.mark.parametrize(
    ("content", "more", "words"),
    [
        ({"g": {"targets": "Linear", "weights": WEIGHTS}}, {}, "g: 'targets' is 'Linear', expected a list"),
        ({"g": {"targets": ["a", 3], "weights": WEIGHTS}}, {}, "expected a list of names"),
        ({"g": {"weights": WEIGHTS}}, {}, "g: 'targets' is None"),
        ({"g": 3}, {}, "g: expected an object, got 3"),
        ({"g": {"targets": ["a", "a"], "weights": WEIGHTS}}, {}, "g: 'targets' names 'a' twice"),
        (
            {
                "g": {"targets": ["a"], "weights": WEIGHTS},
                "h": {"targets": ["b", "a"], "weights": {**WEIGHTS, "num_bits": 8}},
            },
            {},
            "the target 'a' is in 'g' and in 'h'",
        ),
        (
            {"g": {"targets": ["a"], "weights": WEIGHTS}},
            {"ignore": "lm_head"},
            "'ignore' is 'lm_head', expected a list",
        ),
        ({"g": {"targets": ["Linear"], "weights": WEIGHTS}}, {}, "'Linear' is the name of a class; give the model"),
        ({"g": {"targets": ["QKVParallelLinear"], "weights": WEIGHTS}}, {}, "is the name of a class; give the model"),
        ({"g": {"targets": ["a"], "weights": WEIGHTS}}, {"ignore": ["re:.*"]}, "'re:.*' is a pattern; give the model"),
    ],
)
def test_groups_of_compressed_tensors(tmp_path, content, more, words):
    with pytest.raises(mps.PlanError) as caught:
        import_plan(groups(tmp_path, content, **more), "compressed-tensors")
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_class_is_matched_with_the_model(tmp_path):
    path = groups(tmp_path, {"g": {"targets": ["Linear"], "weights": WEIGHTS}}, ignore=["1"])
    plan = import_plan(path, "compressed-tensors", nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert {name: str(precision) for name, precision in plan.items()} == {"0": "w4", "1": "w16"}


@pytest.mark.parametrize("tool", ["compressed-tensors", "gptqmodel", "modelopt"])
def test_keys_that_stand_twice_in_json_of_other_tools(tmp_path, tool):
    path = tmp_path / "config.json"
    path.write_text('{"bits": 4, "dynamic": {"^a$": {"bits": 4}, "^a$": {"bits": 8}}}')
    with pytest.raises(mps.PlanError, match=r"config.json: .*'\^a\$' occurs twice"):
        import_plan(path, tool)


def test_two_weights_of_one_layer_in_a_file_of_nncf(tmp_path):
    path = tmp_path / "model.xml"
    const = '<layer type="Const" name="self.a.weight{0}"><data element_type="{1}" shape="2,2"/></layer>'
    path.write_text(f"<net><layers>{const.format('', 'i8')}{const.format('_compressed', 'i4')}</layers></net>")
    with pytest.raises(mps.PlanError, match="'a' has two weights, at w8 and w4"):
        import_plan(path, "nncf")


# ------------------------------------------------------------------------------------------------ edited plans


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_plan_edited_by_hand_is_told(tmp_path, recwarn):
    path = tmp_path / "plan.json"
    solution = mps.solve(table(["a", "b"]), mps.Budget(memory_bytes=6))
    solution.plan.save(path)
    assert mps.Plan.load(path) == solution.plan
    edited(path, lambda content: content.update(layers=dict(reversed(content["layers"].items()))))
    assert mps.Plan.load(path).predicted == solution.plan.predicted
    assert not recwarn
    for change in (
        lambda content: content["layers"].update(a="w4a8", b="w4a8"),
        lambda content: content["layers"].pop("a"),
        lambda content: content["layers"].update(c="w4"),
        lambda content: content.pop("layers_hash"),
    ):
        solution.plan.save(path)
        edited(path, change)
        with pytest.warns(UserWarning, match=r"plan.json: the layers were changed after the plan was written"):
            plan = mps.Plan.load(path)
        assert (plan.predicted, plan.usage, plan.origin["edited"]) == ({}, {}, True)
        plan.save(path)
        assert mps.Plan.load(path) == plan


def test_plans_of_version_1_and_by_hand_are_read(tmp_path, recwarn):
    path = tmp_path / "plan.json"
    for content in (
        {"mpsearch_plan": 1, "layers": {"a": "w4"}, "predicted": {"sensitivity": 1.0}},
        {"mpsearch_plan": 2, "layers": {"a": "w4"}},
    ):
        path.write_text(json.dumps(content))
        assert mps.Plan.load(path).predicted == content.get("predicted", {})
    assert not recwarn
