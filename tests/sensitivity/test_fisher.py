"""Fisher information of both kinds and the Gauss-Newton trace, against enumeration over samples and labels."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.sensitivity import EmpiricalFisher, Fisher, GaussNewtonTrace

STEP = 0.1


def shifted(weight, precision):
    """Squared error STEP^2 an element."""
    return weight + STEP


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def data(sizes=(5, 8)):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, generator=generator, dtype=torch.double), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes
    ]


def traces(model, batches, labels=None):
    """Of each layer, mean over samples of the squared gradient of its weight, and of its input; E over labels if none are given."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    layers = [module for module in model if isinstance(module, nn.Linear)]
    found = np.zeros((len(layers), 2))
    for n in range(len(x)):
        inputs = {}

        def remember(module, args, inputs=inputs):
            inputs[module] = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            return (inputs[module],)

        handles = [layer.register_forward_pre_hook(remember) for layer in layers]
        log_p = model(x[n : n + 1])[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        for c in range(3):
            share = float(log_p[c].exp()) if labels is None else float(y[n] == c)
            points = [layer.weight for layer in layers] + [inputs[layer] for layer in layers]
            gradients = torch.autograd.grad(log_p[c], points, retain_graph=True)
            squares = [float(g.square().sum()) * share / len(x) for g in gradients]
            found += np.array(squares).reshape(2, -1).T
    return found


@pytest.mark.parametrize("estimator", [Fisher(600), GaussNewtonTrace(600)])
def test_weights_against_enumeration(estimator):
    model, batches = net(), data()
    table = mps.profile(model, batches, estimator, mps.precisions("w4"), quantizer=shifted)
    truth = 0.5 * traces(model, batches)[:, 0] * STEP**2
    np.testing.assert_allclose(table.sensitivity[:, 0], truth, rtol=0.1)
    assert (abs(table.sensitivity - truth[:, None]) < 4 * table.sensitivity_se).all()


@pytest.mark.parametrize("estimator", [Fisher(600), GaussNewtonTrace(600), EmpiricalFisher()])
def test_weights_and_inputs_add_up(estimator):
    """FIT: one sum of both; the noise of inputs is that of rounding to 3 bits over their range."""
    model, batches = net(), data()
    table = mps.profile(model, batches, estimator, mps.precisions("w4 w16a3 w4a3"), quantizer=shifted)
    weights, inputs, both = table.sensitivity.T
    np.testing.assert_allclose(both, weights + inputs, rtol=1e-9)
    x = torch.cat([x for x, _ in batches])
    truth = []
    for row, a in zip(
        traces(model, batches, None if not isinstance(estimator, EmpiricalFisher) else "given"),
        (x, torch.tanh(model[0](x)).detach()),
        strict=True,
    ):
        low, high = min(float(a.min()), 0.0), max(float(a.max()), 0.0)
        step = (high - low) / 7
        zero = round(-low / step)
        noise = ((a / step).round().clamp(-zero, 7 - zero) * step - a).square().sum(1).mean()
        truth.append(0.5 * row[1] / a.shape[1] * float(noise))
    tolerance = 1e-6 if isinstance(estimator, EmpiricalFisher) else 0.1
    np.testing.assert_allclose(inputs, truth, rtol=tolerance)


def test_empirical_gradients_are_those_of_single_samples():
    """The same data twice, or one sample a batch, changes nothing; the gradient of a batch mean would be smaller."""
    model, batches = net(), data()

    def score(batches):
        found = mps.profile(model, batches, EmpiricalFisher(), mps.precisions("w4"), quantizer=shifted)
        return found.sensitivity[:, 0]

    truth = 0.5 * traces(model, batches, "given")[:, 0] * STEP**2
    np.testing.assert_allclose(score(batches), truth, rtol=1e-9)
    np.testing.assert_allclose(score([*batches, *batches]), truth, rtol=1e-9)
    doubled = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in batches]
    np.testing.assert_allclose(score(doubled), truth, rtol=1e-9)
    ones = [(x[n : n + 1], y[n : n + 1]) for x, y in batches for n in range(len(x))]
    np.testing.assert_allclose(score(ones), truth, rtol=1e-9)


def test_an_own_loss_is_a_mean_over_samples():
    model, batches = net(), data()

    def own(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    one, other = (
        mps.profile(model, batches, EmpiricalFisher(), mps.precisions("w4"), quantizer=shifted, loss=loss)
        for loss in (own, "cross-entropy")
    )
    np.testing.assert_allclose(one.sensitivity, other.sensitivity, rtol=1e-9)


# X, y, w of tests/data/curvature_closed_forms.json, logistic_regression
X = [[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]


@pytest.mark.parametrize(("weight", "trace"), [([0.0, 0, 0], 1.25), ([0.5, -0.25, 1.0], 0.7118589377491304)])
@pytest.mark.parametrize("kind", [Fisher, GaussNewtonTrace])
def test_logistic_regression(kind, weight, trace):
    """As two logits (0, w x): the information of w is X' diag(p (1 - p)) X / n; each logit's weights have that trace."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0, 0], weight], dtype=torch.double))
    batch = torch.tensor(X, dtype=torch.double)
    table = mps.profile(model, [batch], kind(800), mps.precisions("w4"), quantizer=shifted)
    assert table.sensitivity.item() == pytest.approx(0.5 * 2 * trace * STEP**2, rel=0.1)


@pytest.mark.parametrize("kind", [Fisher, GaussNewtonTrace])
def test_too_few_draws_are_refused(kind):
    with pytest.raises(mps.EstimatorError, match="=0: expected 1 or more"):
        kind(0)


def test_random_outputs_vary_less_than_drawn_labels_on_a_confident_model():
    """Why the loss `kl` takes them: at p = 0.999 a drawn label says something once in a thousand times."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0], [math.log(999)]]))
    batches = [torch.ones(16, 1)]
    found = {
        kind: [
            mps.profile(model, batches, kind(2, seed), mps.precisions("w4"), quantizer=shifted).sensitivity.item()
            for seed in range(30)
        ]
        for kind in (Fisher, GaussNewtonTrace)
    }
    truth = 0.5 * 2 * 0.999 * 0.001 * STEP**2
    assert np.mean(found[GaussNewtonTrace]) == pytest.approx(truth, rel=0.2)
    assert np.std(found[GaussNewtonTrace]) < 0.2 * np.std(found[Fisher])
