"""Measured plans: the file, what it refuses, and the door that measures them."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.calibration.measuring import measure_plans
from mpsearch.core.measured_plans import MeasuredPlans, holds_plans
from mpsearch.quantizers.rounding import RoundToNearest


def plan(**layers):
    return mps.Plan({name: mps.Precision.parse(text) for name, text in layers.items()})


PLANS = (plan(a="w2", b="w4a8"), plan(a="w8g16", b="wmxfp4"))


@pytest.mark.parametrize("se", [None, [0.01, np.nan]])
def test_a_file_keeps_everything(tmp_path, se):
    before = MeasuredPlans(PLANS, [1 / 3, -1e-17], se, "nats", {"model": "net", "seeds": [1, 2]})
    before.save(tmp_path / "plans.csv")
    after = MeasuredPlans.load(tmp_path / "plans.csv")
    assert after.plans == before.plans
    assert after.layers == ("a", "b")
    np.testing.assert_array_equal(after.damage, before.damage)
    np.testing.assert_array_equal(after.damage_se, before.damage_se)
    assert (after.unit, after.origin) == ("nats", {"model": "net", "seeds": [1, 2]})
    assert holds_plans(tmp_path / "plans.csv")


def test_what_the_file_looks_like(tmp_path):
    MeasuredPlans(PLANS, [0.5, 0.25], unit="nats").save(tmp_path / "plans.csv")
    assert (tmp_path / "plans.csv").read_text().splitlines() == [
        "# mpsearch_plans: 1",
        '# {"unit": "nats", "origin": {}}',
        "damage,a,b",
        "0.5,w2,w4a8",
        "0.25,w8g16,wmxfp4",
    ]


def test_a_file_made_by_hand(tmp_path):
    path = tmp_path / "plans.csv"
    path.write_text("a, damage\nw2,3\n\nw4,1\n")
    found = MeasuredPlans.load(path)
    assert (len(found), found.damage.tolist(), found.unit) == (2, [3, 1], "relative")
    assert holds_plans(path)


def test_a_table_is_no_file_of_plans(tmp_path):
    for name in ("table.csv", "table.npz"):
        mps.CostTable((mps.Layer("damage"),), mps.precisions("w2"), [[1]]).save(tmp_path / name)
        assert not holds_plans(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no header line"),
        ("# mpsearch_plans: 2\n# {}\ndamage,a\n1,w2", "reads '# mpsearch_plans: 1'"),
        ("# mpsearch_table: 1\n# {}\ndamage,a\n1,w2", "line 1"),
        ("# mpsearch_plans: 1\ndamage,a\n1,w2", "line 2: expected"),
        ("# mpsearch_plans: 1\n# [1]\ndamage,a\n1,w2", "line 2: .* one JSON object"),
        ('# mpsearch_plans: 1\n# {"unti": "nats"}\ndamage,a\n1,w2', "unknown key 'unti'; did you mean 'unit'"),
        ('# mpsearch_plans: 1\n# {"origin": 1}\ndamage,a\n1,w2', "expected an object at .*origin, got 1"),
        ('# mpsearch_plans: 1\n# {"unit": "bits"}\ndamage,a\n1,w2', "unit 'bits', expected one of nats, relative"),
        ("damge,a\n1,w2", "line 1: no column 'damage'"),
        ("damage,a,a\n1,w2,w2", "column 'a' occurs twice"),
        ("damage,a\n1,w2,w4", "line 2: 3 fields, expected 2"),
        ("damage,a\n1,w2\nx,w4", "line 3: damage is 'x'"),
        ("damage,a\n1,w2\n2,w99", "line 3, layer 'a': an integer format of 99 bits"),
        ("damage,a\n1,", "line 2, layer 'a'"),
        ("damage,a\nnan,w2", "damage of plan 0 is nan"),
        ("damage,damage_se,a\n1,-1,w2", "damage_se of plan 0 is -1"),
        ("damage\n1", "plan 0 and plan 0 name different layers: none"),
        ("damage,a", "no measured plans"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path, text, words):
    path = tmp_path / "plans.csv"
    path.write_text(text)
    with pytest.raises(mps.PlanError, match=words) as caught:
        MeasuredPlans.load(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "plans.csv").write_bytes(b"damage,a\n\xff")
    with pytest.raises(mps.PlanError, match="byte 9 is not UTF-8"):
        MeasuredPlans.load(tmp_path / "plans.csv")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((), []), "no measured plans"),
        ((PLANS, [1.0]), r"damage has shape \(1,\), expected \(2,\)"),
        ((PLANS, [1.0, np.inf]), "damage of plan 1 is inf"),
        ((PLANS, [1, 2], [1.0]), "damage_se has shape"),
        (((plan(a="w2"), plan(a="w2", c="w2")), [1, 2]), "plan 1 and plan 0 name different layers: 'c'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, words):
    with pytest.raises(mps.PlanError, match=words):
        MeasuredPlans(*arguments)


def test_columns_of_a_table():
    table = mps.CostTable((mps.Layer("b"), mps.Layer("a")), mps.precisions("w4 w2"), [[1, 2], [1, np.nan]])
    found = MeasuredPlans((plan(a="w4", b="w2"), plan(a="w4", b="w4")), [1, 2])
    assert found.options(table).tolist() == [[1, 0], [0, 0]]
    for bad, words in (
        (plan(a="w2", b="w2"), "plan 0 has 'a' at w2, the table allows w4"),
        (plan(a="w8", b="w2"), "plan 0 has 'a' at w8, the table allows w4"),
        (plan(a="w4"), "say nothing of layer 'b'"),
        (plan(a="w4", b="w2", bb="w2"), "'bb', which is no layer of the table; did you mean 'b'"),
    ):
        with pytest.raises(mps.PlanError, match=words):
            MeasuredPlans((bad,), [1]).options(table)


class Net(nn.Module):
    """A convolution with batch norm, and two linear layers of one weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.one = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(self.norm(self.conv(x)).mean((2, 3)))))


def net():
    torch.manual_seed(0)
    return Net()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, 1, 5, 5, generator=generator) for n in (5, 3)]


MIXED = [
    plan(conv=conv, one=linear, two=linear)
    for conv, linear in (("w2", "w8"), ("w4a4", "w2"), ("w16", "w16"), ("w2a8", "w3a3"), ("w16a4", "w16"), ("w2", "w2"))
]


def test_damage_is_that_of_evaluate():
    found = measure_plans(net(), batches(), MIXED)
    for n, one in enumerate(MIXED):
        truth = mps.evaluate(net(), batches(), one)
        assert found.damage[n] == pytest.approx(truth.kl, rel=1e-9, abs=1e-15)
        assert found.damage_se[n] == pytest.approx(truth.kl_se, rel=1e-9, abs=1e-15)
    assert found.damage[2] == 0
    assert found.unit == "nats"
    assert found.plans == tuple(MIXED)


def test_own_quantizer_and_calibration_data():
    def coarse(weight, precision):
        return torch.round(weight)

    calibration = [100 * x for x in batches()]
    found = measure_plans(net(), iter(batches()), MIXED, quantizer=coarse, calibration=calibration)
    truth = [mps.evaluate(net(), batches(), one, quantizer=coarse, calibration=calibration).kl for one in MIXED]
    np.testing.assert_allclose(found.damage, truth, rtol=1e-9, atol=1e-15)
    plain = measure_plans(net(), batches(), MIXED).damage
    assert not np.isclose(found.damage, plain)[[0, 1, 3, 4, 5]].any()


def test_each_cell_is_quantized_once_and_the_reference_runs_once():
    made, runs = [], 0

    def quantizer(weight, precision):
        made.append((weight.ndim, precision.weight))
        return RoundToNearest()(weight, precision)

    def count(*_):
        nonlocal runs
        runs += 1

    model = net()
    model.register_forward_pre_hook(count)
    measure_plans(model, batches(), MIXED, quantizer=quantizer)
    assert sorted(made) == [(2, "2"), (2, "3"), (2, "8"), (4, "2"), (4, "4")]
    # once: what do functions read? twice: is it random? Then the ranges of inputs, the reference, the plans
    assert runs == 3 + len(batches()) * (1 + 1 + len(MIXED))


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_model_comes_back(error):
    model = net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = 0

    def stop(*_):
        nonlocal calls
        calls += 1
        if error is not None and calls == 6:
            raise error("stop")

    handle = model.conv.register_forward_hook(stop)
    if error is None:
        measure_plans(model, batches(), MIXED)
    else:
        with pytest.raises((mps.EstimatorError, KeyboardInterrupt)):
            measure_plans(model, batches(), MIXED)
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("plans", "data", "error", "words"),
    [
        ([], None, mps.PlanError, "no measured plans"),
        ([plan(conf="w2")], None, mps.PlanError, "plan 0: the plan names 'conf'.*did you mean 'conv'"),
        ([MIXED[0], plan(conv="w2", one="w2", two="w4")], None, mps.PlanError, "plan 1: .* share a weight"),
        ([MIXED[0], plan(conv="w2")], None, mps.PlanError, "plan 1 and plan 0 name different layers"),
        (MIXED, [], mps.EstimatorError, "empty"),
        (
            MIXED[:1],
            [batches()[0], batches()[1] * np.nan],
            mps.EstimatorError,
            "unquantized model is not finite .batch 1",
        ),
    ],
)
def test_bad_input_is_refused(plans, data, error, words):
    with pytest.raises(error, match=words):
        measure_plans(net(), batches() if data is None else data, plans)


def test_plans_are_checked_before_anything_runs():
    def quantizer(weight, precision):
        raise AssertionError("too late")

    with pytest.raises(mps.PlanError, match="plan 1 and plan 0 name different layers"):
        measure_plans(net(), batches(), [MIXED[0], plan(conv="w2")], quantizer=quantizer)


def test_it_prints_what_was_measured():
    plans = [mps.Plan({"a": mps.Precision("2"), "b": mps.Precision("8")})] * 25
    text = str(MeasuredPlans(tuple(plans), np.arange(25.0), np.full(25, 0.5), "nats"))
    first, *_, last = text.splitlines()
    assert first.split() == ["plan", "layers", "damage", "[nats]"]
    assert "1 w2, 1 w8" in text
    assert "1 ± 0.5" in text
    assert last == "... (25 plans)"
