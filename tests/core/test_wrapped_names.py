"""Plans of compiled and wrapped models fit the plain model, and the other way round."""

import copy

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.core.wrapped_names import by_names_of, plain
from mpsearch.imports import import_plan
from mpsearch.models.unwrapping import unwrapped
from mpsearch.sensitivity import KLDivergence


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 32), nn.ReLU()), nn.Linear(32, 3)
    ).eval()


def partly(model):
    """One block compiled on its own."""
    model[2] = torch.compile(model[2])
    return model


WRAPS = {
    "compiled": torch.compile,
    "data parallel": nn.DataParallel,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "data parallel of compiled": lambda model: nn.DataParallel(torch.compile(model)),
    "a compiled block": partly,
}
DATA = [torch.randn(8, 32, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def plan():
    return mps.Plan({"0": mps.Precision("2", "8"), "2.0": mps.Precision("4"), "3": mps.Precision("8")})


def wrapped_plan(wrapped):
    layers = [layer.name for layer in mps.layers(wrapped, DATA[0])]
    assert any(name not in plan() for name in layers)
    return mps.Plan(dict(zip(layers, plan().values(), strict=True)))


@pytest.mark.parametrize("wrap", WRAPS)
def test_plans_fit_both_ways(wrap):
    model, wrapped = net(), WRAPS[wrap](net())
    expected = mps.evaluate(model, DATA, plan(), progress=False).kl
    renamed = wrapped_plan(wrapped)
    for measured, one in ((model, renamed), (wrapped, plan()), (wrapped, renamed)):
        assert mps.evaluate(measured, DATA, one, progress=False).kl == pytest.approx(expected, rel=1e-6)
    damage = mps.measure_plans(model, DATA, [plan(), renamed], progress=False).damage
    assert damage.tolist() == pytest.approx([expected, expected], rel=1e-6)
    with pytest.raises(mps.PlanError, match=r"_orig_mod\.4"):
        mps.evaluate(model, DATA, mps.Plan({"_orig_mod.4": mps.Precision("4")}), progress=False)


@pytest.mark.parametrize("wrap", [name for name in WRAPS if name != "a compiled block"])
def test_other_tools_get_the_names_of_the_plain_model(wrap, tmp_path):
    weights = mps.Plan({name: mps.Precision(precision.weight) for name, precision in plan().items()})
    model, wrapped = net(), WRAPS[wrap](net())
    renamed = mps.Plan(dict(zip((x.name for x in mps.layers(wrapped, DATA[0])), weights.values(), strict=True)))
    expected = export.modelopt(weights, model)
    for target, one in ((model, renamed), (wrapped, weights), (wrapped, renamed)):
        assert export.modelopt(one, target) == expected
        assert export.neutral(one, target) == export.neutral(weights, model)
        assert dict(export.snapped(one, unwrapped(target), "modelopt").plan) == dict(weights)
    if wrap == "compiled":  # without a model the prefix of torch.compile goes
        assert export.modelopt(renamed) == export.modelopt(weights)
    export.compressed_tensors(weights, model, path=tmp_path)
    assert dict(import_plan(tmp_path, "compressed-tensors", wrapped)) == dict(renamed)
    assert dict(import_plan(tmp_path, "compressed-tensors", model)) == dict(weights)


def test_a_search_of_a_compiled_model_goes_on_with_the_plain_one():
    settings = {"max_passes": 30, "progress": False}
    options, budget = mps.precisions("w2 w4 w8"), mps.Budget(average_bits=4)
    first = mps.search(torch.compile(net()), DATA, budget, options, **settings)
    again = mps.search(net(), DATA, budget, options, previous=first, **settings)
    assert list(again.plan) == ["0", "2.0", "3"]
    assert again.passes < 0.5 * first.passes
    fixed = mps.search(net(), DATA, None, options, tolerance=9.0, fixed=first.plan, **settings)
    assert list(fixed.plan.values()) == list(first.plan.values())


def test_a_checkpoint_of_a_compiled_model_serves_the_plain_one(tmp_path):
    options = mps.precisions("w2 w4")
    first = mps.profile(
        torch.compile(net()), DATA, KLDivergence(), options, checkpoint=tmp_path / "c.db", progress=False
    )
    again = mps.profile(net(), DATA, KLDivergence(), options, checkpoint=tmp_path / "c.db", progress=False)
    assert again.sensitivity.tolist() == first.sensitivity.tolist()
    assert again.origin["passes_in_this_run"]["forward"] < 0.5 * first.origin["passes_in_this_run"]["forward"]


def test_what_may_be_two_layers_is_refused():
    names = ["a", "module.a", "b", "x.module.c"]
    own = mps.Plan({"a": mps.Precision("2"), "module.a": mps.Precision("4")})
    assert by_names_of(own, names) is own
    with pytest.raises(mps.PlanError, match=r"'_orig_mod\.a' may be 'a' or 'module\.a': rename it"):
        by_names_of(mps.Plan({"_orig_mod.a": mps.Precision("2")}), names)
    with pytest.raises(mps.PlanError, match=r"'b' and 'module\.b' of the plan are both the layer 'b'"):
        by_names_of(mps.Plan({"b": mps.Precision("2"), "module.b": mps.Precision("2")}), names)
    assert list(by_names_of(mps.Plan({"x.c": mps.Precision("2"), "q": mps.Precision("2")}), names)) == [
        "x.module.c",
        "q",
    ]


def test_names_without_wrappers():
    assert plain("module._orig_mod.a (module.b, same input)") == "a (b, same input)"
    assert plain("my_module.x") == "my_module.x"
    inner = net()
    assert unwrapped(nn.DataParallel(torch.compile(inner))) is inner
    holder = nn.ModuleDict({"module": inner})  # of the user's own: its checkpoints have the prefix
    assert unwrapped(holder) is holder
    assert unwrapped(None) is None


def test_the_model_stays_wrapped():
    wrapped = torch.compile(net())
    before = copy.deepcopy(wrapped.state_dict())  # type: ignore[attr-defined]
    export.neutral(plan(), wrapped)
    mps.evaluate(wrapped, DATA, plan(), progress=False)
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())  # type: ignore[attr-defined]
    assert list(wrapped._modules) == ["_orig_mod"]  # type: ignore[attr-defined]
