"""Hessian traces against closed forms and dense Hessians."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

import mpsearch as mps
from mpsearch.sensitivity import HessianTrace

FIXTURE = Path(__file__).resolve().parent.parent / "data" / "curvature_closed_forms.json"


def unit_error(weight, precision):
    """A quantizer whose squared error is the number of weights: sensitivity = trace / 2."""
    return weight + 1.0


def traces(model, batches, loss, num_samples, seed=0):
    table = mps.profile(
        model, batches, HessianTrace(num_samples, seed), mps.precisions("w4"), loss=loss, quantizer=unit_error
    )
    return 2 * table.sensitivity[:, 0], 2 * table.sensitivity_se[:, 0]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def dense(model, batches, loss):
    """Per layer: trace, and the variance of one probe that covers all layers at once."""
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [weights[name].numel() for name in names]

    def value(flat, batch):
        parts = torch.split(flat, sizes)
        put = {name: part.reshape(weights[name].shape) for name, part in zip(names, parts, strict=True)}
        return loss(lambda x: functional_call(model, {**weights, **put}, (x,)), batch)

    flat = torch.cat([weights[name].reshape(-1) for name in names])
    total = sum(len(batch[0]) for batch in batches)
    trace, variance = np.zeros(len(names)), np.zeros(len(names))
    for batch in batches:
        matrix = hessian(value)(flat, batch)
        share = len(batch[0]) / total
        ends = np.cumsum([0, *sizes])
        for i in range(len(names)):
            rows = matrix[ends[i] : ends[i + 1]]
            block = rows[:, ends[i] : ends[i + 1]]
            trace[i] += share * float(block.trace())
            # Var(z_l' sum_k H_lk z_k): 2 (||H_ll||^2 - sum of squared diagonal) + the norm of the other blocks
            own = 2 * float(block.square().sum() - block.diagonal().square().sum())
            variance[i] += share**2 * (own + float(rows.square().sum() - block.square().sum()))
    return trace, variance


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(seed=0, sizes=(5, 8)):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 3, generator=generator, dtype=torch.double),
            torch.randint(0, 3, (n,), generator=generator),
        )
        for n in sizes
    ]


@pytest.mark.parametrize("seed", range(3))
def test_dense_hessian(seed):
    model, batches = net(seed), data(seed)
    truth, variance = dense(model, batches, cross_entropy)
    found, se = traces(model, batches, cross_entropy, 200, seed)
    exact_se = np.sqrt(variance / 200)
    assert (abs(found - truth) < 4 * exact_se).all()
    assert (abs(np.log(se / exact_se)) < 0.3).all()


def test_standard_errors_cover_the_truth():
    model, batches = net(), data()
    truth, _ = dense(model, batches, cross_entropy)
    hits = [
        abs(found - truth) <= 2 * se for found, se in (traces(model, batches, cross_entropy, 32, s) for s in range(60))
    ]
    assert np.mean(hits) >= 0.92  # 95 % less the noise of 120 draws


def test_the_default_loss_has_the_gauss_newton_hessian():
    model, batches = net(), data()

    def kl_to_itself(run, batch):
        with torch.no_grad():
            target = model(batch[0]).softmax(-1)
        return nn.functional.kl_div(run(batch[0]).log_softmax(-1), target, reduction="batchmean")

    truth, variance = dense(model, batches, kl_to_itself)
    found, _ = traces(model, batches, None, 200)
    assert (abs(found - truth) < 4 * np.sqrt(variance / 200)).all()
    assert (truth > 0).all()


# closed forms: tests/data/curvature_closed_forms.json
X = [[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [3.0, 0.0, 1.0]]


def linear(weights):
    model = nn.Sequential(nn.Linear(3, len(weights), bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(weights, dtype=torch.double))
    return model


def test_linear_regression():
    matrix = np.array([[5.0, 1.0, 2.0], [1.0, 7 / 3, 4 / 3], [2.0, 4 / 3, 8 / 3]])
    variance = 2 * ((matrix**2).sum() - (matrix.diagonal() ** 2).sum())
    targets = torch.tensor([[1.0], [0], [2], [1], [-1], [3]], dtype=torch.double)
    batch = (torch.tensor(X, dtype=torch.double), targets)
    found, _ = traces(linear([[0.3, -0.2, 0.9]]), [batch], lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]), 400)
    assert abs(found[0] - 10.0) < 4 * math.sqrt(variance / 400)


@pytest.mark.parametrize(("weight", "trace"), [([0.0, 0, 0], 1.25), ([0.5, -0.25, 1.0], 0.7118589377491304)])
def test_logistic_regression(weight, trace):
    x = torch.tensor(X, dtype=torch.double)
    p = torch.sigmoid(x @ torch.tensor(weight, dtype=torch.double))
    matrix = (x.T * (p * (1 - p))) @ x / 6
    assert float(matrix.trace()) == pytest.approx(trace)
    labels = torch.tensor([[1.0], [0], [1], [0], [0], [1]], dtype=torch.double)
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())

    def loss(model, batch):
        return nn.functional.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    found, _ = traces(linear([weight]), [(x, labels)], loss, 400)
    assert abs(found[0] - trace) < 4 * math.sqrt(variance / 400)


def test_softmax_regression():
    batch = (torch.tensor(X, dtype=torch.double), torch.tensor([0, 1, 2, 0, 1, 2]))
    found, se = traces(linear(np.zeros((3, 3))), [batch], cross_entropy, 400)
    assert abs(found[0] - 10 / 3) < 4 * se[0]


@pytest.mark.parametrize("a", [[0.5, 3.0, -1.25, 7.0, 0.0, 2.0]])
def test_a_diagonal_hessian_needs_no_luck(a):
    model = nn.Sequential(nn.Linear(6, 1, bias=False)).double()
    scale = torch.tensor(a, dtype=torch.double)

    def loss(m, batch):
        return 0.5 * (scale * m[0].weight.square()).sum() + 0 * m(batch).sum()

    found, se = traces(model, [torch.ones(1, 6, dtype=torch.double)], loss, 2)
    assert found[0] == pytest.approx(sum(a), rel=1e-12)
    assert se[0] == pytest.approx(0, abs=1e-12)


def test_the_fixture_agrees_with_the_numbers_above():
    fixture = json.loads(FIXTURE.read_text())
    assert fixture["linear_regression"]["X"] == X
    assert fixture["linear_regression"]["trace"] == 10.0
    assert fixture["logistic_regression"]["w1"]["trace"] == 0.7118589377491304
    assert fixture["diagonal_quadratic"]["trace"] == 11.25
    assert fixture["softmax_regression_zero"]["trace"] == pytest.approx(10 / 3)


def test_inputs_against_a_loop_over_samples():
    """tr(H_a) per layer by dense Hessians of single samples, times the measured noise of the inputs."""
    model = net().float()
    batch = (data()[1][0].float(), data()[1][1])
    table = mps.profile(model, [batch], HessianTrace(600), mps.precisions("w16a3"), loss=cross_entropy)
    low_high = {}
    hidden = {"0": batch[0], "2": model[1](model[0](batch[0])).detach()}
    tails = {"0": model, "2": model[2]}
    for row, name in enumerate(("0", "2")):
        a = hidden[name]
        low_high[name] = (min(float(a.min()), 0.0), max(float(a.max()), 0.0))
        trace = 0.0
        for x, y in zip(a, batch[1], strict=True):
            matrix = hessian(lambda v, y=y, tail=tails[name]: nn.functional.cross_entropy(tail(v[None]), y[None]))(x)
            trace += float(matrix.trace().detach()) / len(a)
        low, high = low_high[name]
        step = (high - low) / 7
        zero = round(-low / step)
        noise = (((a / step).round().clamp(-zero, 7 - zero) * step - a) ** 2).sum() / len(a)
        expected = 0.5 * trace / a.shape[1] * float(noise)
        assert abs(table.sensitivity[row, 0] - expected) < 4 * table.sensitivity_se[row, 0] + 1e-3 * abs(expected)


class Fork(nn.Module):
    """A tensor that two layers read, that is added to their outputs, and that a third reads in vain."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.left, self.right, self.idle = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        return self.behind(*[torch.tanh(self.body(x))] * 3)

    def behind(self, left, right, skip):
        self.idle(skip)
        return self.left(left).square() + self.right(right).exp() + skip


def test_the_input_of_a_layer_counts_as_far_as_it_goes_through_the_layer():
    """Against the dense Hessian of what one of the readers is given, sample by sample."""
    model, x, labels = Fork(), torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    table = mps.profile(
        model, [(x, labels)], HessianTrace(200), mps.precisions("w16a3"), loss=cross_entropy, progress=False
    )
    read = torch.tanh(model.body(x)).detach()
    step = (read.max() - read.min()) / 7
    zero = (-read.min() / step).round()
    noise = ((read / step).round().clamp(-zero, 7 - zero) * step - read).square().sum() / len(x)

    def trace(layer, n):
        def loss(z):
            given = {"left": read[n], "right": read[n], "skip": read[n], layer: z}
            return nn.functional.cross_entropy(model.behind(**given), labels[n])

        return torch.autograd.functional.hessian(loss, read[n]).trace() / len(x)

    rows = {layer.name: row for row, layer in enumerate(table.layers)}
    for layer in ("left", "right"):
        expected = 0.5 * float(sum(trace(layer, n) for n in range(len(x)))) / 3 * float(noise)
        assert abs(table.sensitivity[rows[layer], 0] - expected) < 4 * table.sensitivity_se[rows[layer], 0]
    assert table.sensitivity[rows["idle"], 0] == 0


def test_it_predicts_the_measured_rise_of_small_random_errors():
    """The promise of the unit: for errors without preferred direction the mean measured KL is the prediction."""
    model, batches = net(), data(sizes=(64,))
    predicted = mps.profile(
        model, batches, HessianTrace(2000), mps.precisions("w4"), quantizer=lambda w, p: w + 0.02
    ).sensitivity[:, 0]
    generator = torch.Generator().manual_seed(0)
    x = batches[0][0]
    with torch.no_grad():
        reference = model(x).log_softmax(-1)
        for row, name in enumerate(("0.weight", "2.weight")):
            weight = dict(model.named_parameters())[name].detach()
            measured = 0.0
            for _ in range(3000):
                noise = 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
                logits = functional_call(model, {name: weight + noise}, (x,)).log_softmax(-1)
                measured += float((reference.exp() * (reference - logits)).sum(-1).mean()) / 3000
            assert measured == pytest.approx(predicted[row], rel=0.1)


def test_same_seed_same_array():
    first, second = (traces(net(), data(), cross_entropy, 4, 7)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert (first != traces(net(), data(), cross_entropy, 4, 8)[0]).all()
    with pytest.raises(mps.EstimatorError, match="num_samples=1"):
        HessianTrace(1)


def test_what_cannot_be_differentiated_is_one_clear_line():
    def no_graph(model, batch):
        return cross_entropy(model, batch).detach()

    with pytest.raises(mps.EstimatorError, match="cannot be differentiated"):
        traces(net(), data(), no_graph, 2)


def plus_plus(model, batches, loss, num_samples, seed=0):
    table = mps.profile(
        model,
        batches,
        HessianTrace(num_samples, seed, "hutch++"),
        mps.precisions("w4"),
        loss=loss,
        quantizer=unit_error,
    )
    return 2 * table.sensitivity[:, 0], 2 * table.sensitivity_se[:, 0]


def test_hutch_plus_plus_is_exact_where_the_sketch_holds_the_whole_range():
    model, batches = net(), data(sizes=(8,))
    trace, _ = dense(model, batches, cross_entropy)
    found, _ = plus_plus(model, batches, cross_entropy, 3 * 12)  # blocks have 12 weights
    np.testing.assert_allclose(found, trace, rtol=1e-9)


def test_hutch_plus_plus_is_unbiased_and_its_errors_cover():
    model, batches = net(), data(sizes=(8,))
    trace, _ = dense(model, batches, cross_entropy)
    runs = [plus_plus(model, batches, cross_entropy, 18, seed) for seed in range(40)]
    found, se = np.array([r[0] for r in runs]), np.array([r[1] for r in runs])
    assert (np.abs(found.mean(0) - trace) <= 4 * found.std(0, ddof=1) / math.sqrt(len(runs)) + 1e-12).all()
    # six draws: 5 degrees of freedom, 4.03 standard errors hold 99 %
    assert (np.abs(found - trace) <= 4.03 * se + 1e-12).mean() >= 0.95


def test_hutch_plus_plus_errs_less_than_hutchinson_on_the_same_number_of_products():
    model, batches = net(), data(sizes=(8,))
    trace, _ = dense(model, batches, cross_entropy)
    one = np.mean([np.abs(traces(model, batches, cross_entropy, 24, s)[0] - trace) for s in range(10)], axis=0)
    two = np.mean([np.abs(plus_plus(model, batches, cross_entropy, 24, s)[0] - trace) for s in range(10)], axis=0)
    assert (two < one).all()


@pytest.mark.parametrize(("method", "count"), [("hutchinson", 1), ("hutch++", 5)])
def test_too_few_products_are_refused(method, count):
    with pytest.raises(mps.EstimatorError, match=f"num_samples={count}: expected"):
        HessianTrace(count, method=method)


def test_the_forecast_of_passes_holds():
    for estimator in (HessianTrace(4), HessianTrace(6, method="hutch++")):
        table = mps.profile(net(), data(), estimator, mps.precisions("w4"), loss=cross_entropy)
        cost = estimator.cost(2, 2, 1)
        assert table.origin["passes"]["forward"] <= cost.forward
        assert table.origin["passes"]["backward"] <= cost.backward
    assert HessianTrace(4).cost(2, 2, 1).backward == 1 + 2 * 4
