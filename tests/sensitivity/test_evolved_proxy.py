"""Proxies as formulas: the published ones against their own estimators, and the file."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models.loading import part
from mpsearch.sensitivity import EMQ, SNIP, GradientWeight, HessianTrace
from mpsearch.sensitivity.evolved_proxy import EvolvedProxy
from mpsearch.testing import check_estimator

PUBLISHED = "mean(softmax(log_abs(virtual_gradient)) * sqrt(relu(weight)))"
OPTIONS = mps.precisions("w2 w4")


class Net(nn.Module):
    """Every layout of weights: tokens, a plain and a transposed convolution, a group of two linear layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, groups=2)
        self.back = nn.ConvTranspose1d(8, 6, 2, groups=2)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.relu(self.conv(self.embedding(x).transpose(1, 2)))
        return self.two(torch.tanh(self.one(self.back(x).mean(2))))


def net():
    torch.manual_seed(0)
    return Net()


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(7, (n, 5), generator=generator) for n in (4, 3)]


def table(estimator, model=None, **settings):
    return mps.profile(net() if model is None else model, data(), estimator, OPTIONS, progress=False, **settings)


def sizes():
    """(L, 1) elements of each row's weight; a row of the shared weight has its part."""
    return np.array([[layer.numel] for layer in mps.layers(net(), data()[0])], float)


def test_the_published_proxy_as_a_formula():
    np.testing.assert_allclose(table(EvolvedProxy(PUBLISHED)).sensitivity, table(EMQ()).sensitivity, rtol=1e-12)


def test_snip_and_plain_as_formulas():
    """Those sum where a formula has the mean."""
    snip, plain = (table(estimator(seed=3)).sensitivity for estimator in (SNIP, GradientWeight))
    found = table(EvolvedProxy("abs(weight * gradient)", seed=3))
    np.testing.assert_allclose(sizes() * found.sensitivity, snip, rtol=1e-6)
    a, b = (
        table(EvolvedProxy(f, seed=3)).sensitivity
        for f in ("weight * gradient", "(weight - weight - weight) * gradient")
    )
    np.testing.assert_allclose(sizes() * (a + b), plain, rtol=1e-6, atol=1e-15)  # one of them is cut off at 0


def test_hawq_v2_as_a_formula():
    """Mean diagonal x squared norm x relative error is twice the second-order term; on a diagonal Hessian both are exact."""

    def loss(model, batch):
        return sum(k * w.pow(4).sum() for k, w in enumerate(model.parameters(), 1)) + 0 * model(batch).sum()

    formula = EvolvedProxy("mean(hessian) * square(frobenius(weight))", num_samples=1)
    found, truth = (table(estimator, loss=loss).sensitivity for estimator in (formula, HessianTrace(2)))
    np.testing.assert_allclose(found / 2, truth, rtol=1e-5)


def test_two_weights_of_a_group_add_up():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    double = {"quantizer": lambda w, p: 2 * w, "progress": False}
    x = [torch.randn(3, 2)]
    apart = mps.profile(model, x, EvolvedProxy("abs(weight)"), OPTIONS, **double).sensitivity
    together = mps.profile(model, x, EvolvedProxy("abs(weight)"), OPTIONS, groups={"g": ["0", "1"]}, **double)
    np.testing.assert_allclose(together.sensitivity.sum(0), apart.sum(0), rtol=1e-12)


def test_a_saved_formula_gives_the_same_table(tmp_path):
    before = EvolvedProxy("std(hessian * activation) + mean_abs(gradient)", 3, 5, {"fitness": 0.5})
    before.save(tmp_path / "proxy.json")
    after = EvolvedProxy.load(tmp_path / "proxy.json")
    assert after == before
    assert (str(after), after.num_samples, after.seed, after.origin) == (str(before), 3, 5, {"fitness": 0.5})
    np.testing.assert_array_equal(table(after).sensitivity, table(before).sensitivity)
    assert next(iter(json.loads((tmp_path / "proxy.json").read_text()))) == "mpsearch_proxy"


def test_it_prints_as_its_formula():
    proxy = EvolvedProxy(" mean( weight*gradient ) ")
    assert str(proxy) == "mean(weight * gradient)"
    assert repr(proxy) == "EvolvedProxy(formula='mean(weight * gradient)', num_samples=4, seed=0)"


def test_settings_count():
    a, b, c, d = (
        table(EvolvedProxy("abs(hessian)", n, seed)).sensitivity for n, seed in ((2, 0), (2, 0), (3, 0), (2, 1))
    )
    assert (a == b).all()
    assert (a != c).any()
    assert (a != d).any()


def test_only_what_is_named_is_computed():
    assert table(EvolvedProxy("frobenius(weight)")).origin["passes"] == {"forward": 0, "backward": 0}
    for formula in ("frobenius(weight)", PUBLISHED, "activation + hessian", "gradient"):
        proxy = EvolvedProxy(formula)
        told = mps.forecast(net(), data(), proxy, OPTIONS)
        assert table(proxy).origin["passes"] == {"forward": told.forward, "backward": told.backward}


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("invert(weight - weight)", r"invert\(weight - weight\) is (inf|nan) in layer 'embedding'"),
        ("weight + weight @ weight", r"in layer 'embedding': shapes \(7, 6\) and \(6, 6\) do not fit"),
    ],
)
def test_formulas_that_fail_on_a_model(formula, words):
    with pytest.raises(mps.EstimatorError, match=words):
        table(EvolvedProxy(formula))


def test_the_contract_of_estimators():
    check_estimator(EvolvedProxy("abs(gradient * virtual_gradient) * activation + hessian * square(weight)"))


def test_a_formula_on_the_command_line():
    found = part("mpsearch.sensitivity.evolved_proxy:EvolvedProxy", {}, "estimator", ["formula=std(weight)", "seed=2"])
    assert found == EvolvedProxy("std(weight)", seed=2)


def test_settings_that_are_refused():
    with pytest.raises(mps.EstimatorError, match="num_samples=0"):
        EvolvedProxy("weight", num_samples=0)
    with pytest.raises(mps.EstimatorError, match="no input 'wait'"):
        EvolvedProxy("wait")


GOOD = {"mpsearch_proxy": 1, "formula": "weight", "num_samples": 4, "seed": 0, "origin": {}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        (json.dumps(GOOD | {"mpsearch_proxy": 2}), 'expected an object with "mpsearch_proxy": 1'),
        (json.dumps(GOOD | {"fomula": "x"}), "unknown key 'fomula'; did you mean 'formula'"),
        (json.dumps(GOOD | {"formula": 3}), "expected text at .*formula, got 3"),
        (json.dumps({key: GOOD[key] for key in GOOD if key != "seed"}), "the key 'seed' is missing"),
        (json.dumps(GOOD | {"formula": "wait"}), "no input 'wait'"),
        (json.dumps(GOOD | {"num_samples": 0}), "num_samples=0"),
    ],
)
def test_files_that_are_refused(tmp_path, content, words):
    path = tmp_path / "proxy.json"
    path.write_text(content)
    with pytest.raises(mps.EstimatorError, match=words) as caught:
        EvolvedProxy.load(path)
    assert str(path) in str(caught.value)
