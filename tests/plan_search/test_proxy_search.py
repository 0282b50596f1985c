"""`evolve_proxy` on damage that a known formula made, and what it does when it is killed."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import mpsearch as mps
from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.estimation.proxies.evolution import ProxyEvolution
from mpsearch.estimation.proxies.inputs import weight_inputs
from mpsearch.plan_search.proxy_search import ProxyTruth, evolve_proxy
from mpsearch.sensitivity.evolved_proxy import EvolvedProxy

OPTIONS = mps.precisions("w2 w3 w4 w8")
PLANTED = "mean(hessian) * square(frobenius(weight))"
SMALL = ProxyEvolution(generations=2, population=8)
LEAST = ProxyEvolution(generations=0, population=4)


def cnn(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 12),
        nn.Tanh(),
        nn.Linear(12, 12),
        nn.Tanh(),
        nn.Linear(12, 5),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(float(torch.rand(()) * 3 + 0.3))
    return model


def other_forward():
    """The same weights."""
    model = cnn()
    model[1] = nn.Tanh()
    return model


def images(seed=0):
    return [torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) for _ in range(2)]


def random_plans(names, count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        mps.Plan({name: OPTIONS[p] for name, p in zip(names, row, strict=True)})
        for row in rng.integers(0, 4, (count, len(names)))
    ]


def planted(formula=PLANTED, seed=0, count=60, power=1.0):
    """A model, and plans with the damage that a formula predicts, to a power."""
    table = mps.profile(cnn(seed), images(), EvolvedProxy(formula), OPTIONS, progress=False)
    plans = random_plans([layer.name for layer in table.layers], count, seed)
    return ProxyTruth(cnn(seed), images(), MeasuredPlans(plans, predicted(table, plans) ** power))


def predicted(table, plans):
    rows = {layer.name: row for row, layer in enumerate(table.layers)}
    return np.array([sum(table.sensitivity[rows[n], OPTIONS.index(p)] for n, p in plan.items()) for plan in plans])


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_proxy_is_found(seed):
    found = evolve_proxy(planted(), ProxyEvolution(generations=15, population=20, seed=seed), progress=False)
    assert found.origin["fitness"] > 0.95
    other = planted(count=200, seed=0)  # plans that it was not evolved on
    table = mps.profile(other.model, other.batches, found, OPTIONS, progress=False)
    truth = other.measured
    assert stats.spearmanr(predicted(table, truth.plans[60:]), truth.damage[60:]).statistic > 0.95


def test_the_fitness_by_profile_and_scipy():
    """Two models, one with two sets of plans; correlations of tables that `profile` makes."""
    first, second = planted("abs(weight)", 0), planted("gradient * gradient", 1)
    plans = first.measured
    several = [MeasuredPlans(plans.plans[a:b], plans.damage[a:b]) for a, b in ((0, 20), (20, 60))]
    found = evolve_proxy([ProxyTruth(first.model, first.batches, several), second], SMALL, seed=3, progress=False)
    expected = []
    for truth, sets in ((first, several), (second, [second.measured])):
        table = mps.profile(truth.model, truth.batches, found, OPTIONS, progress=False)
        expected.append([stats.spearmanr(predicted(table, one.plans), one.damage).statistic for one in sets])
    for mine, plain in zip(found.origin["correlations"], expected, strict=True):
        assert mine == pytest.approx(plain)
    assert found.origin["fitness"] == pytest.approx(np.mean([np.mean(one) for one in expected]))
    assert (found.seed, found.num_samples) == (3, 4)


def test_fitness_knows_ranks_only():
    one, other = (evolve_proxy(planted(power=power), SMALL, progress=False) for power in (1.0, 0.1))
    assert (one, one.origin["fitness"]) == (other, other.origin["fitness"])


def test_seeds():
    first, again = (evolve_proxy(planted(), SMALL, progress=False) for _ in range(2))
    other = evolve_proxy(planted(), ProxyEvolution(generations=2, population=8, seed=1), progress=False)
    assert first.origin == again.origin
    assert first.origin["runners_up"] != other.origin["runners_up"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 23])
def test_killed_and_resumed_is_uninterrupted(tmp_path, monkeypatch, after):
    whole = evolve_proxy(planted(), SMALL, progress=False)
    put, puts = SQLiteStore.put, []

    def counted(self, key, value):
        puts.append(key)
        if len(puts) == after:
            raise Killed
        put(self, key, value)

    monkeypatch.setattr(SQLiteStore, "put", counted)
    with pytest.raises(Killed):
        evolve_proxy(planted(), SMALL, checkpoint=tmp_path / "run.db", progress=False)
    killed, puts[:] = puts[:-1], []
    after = -1
    found = evolve_proxy(planted(), SMALL, checkpoint=tmp_path / "run.db", progress=False)
    assert (found, found.origin) == (whole, whole.origin)
    assert not set(killed) & set(puts)  # nothing is computed again
    assert len(killed) + len(puts) == whole.origin["trees"]
    puts.clear()
    longer = ProxyEvolution(generations=3, population=8)  # the file serves another search too
    assert evolve_proxy(planted(), longer, checkpoint=tmp_path / "run.db", progress=False) == evolve_proxy(
        planted(), longer, progress=False
    )
    assert 0 < len(puts) < whole.origin["trees"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"truth": planted(seed=1)}, "other weights"),
        ({"truth": ProxyTruth(cnn(), images(5), planted().measured)}, "other data"),
        ({"seed": 1}, "other seed"),
        ({"num_samples": 2}, "other num_samples"),
        (
            {"truth": ProxyTruth(cnn(), images(), planted().measured, loss=lambda m, x: m(x).square().mean())},
            "other loss",
        ),
        ({"truth": ProxyTruth(other_forward(), images(), planted().measured)}, "another output of model 0"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, words):
    evolve_proxy(planted(), LEAST, checkpoint=tmp_path / "run.db", progress=False)
    given = {"truth": planted(), **change}
    with pytest.raises(mps.EstimatorError, match=words):
        evolve_proxy(given.pop("truth"), LEAST, checkpoint=tmp_path / "run.db", progress=False, **given)


def test_layers_that_the_plans_leave_out_play_no_part():
    names = ["0", "4", "7", "11"]
    plans = random_plans(names, 30)
    layers = [layer for layer in mps.layers(cnn(), images()[0]) if layer.name in names]
    table = mps.profile(cnn(), images(), EvolvedProxy("abs(weight)"), OPTIONS, layers=layers, progress=False)
    truth = ProxyTruth(cnn(), images(), MeasuredPlans(plans, predicted(table, plans)))
    assert evolve_proxy(truth, SMALL, progress=False).origin["fitness"] > 0.9


def test_inputs_without_a_prior_are_not_computed(monkeypatch):
    computed = []

    def counted(context, names, **settings):
        computed.extend(names)
        return weight_inputs(context, names, **settings)

    monkeypatch.setattr("mpsearch.plan_search.proxy_search.weight_inputs", counted)
    without = ProxyEvolution(generations=1, population=8, priors={"hessian": 0, "activation": 0})
    found = evolve_proxy(planted(), without, progress=False)
    assert computed == ["weight", "gradient", "virtual_gradient"]
    assert found.origin["evolution"]["priors"] == {"hessian": 0, "activation": 0}


def test_the_quantizer_and_the_loss_are_used():
    def coarse(weight, precision):
        return weight * (1 + 1 / precision.weight_bits)  # the same relative error in every layer

    truth = planted("abs(gradient)")
    with_loss = ProxyTruth(truth.model, truth.batches, truth.measured, coarse, lambda m, x: m(x).square().mean())
    assert evolve_proxy(truth, SMALL, progress=False).origin != evolve_proxy(with_loss, SMALL, progress=False).origin
    found = evolve_proxy(with_loss, SMALL, progress=False)
    settings = {"quantizer": coarse, "loss": with_loss.loss, "progress": False}
    table = mps.profile(truth.model, truth.batches, found, OPTIONS, **settings)
    plain = stats.spearmanr(predicted(table, truth.measured.plans), truth.measured.damage).statistic
    assert found.origin["correlations"][0][0] == pytest.approx(plain)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_the_model_comes_back(error):
    truth = planted()
    model = truth.model.train()
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(m, x):
        if error:
            raise error
        return m(x).square().mean()

    given = ProxyTruth(model, truth.batches, truth.measured, loss=loss)
    if error:
        with pytest.raises(error):
            evolve_proxy(given, SMALL, progress=False)
    else:
        evolve_proxy(given, SMALL, progress=False)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.training
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]


def test_progress_is_quiet_where_there_is_no_terminal(capfd):
    evolve_proxy(planted(), SMALL)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        ([], "no measured plans"),
        (MeasuredPlans(random_plans("04", 2), [1, 2]), "2 measured plans in set 0, expected 3 or more"),
        (MeasuredPlans(random_plans("04", 5), np.ones(5)), "none of .* trees"),
        (MeasuredPlans(random_plans(["0"], 5), np.arange(5)), "none of .* trees"),  # one layer: nothing to tell apart
        (MeasuredPlans(random_plans(["0", "99"], 5), np.arange(5)), "'99', which is no layer"),
    ],
)
def test_what_cannot_be_searched_is_refused(measured, words):
    with pytest.raises(mps.MpsearchError, match=words):
        evolve_proxy(ProxyTruth(cnn(), images(), measured), SMALL, progress=False)
    with pytest.raises(mps.EstimatorError, match="no truth given"):
        evolve_proxy([], progress=False)
