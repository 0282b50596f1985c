"""The whole search, on nets with so few plans that all of them can be measured."""

import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.estimation.estimator import Estimate
from mpsearch.models.data.mixup import mixup
from mpsearch.models.data.splitting import split
from mpsearch.models.running import state_fingerprint
from mpsearch.plan_search import findings
from mpsearch.plan_search.data_parts import SHARES
from mpsearch.plan_search.strategies import budget as budget_strategy
from mpsearch.plan_search.strategies import finalists as finalists_module
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import FisherProjection, OutputGradient

PRECISIONS = "w2 w3 w4"
BUDGET = mps.Budget(average_bits=3)


def untrained(depth=4, width=10):
    torch.manual_seed(0)
    layers = [nn.Linear(6, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 4))


def data(count=160, size=32, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=g)
    w = torch.randn(6, 4, generator=torch.Generator().manual_seed(9))
    return list(zip(x.split(size), (x.tanh() @ w).argmax(1).split(size), strict=True))


@functools.cache
def trained():
    """Weights after some steps of Adam."""
    model = untrained()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        for x, y in data(512, 64, 3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.state_dict()


def net():
    """A trained net, a new one for each test."""
    model = untrained().eval()
    model.load_state_dict(trained())
    return model


def find(model=None, batches=None, budget=BUDGET, precisions=PRECISIONS, **options):
    options = {"progress": False, "max_passes": 14.0, **options}
    if "effort" in options:
        del options["max_passes"]
    return mps.search(
        net() if model is None else model,
        data() if batches is None else batches,
        budget,
        mps.precisions(precisions),
        **options,
    )


def same(first, second):
    """Equal to the last bit, but for the time they took."""
    assert dict(first.plan) == dict(second.plan)
    assert first.plan.predicted == second.plan.predicted
    assert (first.verdict, first.wins, first.passes) == (second.verdict, second.wins, second.passes)
    assert first.measured == second.measured
    assert first.uniform == second.uniform
    assert json.dumps(first.summary()["comparison"]) == json.dumps(second.summary()["comparison"])
    assert [dict(plan) for plan in first.plans.plans] == [dict(plan) for plan in second.plans.plans]
    assert first.plans.damage.tolist() == second.plans.damage.tolist()
    assert first.front.usage.tolist() == second.front.usage.tolist()
    assert list(first.tables) == list(second.tables)
    for name, table in first.tables.items():
        assert table.sensitivity.tolist() == second.tables[name].sensitivity.tolist()
    assert first.settings == second.settings


def uniforms(result):
    """Name -> (memory, damage) of the uniform plans that were measured on the select part."""
    return {
        str(next(iter(plan.values()))): (plan.usage["average_bits"], damage)
        for plan, damage in zip(result.plans.plans, result.plans.damage.tolist(), strict=True)
        if len(set(plan.values())) == 1
    }


def damage_of(result, plan):
    return next(
        damage
        for one, damage in zip(result.plans.plans, result.plans.damage.tolist(), strict=True)
        if dict(one) == dict(plan)
    )


class Runs:
    """Real runs of a model over the samples of all parts: forward, and twice the backward ones."""

    def __init__(self, model, total, last="6"):
        self.total, self.forward, self.backward = total, 0, 0
        self.lengths = []
        model.register_forward_pre_hook(self.ran)
        model.get_submodule(last).register_full_backward_hook(self.back)

    def ran(self, _module, args):
        self.forward += len(args[0])
        self.lengths.append(len(args[0]))

    def back(self, _module, _into, out):
        self.backward += len(out[0])

    @property
    def passes(self):
        return (self.forward + 2 * self.backward) / self.total


# ------------------------------------------------------------------------------------------------ the best plan


def test_the_default_search_finds_the_best_of_all_plans():
    """81 plans, every one measured by `evaluate` on the data that plans are selected on."""
    model = net()
    result = find(model, effort="default")
    parts = split(data(), SHARES, 0)
    seen = [*parts["select"], *parts["score"]]
    layers = list(result.plan)
    sizes = np.array([model.get_submodule(name).weight.numel() for name in layers])
    options = mps.precisions(PRECISIONS)
    kls = {}
    for bits in itertools.product(range(3), repeat=4):
        if (sizes * (np.array(bits) + 2)).sum() <= 3 * sizes.sum():
            plan = mps.Plan({name: options[p] for name, p in zip(layers, bits, strict=True)})
            kls[bits] = mps.evaluate(model, seen, plan)
    best = min(kls.values(), key=lambda found: found.kl)
    chosen = kls[tuple(options.index(precision) for precision in result.plan.values())]
    assert chosen.kl <= best.kl + best.kl_se
    recorded = result.plan.origin["search"]["select"]
    assert recorded["damage"] == pytest.approx(chosen.kl, abs=1e-9)
    assert recorded["se"] == pytest.approx(chosen.kl_se, abs=1e-9)
    assert result.passes <= result.settings["max_passes"] == 40 + 12


@pytest.mark.parametrize("budget", [2.2, 3.0, 3.7])
def test_never_worse_than_uniform_where_it_selects(budget):
    result = find(budget=mps.Budget(average_bits=budget), max_passes=20.0)
    parts = split(data(), SHARES, 0)
    seen = [*parts["select"], *parts["score"]]
    assert result.plan.usage["average_bits"] <= budget
    for precision in mps.precisions(PRECISIONS):
        if precision.weight_bits <= budget:
            uniform = mps.evaluate(net(), seen, mps.Plan(dict.fromkeys(result.plan, precision)))
            assert mps.evaluate(net(), seen, result.plan).kl <= uniform.kl or result.wins is False


def test_the_same_seed_gives_the_same_result_and_another_one_another_split():
    first, second, third = find(), find(), find(seed=1)
    same(first, second)
    assert first.plans.damage.tolist() != third.plans.damage.tolist()


def test_the_model_comes_back_and_so_do_random_states():
    model = net().train()
    before, state = state_fingerprint(model), torch.get_rng_state()
    find(model)
    assert state_fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------ passes


GOALS = {
    "budget": {},
    "front": {"front": True},
    "tolerance": {"budget": None, "tolerance": 0.1},
    "own": {"metric": lambda model, batch: float((model(batch[0]).argmax(1) == batch[1]).float().mean()), "higher_is_better": True},
}  # fmt: skip


@pytest.mark.parametrize("goal", list(GOALS))
@pytest.mark.parametrize("precisions", [PRECISIONS, "w2a8 w3a8 w4a8"])
@pytest.mark.parametrize("limit", [8.0, 12.0])
def test_real_runs_are_those_that_are_counted_and_never_more_than_allowed(limit, precisions, goal):
    """With few passes there are no partial runs, so hooks see them all."""
    model = net()
    runs = Runs(model, 160)
    options = {"max_passes": limit, **GOALS[goal]}
    if limit == 8.0 and (goal != "budget" or "a8" in precisions):  # may be too few, and then that is said
        with contextlib.suppress(mps.EstimatorError):
            find(model, precisions=precisions, **options)
        assert runs.passes <= limit
        return
    result = find(model, precisions=precisions, **options)
    assert result.passes == pytest.approx(runs.passes, abs=1e-3)
    assert runs.passes <= limit + 1e-9
    assert sum(result.settings["stages"].values()) <= result.passes + 1e-2


@pytest.mark.parametrize("options", [{}, {"front": True}])
def test_with_partial_runs_the_work_of_every_layer_is_counted(options, monkeypatch):
    """Multiplications of linear layers, forward; each sample of a whole run has so many."""
    model = net()
    work = 0.0
    real = nn.functional.linear

    def counted(x, weight, bias=None):
        nonlocal work
        work += x.shape[0] * weight.numel()
        return real(x, weight, bias)

    runs = Runs(model, 160)
    monkeypatch.setattr(nn.functional, "linear", counted)
    result = find(model, max_passes=21.0, **options)
    whole = 160 * sum(layer.weight.numel() for layer in model if isinstance(layer, nn.Linear))
    local = 8 * (3 + 1) * 0.35  # with each draw the sweep applies each layer alone, at each precision and as it is
    found = work / whole + 2 * runs.backward / 160
    assert found - local <= result.passes + 1e-6
    assert result.passes <= result.settings["max_passes"]


def test_too_few_passes_are_refused_with_the_number_that_is_enough():
    with pytest.raises(mps.EstimatorError, match="3 passes are too few") as caught:
        find(max_passes=3.0)
    enough = float(str(caught.value).split("take ")[1].split(";")[0])
    result = find(max_passes=enough + 0.001)
    assert result.passes <= enough + 0.001


def test_passes_of_finding_the_layers_are_not_counted_where_they_are_given():
    model = net()
    layers = mps.layers(model, data()[0])
    runs = Runs(model, 160)
    result = find(model, layers=layers)
    assert result.passes == pytest.approx(runs.passes, abs=1e-3)


def test_an_impossible_budget_is_refused_before_any_pass():
    model = net()
    runs = Runs(model, 160)
    with pytest.raises(mps.InfeasibleError, match=r"average_bits <= 1.5 cannot be met: the least any plan uses is 2"):
        find(model, budget=mps.Budget(average_bits=1.5))
    assert len(runs.lengths) <= 3  # one batch, to find who reads the weights, the layers and what they cost
    assert runs.backward == 0


def test_a_budget_of_effective_bits():
    result = find(net(), budget=mps.Budget(effective_bits=6.0))
    assert result.plan.usage["effective_bits"] <= 6.0
    assert result.front.over == "effective_bits"


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"batches": data(10)}, mps.EstimatorError, "10 samples are too few"),
        ({"metric": "lost"}, mps.EstimatorError, "unknown metric 'lost'; did you mean 'loss'"),
        ({"effort": "fats"}, mps.EstimatorError, "unknown effort 'fats'; did you mean 'fast'"),
        ({"max_passes": -1.0}, mps.EstimatorError, "max_passes=-1.0"),
        ({"max_passes": math.nan}, mps.EstimatorError, "max_passes=nan"),
        ({"budget": None}, mps.BudgetError, "nothing is asked for"),
        ({"budget": mps.Budget(memory_bytes="50%"), "tolerance": 0.1}, mps.BudgetError, "both minimized and limited"),
        ({"budget": None, "tolerance": 0.1, "front": True}, mps.BudgetError, "choose one"),
        ({"budget": None, "tolerance": -0.1}, mps.BudgetError, "tolerance=-0.1"),
        ({"budget": None, "tolerance": 0.1, "minimize": "memory"}, mps.BudgetError, "did you mean 'memory_bytes'"),
        ({"budget": mps.Budget(memory=1)}, mps.BudgetError, "memory"),
        ({"budget": {"average_bits": 3}}, mps.BudgetError, "expected mps.Budget(average_bits=4) or the like, got {'average_bits': 3}"),
        ({"batches": [x for x, _ in data()], "metric": "loss"}, mps.EstimatorError, "the loss needs labels, batch 0 of batches"),
        ({"report": [x for x, _ in data()], "metric": "accuracy"}, mps.EstimatorError, "batch 0 of report"),
        ({"report": [(x[:1], y[:1]) for x, y in data()[:2]]}, mps.EstimatorError, "2 to report"),
        ({"batches": []}, mps.EstimatorError, "empty"),
        ({"precisions": ""}, mps.MpsearchError, ""),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_any_pass(options, error, words):
    model = net()
    runs = Runs(model, 160)
    with pytest.raises(error) as caught:
        find(model, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert runs.forward <= 3 * 32
    assert state_fingerprint(model) == state_fingerprint(net())


def test_a_tolerance_out_of_reach():
    with pytest.raises(mps.InfeasibleError, match="no measured plan stays within the tolerance of 1e-09"):
        find(budget=None, tolerance=1e-9)


def test_a_model_that_gives_nan():
    class Nan(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.where(x[:, :1] > 1.5, torch.nan, 0.0)

    model = Nan(*net())
    before = state_fingerprint(model)
    with pytest.raises(mps.EstimatorError, match="finite"):
        find(model)
    assert state_fingerprint(model) == before


def test_a_metric_that_changes_the_model_is_found_out():
    def spoils(model, batch):
        with torch.no_grad():
            model[0].bias += 1e-3
        return float(model(batch[0]).sum())

    with pytest.raises(mps.EstimatorError, match=r"the metric or the loss, .* changed the model"):
        find(metric=spoils)


@pytest.mark.parametrize("options", [{}, {"layers": True, "resources": (), "budget": BUDGET}])
def test_the_kl_of_one_output_is_refused_before_any_pass(options):
    """Its softmax is 1, so that every plan would be called perfect."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    if "layers" in options:
        options["layers"] = mps.layers(model, data()[0])
    runs = Runs(model, 160, last="2")
    with pytest.raises(mps.EstimatorError, match=r"one output \(shape \(.*, 1\)\), so its KL is always 0; give metric"):
        find(model, **options, metric="kl")
    assert runs.forward <= 2 * 32
    assert runs.backward == 0


@pytest.mark.parametrize("limit", [8.0, 20.0])
def test_a_regression_with_a_metric_of_its_own(limit):
    """The best of all plans by squared error, each measured by `evaluate`."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        batches = [(x, model(x) + 0.01 * x[:, :1]) for x, _ in data()]

    def squared(model, batch):
        return float((model(batch[0]) - batch[1]).square().mean())

    runs = Runs(model, 160, last="4")
    result = find(model, batches, metric=squared, max_passes=limit)
    measured = [] if limit == 8.0 else ["output-damage"]
    assert list(result.tables) == ["fisher-projection", "output-gradient", *measured, "posterior"]
    assert result.passes <= limit
    if limit == 8.0:  # no partial runs
        assert runs.passes <= result.passes
    assert math.isnan(result.measured.kl)
    assert result.measured.metric is not None
    seen = [*split(batches, SHARES, 0)["select"], *split(batches, SHARES, 0)["score"]]
    sizes = np.array([48, 64, 8])
    found = {}
    for bits in itertools.product((2, 3, 4), repeat=3):
        if (sizes * bits).sum() <= 3 * sizes.sum():
            plan = mps.Plan({name: mps.Precision(str(b)) for name, b in zip(("0", "2", "4"), bits, strict=True)})
            found[bits] = mps.evaluate(model, seen, plan, metric=squared).metric
    if limit == 20.0:
        assert found[tuple(precision.weight_bits for precision in result.plan.values())] <= 1.1 * min(found.values())


@pytest.mark.parametrize("metric", ["kl", "loss"])
def test_a_part_whose_labels_are_all_ignored_is_refused(metric):
    batches = [(x, torch.full_like(y, -100)) for x, y in data()]
    with pytest.raises(mps.EstimatorError, match="every label of the score part is -100"):
        find(batches=batches, metric=metric)


def test_numbers_of_numpy_are_numbers(tmp_path):
    result = find(budget=None, tolerance=np.float32(0.5), seed=np.int64(3), max_passes=np.int64(14))
    result.save(tmp_path)
    found = mps.SearchResult.load(tmp_path)
    assert (found.settings["seed"], found.settings["tolerance"], found.settings["max_passes"]) == (3, 0.5, 14.0)


@pytest.mark.parametrize("kind", [list, np.asarray])
def test_labels_that_are_no_tensors_count_too(kind):
    expected = find(metric="loss")
    result = find(batches=[(x, kind(y.tolist())) for x, y in data()], metric="loss")
    assert result.plans.damage.tolist() == expected.plans.damage.tolist()
    assert result.measured == expected.measured
    other = [(x, kind((3 - y).tolist())) for x, y in data()]
    with pytest.raises(mps.EstimatorError, match="other data"):
        find(batches=other, metric="loss", previous=result)


# ------------------------------------------------------------------------------------------------ goals


@pytest.mark.parametrize("tolerance", [0.02, 0.1, 0.5, 100.0])
@pytest.mark.parametrize("limit", [14.0, 20.0])
def test_the_least_memory_within_a_tolerance(tolerance, limit):
    result = find(budget=None, tolerance=tolerance, max_passes=limit)
    assert damage_of(result, result.plan) <= tolerance
    within = [
        plan.usage["memory_bytes"]
        for plan, damage in zip(result.plans.plans, result.plans.damage.tolist(), strict=True)
        if damage <= tolerance
    ]
    assert result.plan.usage["memory_bytes"] == min(within)
    assert {"w2", "w3", "w4"} == set(uniforms(result))
    if tolerance == 100.0:
        assert {str(precision) for precision in result.plan.values()} == {"w2"}
        assert result.wins is False
    assert (result.wins is True) == (len(set(result.plan.values())) > 1)


def test_a_tolerance_within_a_budget_on_another_resource():
    result = find(budget=mps.Budget(bitops="24%"), tolerance=0.1, precisions="w2a8 w3a8 w4a8 w8a8", max_passes=19.0)
    assert result.plan.usage["bitops"] <= result.plan.budget["bitops"]
    assert damage_of(result, result.plan) <= 0.1


@pytest.mark.parametrize("budget", [BUDGET, None, mps.Budget(memory_bytes=500)])
def test_a_front_with_every_uniform_precision(budget, tmp_path):
    result = find(budget=budget, front=True, max_passes=20.0)
    assert set(uniforms(result)) == {"w2", "w3", "w4"}
    over = "average_bits" if budget is BUDGET else "memory_bytes"
    assert result.front.over == over
    assert (np.diff(result.front.usage) > 0).all()
    assert (np.diff(result.front.plans.damage) < 0).all()
    for plan, damage in zip(result.plans.plans, result.plans.damage.tolist(), strict=True):
        at = np.flatnonzero(result.front.usage <= plan.usage[over])
        assert result.front.plans.damage[at[-1]] <= damage
    if budget is not None:
        assert result.plan.usage[over] <= result.plan.budget[over]
        fitting = result.front.plans.damage[result.front.usage <= result.plan.budget[over]]
        if result.wins is not False:
            assert damage_of(result, result.plan) == fitting[-1]
    result.front.save(tmp_path / "front.csv")
    frame = result.front.to_frame()
    assert set(frame["uniform"]) == {"", "w2", "w3", "w4"}
    assert len(frame) == len((tmp_path / "front.csv").read_text().splitlines()) - 1


def test_select_and_report_of_ones_own():
    own = {"select": data(40, 20, 5), "report": data(24, 8, 6)}
    result = find(**own)
    assert result.settings["samples"] == {"score": 160, "select": 40, "report": 24}
    assert result.measured.num_samples == 24
    expected = mps.evaluate(net(), own["report"], result.plan)
    assert result.measured.kl == pytest.approx(expected.kl, abs=1e-9)


@pytest.mark.parametrize(
    ("goal", "keywords"),
    [
        (mps.WithinBudget(BUDGET), {"budget": BUDGET}),
        (mps.LeastResource("memory_bytes", tolerance=0.1), {"budget": None, "tolerance": 0.1}),
        (mps.WholeFront(budget=BUDGET), {"budget": BUDGET, "front": True}),
    ],
)
def test_a_goal_as_an_object_is_the_same_search_as_by_keywords(goal, keywords):
    same(find(budget=goal), find(**keywords))


def test_layers_by_options_in_one_object():
    groups = {"inner": ["2", "4"]}
    same(find(layers=mps.LayerOptions(exclude=["0"], groups=groups)), find(exclude=["0"], groups=groups))
    assert find(layers=mps.LayerOptions(fixed={"6": "w8"}), budget=mps.Budget(average_bits=4)).plan[
        "6"
    ] == mps.Precision("8")
    with pytest.raises(mps.TableError, match=r"layers=LayerOptions\(...\) and exclude= at once"):
        find(layers=mps.LayerOptions(), exclude=["0"])


@dataclass
class Listed:
    """Proposes plans in a list, as often as it is asked."""

    plans: list[list[int]]

    def propose(self, record, posterior):
        return np.array(self.plans.pop(0)) if self.plans else None


def test_proposers_of_ones_own_name_the_plans():
    result = find(proposers=[Listed([[0, 1, 1, 1], [1, 0, 1, 2], [2, 1, 0, 1]])], max_passes=30.0)
    assert result.passes < 15  # nobody knew more
    assert result.settings["proposers"] == ["Listed(plans=[])"]
    by_name = find(proposers=["moves"], max_passes=20.0)
    assert dict(by_name.plan) != {}
    assert "proposers" not in find().settings


def test_a_proposer_that_leaves_the_budget_is_told_and_the_model_comes_back():
    model = net()
    with pytest.raises(
        mps.PlanError, match=r"proposed a plan that breaks a limit: it uses 4, expected average_bits <= 3"
    ):
        find(model, proposers=[Listed([[2, 2, 2, 2]])])
    assert state_fingerprint(model) == state_fingerprint(net())


@pytest.mark.parametrize("higher", [True, False])
def test_a_metric_with_a_direction(higher):
    def metric(model, batch):
        right = float((model(batch[0]).argmax(1) == batch[1]).double().mean())
        return right if higher else 1 - right

    result = find(metric=metric, higher_is_better=higher, max_passes=20.0)
    change = result.measured.reference.metric - result.measured.metric
    (one,) = [one for one in result.comparison if one.role == "plan"]
    assert one.damage == pytest.approx(change if higher else -change, abs=1e-12)
    assert result.plans.unit == "relative"
    by_accuracy = find(metric="accuracy", max_passes=20.0)
    assert set(map(tuple, (p.items() for p in by_accuracy.plans.plans))) & set(
        map(tuple, (p.items() for p in result.plans.plans))
    )
    for plan, damage in zip(by_accuracy.plans.plans, by_accuracy.plans.damage.tolist(), strict=True):
        for other, value in zip(result.plans.plans, result.plans.damage.tolist(), strict=True):
            if dict(plan) == dict(other):
                assert value == pytest.approx(damage, abs=1e-9)


@dataclass(frozen=True)
class Fixed:
    """Says which layers matter."""

    scores: tuple[float, ...]

    def estimate(self, context):
        bits = np.array([option.weight_bits for option in context.precisions])
        return Estimate(np.array(self.scores)[:, None] * 4.0**-bits, unit="relative")


def test_estimators_of_ones_own():
    ones = [Fixed((1.0, 1.0, 1.0, 9.0)), Fixed((9.0, 1.0, 1.0, 1.0))]
    result = find(estimators=ones)
    assert list(result.tables) == ["Fixed-1", "Fixed-2", "posterior"]
    assert result.tables["Fixed-2"].sensitivity[0, 0] == 9 / 16
    assert result.surrogate is None
    with pytest.raises(mps.EstimatorError, match="Fixed has negative scores"):
        find(estimators=[Fixed((-1.0, 1.0, 1.0, 1.0))])


def test_groups_share_a_precision():
    result = find(groups={"inner": ["2", "4"]}, max_passes=20.0)
    assert result.plan["2"] == result.plan["4"]
    assert all(plan["2"] == plan["4"] for plan in result.plans.plans)
    (row,) = {tuple(row) for row in result.tables["posterior"].sensitivity[1:3].tolist()}
    assert len(row) == 3


def test_unquantized_options_and_a_budget_that_takes_them():
    """A plan without any damage: nothing breaks down at 0."""
    result = find(precisions="w2 w8 w16", budget=mps.Budget(average_bits=16), max_passes=16.0)
    assert {str(precision) for precision in result.plan.values()} == {"w16"}
    assert result.measured.kl == 0
    tight = find(precisions="w2 w8 w16", budget=mps.Budget(average_bits=6), max_passes=16.0)
    assert tight.plan.usage["average_bits"] <= 6


def test_one_precision_alone():
    result = find(precisions="w3")
    assert (result.wins, {str(p) for p in result.plan.values()}) == (False, {"w3"})


# ------------------------------------------------------------------------------------------------ verdict


@dataclass(frozen=True)
class Only:
    """A quantizer under which plans are as good as the noise that it adds, by precision and layer."""

    noise: tuple[tuple[float, ...], ...]

    def of_layer(self, name):
        row = self.noise[int(name) // 2]
        return lambda weight, precision: weight * (1 + row[precision.weight_bits - 2])


UNIFORM_IS_BEST = Only(((2.0, 0.0, 2.0),) * 4)
MIXED_IS_BEST = Only(((0.0, 1.0, 0.0), (0.9, 0.9, 0.0), (0.0, 1.0, 0.9), (0.0, 1.0, 0.0)))
ALL_ARE_EQUAL = Only(((0.1, 0.1, 0.1),) * 4)


def test_uniform_is_best_and_is_returned(tmp_path):
    result = find(quantizer=UNIFORM_IS_BEST)
    assert result.wins is False
    assert {str(precision) for precision in result.plan.values()} == {"w3"}
    assert result.verdict == "uniform w3 is the best plan found"
    assert result.comparison[0].role == "plan"
    assert result.comparison[0].evaluation == result.measured == result.uniform[1]
    result.save(tmp_path)
    assert dict(mps.Plan.load(tmp_path / "plan.json")) == dict(result.plan)
    assert json.loads((tmp_path / "summary.json").read_text())["wins"] is False


def test_mixed_is_best():
    result = find(quantizer=MIXED_IS_BEST, report=data(400, 100, 7), max_passes=19.0)
    assert result.wins is True
    assert "mixed precision wins by" in result.verdict
    uniform = next(one for one in result.comparison if one.role == "uniform")
    assert uniform.difference > 2 * uniform.difference_se
    assert uniform.damage - result.comparison[0].damage == pytest.approx(uniform.difference)


def test_no_difference():
    result = find(quantizer=ALL_ARE_EQUAL)
    assert result.wins in (None, False)
    if result.wins is None:
        assert "no measurable difference" in result.verdict


def test_uniform_is_better_on_the_report_part_and_is_returned():
    """The report data knows another truth than the data that plans are selected on."""

    @dataclass(frozen=True)
    class Turned:
        def __call__(self, model, batch):
            mixed = len({round(float(layer.weight.abs().max()) * 8) % 2 for layer in model[::2]})
            shift = float(batch[0].mean())
            return float(mixed) if shift > 100 else -float(mixed)

    @dataclass(frozen=True)
    class Marked:
        """Leaves its precision in the weight: an even or odd number of eighths, at w3 always even."""

        def of_layer(self, name):
            odd = int(name) // 2 % 2

            def quantize(weight, precision):
                found = torch.zeros_like(weight)
                found.view(-1)[0] = (2 if precision.weight_bits == 3 else 2 + odd) / 8
                return found

            return quantize

    report = [(x + 200, y) for x, y in data(64, 8, 7)]
    result = find(
        quantizer=Marked(),
        metric=Turned(),
        report=report,
        max_passes=16.0,
        precisions="w3 w4",
        budget=mps.Budget(average_bits=3.5),
    )
    assert result.wins is False
    assert "uniform is better: w3 by 1" in result.verdict
    assert {str(precision) for precision in result.plan.values()} == {"w3"}
    assert {one.role for one in result.comparison} >= {"plan", "uniform", "mixed"}
    mixed = next(one for one in result.comparison if one.role == "mixed")
    assert mixed.difference == pytest.approx(1.0)
    assert result.comparison[0].evaluation == result.measured == result.uniform[1]
    assert dict(result.plan) == {name: mps.Precision("3") for name in result.plan}


def test_the_report_part_is_not_touched_before_the_report(monkeypatch):
    model = net()
    report = [(torch.full_like(x, 0.25), y) for x, y in data(24, 8, 6)]
    touched, reporting = [], []
    model.register_forward_pre_hook(
        lambda _, args: touched.append(bool(reporting)) if bool((args[0] == 0.25).all()) else None
    )
    real = findings.report_on  # type: ignore[attr-defined]

    def report_on(*args):
        reporting.append(True)
        return real(*args)

    monkeypatch.setattr(findings, "report_on", report_on)
    find(model, report=report)
    assert touched
    assert all(touched)


# ------------------------------------------------------------------------------------------------ again


def test_another_budget_pays_only_for_what_is_new(tmp_path):
    first = find(max_passes=20.0)
    model = net()
    runs = Runs(model, 160)
    second = find(model, budget=mps.Budget(average_bits=2.5), max_passes=20.0, previous=first)
    assert second.settings["stages"]["tables"] == 0
    assert runs.backward == 0
    assert second.plan.usage["average_bits"] <= 2.5
    fresh = find(budget=mps.Budget(average_bits=2.5), max_passes=20.0)
    assert second.tables["kl-divergence"].sensitivity.tolist() == fresh.tables["kl-divergence"].sensitivity.tolist()
    assert damage_of(second, second.plan) <= damage_of(fresh, fresh.plan) + 1e-12 or second.wins is False
    first.save(tmp_path)
    same(second, find(budget=mps.Budget(average_bits=2.5), max_passes=20.0, previous=tmp_path))
    again = find(max_passes=20.0, previous=second)
    assert again.passes < 0.5 * first.passes


@pytest.mark.parametrize(("before", "limit"), [(18.0, 10.0), (60.0, 30.0)])
@pytest.mark.parametrize("options", [{}, {"front": True}, {"budget": None, "tolerance": 0.05}])
def test_no_plan_that_is_known_is_forgotten(before, limit, options):
    """A second search measures few plans, and is no worse than any that the first one measured within the budget."""
    first = find(max_passes=before, precisions="w2 w3 w4 w6", **options)
    second = find(budget=mps.Budget(average_bits=2.8), max_passes=limit, precisions="w2 w3 w4 w6", previous=first)
    known, found = (
        {tuple(plan.items()): damage for plan, damage in zip(one.plans.plans, one.plans.damage.tolist(), strict=True)}
        for one in (first, second)
    )
    assert known.items() <= found.items()
    fitting = [known[tuple(plan.items())] for plan in first.plans.plans if plan.usage["average_bits"] <= 2.8]
    if limit > 20 and second.wins is not False:
        best = min(fitting)
        assert damage_of(second, second.plan) <= best + 0.1 * best  # as good, and better between the samples


def test_tables_that_were_filled_are_free_where_fewer_are_asked_for():
    first = find(max_passes=60.0)
    model = net()
    layers = mps.layers(model, data()[0])
    runs = Runs(model, 160)
    second = find(
        model, max_passes=21.0, layers=layers, previous=first, estimators=[FisherProjection(8), OutputGradient(8)]
    )
    assert second.settings["stages"]["tables"] == 0
    assert runs.backward == 0


def test_an_earlier_search_for_something_else_is_refused_with_what_differs():
    first = find()
    other = net()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    for options, words in (
        ({"model": other}, "other weights"),
        ({"batches": data(160, 32, 2)}, "other data"),
        ({"seed": 1}, "other parts: it has score: 88 select: 40 report: 32, seed 0, this run has .* seed 1"),
        ({"precisions": "w2 w4"}, "other precisions: it has w2 w3 w4, this run has w2 w4"),
        ({"metric": "loss"}, "other metric: it has kl, this run has loss"),
        ({"quantizer": RoundToNearest(scale="max")}, "other quantizer"),
        ({"exclude": ["0"]}, "other layers"),
    ):
        with pytest.raises(mps.EstimatorError, match=f"the previous search was for {words}"):
            find(previous=first, **options)


@pytest.mark.parametrize("after", [5, 60])
def test_an_interrupt_leaves_the_model_and_the_checkpoint_usable(tmp_path, after):
    expected = find(max_passes=20.0)
    model = net()
    before = state_fingerprint(model)
    calls = itertools.count()

    def interrupts(_module, _args):
        if next(calls) == after:
            raise KeyboardInterrupt

    handle = model[4].register_forward_pre_hook(interrupts)
    with pytest.raises(KeyboardInterrupt):
        find(model, max_passes=20.0, checkpoint=tmp_path / "run.db")
    handle.remove()
    assert state_fingerprint(model) == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    same(find(model, max_passes=20.0, checkpoint=tmp_path / "run.db"), expected)


def test_a_finished_checkpoint_gives_the_result_without_running_plans(tmp_path):
    first = find(checkpoint=tmp_path / "run.db")
    model = net()
    runs = Runs(model, 160)
    second = find(model, checkpoint=tmp_path / "run.db")
    same(second, first)
    assert runs.passes < 0.4 * first.passes
    assert first.passes_in_this_run == first.passes
    assert 0 < second.passes_in_this_run < 0.4 * first.passes
    assert "of which in this run" not in first.spent
    assert f"(of which in this run {second.passes_in_this_run:.4g})" in second.spent


def test_an_interrupted_search_on_an_earlier_result_goes_on_as_it_would_have(tmp_path):
    first = find(max_passes=20.0)
    options = {"budget": mps.Budget(average_bits=2.6), "previous": first, "max_passes": 20.0}
    expected = find(**options)
    model = net()
    calls = itertools.count()

    def interrupts(_module, _args):
        if next(calls) == 25:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupts)
    with pytest.raises(KeyboardInterrupt):
        find(model, checkpoint=tmp_path / "run.db", **options)
    handle.remove()
    same(find(model, checkpoint=tmp_path / "run.db", **options), expected)


SCRIPT = f"""
import functools, itertools, json, os, signal, sys
import torch
from torch import nn
import mpsearch as mps
from mpsearch.checkpoints.sqlite import SQLiteStore

{"".join(map(inspect.getsource, (untrained, data, trained, net)))}

put, numbers = SQLiteStore.put, itertools.count(1)
def counted(self, key, value, passes=None):
    put(self, key, value, passes)
    if next(numbers) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
SQLiteStore.put = counted
result = mps.search(net(), data(), mps.Budget(average_bits=3), mps.precisions("w2 w3 w4"), max_passes=20.0,
                    checkpoint=sys.argv[2], progress=False)
print(json.dumps({{**result.summary(), "seconds": 0, "damage": result.plans.damage.tolist(),
                  "plan": {{k: str(v) for k, v in result.plan.items()}}}}))
"""


def killed_and_resumed(tmp_path, kills):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(left, path):
        return subprocess.run(
            [sys.executable, str(script), str(left), str(path)], capture_output=True, text=True, env=os.environ
        )

    expected = run(0, tmp_path / "whole.db")
    assert expected.returncode == 0, expected.stderr
    for left in kills:
        assert run(left, tmp_path / "run.db").returncode == -signal.SIGKILL
    found = run(0, tmp_path / "run.db")
    assert found.returncode == 0, found.stderr
    assert found.stdout == expected.stdout


def test_killed_and_run_again_it_ends_with_the_same_result(tmp_path):
    """Once among the single perturbations, once among the plans."""
    killed_and_resumed(tmp_path, [25, 60])


@pytest.mark.slow
def test_killed_many_times(tmp_path):
    killed_and_resumed(tmp_path, [1, 2, 7, 13, 20, 20, 30, 11, 9, 5])


@pytest.fixture
def runs(monkeypatch):
    """Of every search its evaluators, and the plan search that ended."""
    ended = []
    real = finalists_module.best_plan

    def best_plan(context, search, uniform):
        ended.append((context.evaluators, search))
        return real(context, search, uniform)

    monkeypatch.setattr(budget_strategy, "best_plan", best_plan)
    return ended


@pytest.mark.parametrize(("errors", "left"), [(1.0, 1), (100.0, 3)])
def test_among_plans_as_good_as_the_best_the_one_that_is_best_between_the_samples_too(runs, monkeypatch, errors, left):
    monkeypatch.setattr(finalists_module, "_AS_GOOD", errors)
    result = find(max_passes=60.0)
    ((evaluators, search),) = runs
    parts = split(data(), SHARES, 0)
    seen = [*parts["select"], *parts["score"]]
    between = mixup(evaluators.select.batches, 0, 3)
    assert sum(len(x) for x, _ in between) == 3 * sum(len(x) for x, _ in seen)

    def divergences(plan, batches):
        model, fake = net(), net()
        for name, precision in plan.items():
            weight = fake.get_submodule(name).weight
            weight.data = RoundToNearest()(weight.data, precision)
        with torch.no_grad():
            pairs = [(model(x).double().log_softmax(1), fake(x).double().log_softmax(1)) for x, _ in batches]
        return torch.cat([(p.exp() * (p - q)).sum(1) for p, q in pairs]).numpy()

    uniform = min(damage for bits, damage in uniforms(result).values() if bits <= 3)
    fitting = [plan for plan in result.plans.plans if plan.usage["average_bits"] <= 3]
    here = {tuple(map(str, plan.values())): divergences(plan, seen) for plan in fitting}
    best = min(here.values(), key=np.mean)
    as_good = {}
    for plan in fitting:
        worse = here[tuple(map(str, plan.values()))] - best
        if (
            tuple(map(PRECISIONS.split().index, map(str, plan.values())))
            in search.record.measured  # between the samples too
            and worse.mean() <= errors * worse.std(ddof=1) / len(worse) ** 0.5 + 1e-12
            and here[tuple(map(str, plan.values()))].mean() <= uniform + 1e-9
        ):
            there = divergences(plan, between)
            first = there[: len(worse)].mean()  # one draw of partners, as long as the data
            as_good[tuple(map(str, plan.values()))] = worse.mean() + first, worse.mean() + there.mean()
    finalists = sorted(as_good, key=lambda name: as_good[name][0])[:3]  # a tenth of 60 passes, 1.6 for the other draws
    assert len(finalists) == left
    assert tuple(map(str, result.plan.values())) == min(finalists, key=lambda name: as_good[name][1])


@pytest.mark.parametrize("options", [{"max_passes": 14.0}, {"metric": "loss"}, {"max_passes": 24.0}])
def test_no_samples_in_between_where_passes_are_few_or_labels_are_needed(runs, options):
    find(**{"max_passes": 60.0, **options})
    assert runs[0][0].between is None
