"""What measured signals mean: noise powers, dead layers, paths, slopes, parts of a model, statistics of weights."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import (
    SQNR,
    CosineDistance,
    KLDivergence,
    Kurtosis,
    LayerOutputError,
    LinearityCoefficients,
    MaskedKL,
    MetricDecoupled,
    OutputMSE,
    Part,
    PathShapley,
    PredictionDifference,
    RelativeWeightError,
    TaskMetric,
)
from mpsearch.sensitivity.path_shapley import coverage_costs


def net(widths=(6, 8, 8, 3)):
    torch.manual_seed(0)
    layers = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


def data(sizes=(40, 24)):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 6, generator=generator, dtype=torch.double), torch.randint(0, 3, (n,), generator=generator))
        for n in sizes
    ]


def kl(reference, logits):
    p = reference.softmax(1)
    return (p * (reference.log_softmax(1) - logits.log_softmax(1))).sum(1)


def logits_with(model, x, weights):
    """The output with some weights replaced: {place: weight}."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for place, weight in weights.items():
            changed[place].weight.copy_(weight)
        return changed(x)


# ------------------------------------------------------------------------------------------------ signals of the output


def test_the_divergence_is_proportional_to_the_noise_power():
    """At 8 to 12 bits: slope 1 of log KL over log ||D||^2, so a quarter of the damage for each bit."""
    options = mps.precisions("w8 w9 w10 w11 w12")
    model, batches = net((6, 48, 48, 3)), data()
    tables = mps.profile(model, batches, [KLDivergence(), OutputMSE(), RelativeWeightError()], options)
    for table in tables[:2]:
        for values, power in zip(table.sensitivity, tables[2].sensitivity, strict=True):
            slope = np.polyfit(np.log(power), np.log(values), 1)[0]
            assert slope == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "estimator",
    [
        KLDivergence(),
        OutputMSE(),
        SQNR(),
        CosineDistance(),
        PredictionDifference(),
        TaskMetric(),
        TaskMetric("accuracy"),
        MaskedKL(),
        LinearityCoefficients(3),
        PathShapley(2),
    ],
    ids=lambda one: type(one).__name__,
)
def test_a_layer_that_the_output_does_not_see_scores_nothing(estimator):
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.dead, self.head = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x):
            y = torch.tanh(self.body(x))
            return self.head(y + 0 * self.dead(y))

    torch.manual_seed(0)
    batches = [(x.float(), y) for x, y in data()]
    table = mps.profile(Dead(), batches, estimator, mps.precisions("w2 w3a4"))
    assert (table.sensitivity[1] == 0).all()
    if not isinstance(estimator, TaskMetric):
        assert (table.sensitivity[[0, 2]] > 0).all()


def test_masking_is_setting_weights_to_zero():
    model, batches = net(), data()
    table = mps.profile(model, batches, MaskedKL(), mps.precisions("w2 w4"))
    x = torch.cat([x for x, _ in batches])
    for row, place in enumerate((0, 2, 4)):
        weight = model[place].weight.detach()
        damage = float(kl(model(x), logits_with(model, x, {place: 0 * weight})).mean())
        for column, option in enumerate(table.precisions):
            change = RoundToNearest()(weight, option) - weight
            truth = damage * float(change.square().sum() / weight.square().sum())
            assert table.sensitivity[row, column] == pytest.approx(truth, rel=1e-9)


def test_a_metric_of_ones_own_in_either_direction():
    """Values of single predictions, or one number for the batch."""
    model, batches = net(), data()

    def margin(logits, labels):
        return logits.gather(1, labels[:, None])[:, 0] - logits.mean(1)

    def whole(logits, labels):
        return margin(logits, labels).mean()

    options = mps.precisions("w2")
    up, down, single = (
        mps.profile(model, batches, TaskMetric(metric, direction), options)
        for metric, direction in ((margin, True), (margin, False), (whole, True))
    )
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for row, place in enumerate((0, 2, 4)):
        after = logits_with(model, x, {place: RoundToNearest()(model[place].weight.detach(), options[0])})
        fall = (margin(model(x), y) - margin(after, y)).detach()
        assert up.sensitivity[row, 0] == pytest.approx(float(fall.mean()), rel=1e-9)
        batchwise = np.average([float(part.mean()) for part in fall.split([40, 24])], weights=[40, 24])
        assert single.sensitivity[row, 0] == pytest.approx(batchwise, rel=1e-9)
    np.testing.assert_allclose(up.sensitivity, -down.sensitivity, rtol=1e-12)
    np.testing.assert_allclose(up.sensitivity_se, down.sensitivity_se, rtol=1e-12)


def test_metrics_that_do_not_fit():
    with pytest.raises(mps.EstimatorError, match=r"returned shape \(40, 3\), expected \(\) or \(40,\)"):
        mps.profile(net(), data(), TaskMetric(lambda logits, labels: logits), mps.precisions("w2"))


def test_parts_of_a_model_have_their_own_metric_and_share():
    model, batches = net(), data()
    options = mps.precisions("w2 w3")
    split = MetricDecoupled((Part("[02]", OutputMSE(), 3.0), Part("*", SQNR(), 1.0)))
    found, mse, sqnr = mps.profile(model, batches, [split, OutputMSE(), SQNR()], options)
    np.testing.assert_allclose(found.sensitivity[:2], 3 * mse.sensitivity[:2] / mse.sensitivity[:2].mean(), rtol=1e-9)
    np.testing.assert_allclose(found.sensitivity[2:], sqnr.sensitivity[2:] / sqnr.sensitivity[2:].mean(), rtol=1e-9)
    relative = found.sensitivity_se / found.sensitivity
    np.testing.assert_allclose(relative[:2], (mse.sensitivity_se / mse.sensitivity)[:2], rtol=1e-9)
    assert found.origin["parts"]["[02]"]["units"] == 2


def test_parts_that_do_not_fit():
    with pytest.raises(mps.EstimatorError, match=r"layer '4' fits none of the patterns '\[02\]'"):
        mps.profile(net(), data(), MetricDecoupled((Part("[02]", SQNR()),)), mps.precisions("w2"))
    with pytest.raises(mps.EstimatorError, match="parts is empty"):
        MetricDecoupled(())
    with pytest.raises(mps.EstimatorError, match=r"share=0 of part '\*'"):
        MetricDecoupled((Part("*", SQNR(), 0),))


# ------------------------------------------------------------------------------------------------ slopes and paths


def test_the_slope_is_the_curvature_of_small_random_noise():
    """HIGGS: alpha = 1/2 tr(H) ||W||^2 / n, with the trace of a dense Hessian."""
    model, batches = net(), data()
    x = torch.cat([x for x, _ in batches])
    levels = 400
    table = mps.profile(model, batches, LinearityCoefficients(levels, 0.02), mps.precisions("w4"))
    reference = model(x).detach()
    for place, alpha in zip((0, 2, 4), table.origin["alpha"].values(), strict=True):
        weight = model[place].weight.detach()

        def damage(w, place=place):
            return kl(reference, torch.func.functional_call(model, {f"{place}.weight": w}, (x,))).mean()

        hessian = torch.func.hessian(damage)(weight).reshape(weight.numel(), -1)
        truth = 0.5 * float(hessian.trace()) * float(weight.square().mean())
        # one draw varies by sqrt(2 sum lambda^2) / tr(H); levels near the largest weigh most
        spread = float((2 * hessian.square().sum()).sqrt() / hessian.trace())
        assert alpha == pytest.approx(truth, rel=4 * spread * (9 / 5 / levels) ** 0.5)


def test_the_slope_times_the_error_is_the_score():
    model, batches = net(), data()
    estimators = [LinearityCoefficients(5, 0.1), RelativeWeightError()]
    table, relative = (mps.profile(model, batches, one, mps.precisions("w2 w4")) for one in estimators)
    alpha = np.array(list(table.origin["alpha"].values()))
    np.testing.assert_allclose(table.sensitivity, alpha[:, None] * relative.sensitivity, rtol=1e-9)


def test_shares_add_up_to_the_damage_at_the_end():
    """Completeness: the path integral of the gradient is the difference of its ends."""
    model, batches = net(), data()
    options = mps.precisions("w2 w3")
    table = mps.profile(model, batches, PathShapley(12, coverage=False), options)
    x = torch.cat([x for x, _ in batches])
    for column, option in enumerate(options):
        quantized = {place: RoundToNearest()(model[place].weight.detach(), option) for place in (0, 2, 4)}
        damage = float(kl(model(x), logits_with(model, x, quantized)).mean())
        assert table.sensitivity[:, column].sum() == pytest.approx(damage, rel=1e-6)
        assert table.origin["damage"][str(option)] == pytest.approx(damage, rel=1e-9)


def test_a_share_is_an_integral_along_the_path():
    """By adaptive quadrature of <dF/dW, D> with all weights on their way."""
    model, batches = net(), data((20,))
    (option,) = mps.precisions("w2")
    table = mps.profile(model, batches, PathShapley(12, coverage=False), [option])
    x, _ = batches[0]
    places = (0, 2, 4)
    starts = {place: model[place].weight.detach() for place in places}
    changes = {place: RoundToNearest()(starts[place], option) - starts[place] for place in places}
    reference = model(x).detach()

    def slope(t, place):
        at = {f"{k}.weight": (starts[k] + t * changes[k]).requires_grad_() for k in places}
        value = kl(reference, torch.func.functional_call(model, at, (x,))).mean()
        (g,) = torch.autograd.grad(value, at[f"{place}.weight"])
        return float((g * changes[place]).sum())

    truth = [max(quad(slope, 0, 1, args=(place,))[0], 0) for place in places]
    np.testing.assert_allclose(table.sensitivity[:, 0], truth, rtol=1e-6)


def test_layers_that_do_not_meet_keep_their_own_damage():
    """Logits of two independent groups of a sum: shares are what each does alone."""

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            rows = len(x) // 2  # each layer has predictions of its own
            return torch.cat([self.left(x[:rows]), self.right(x[rows:])])

    torch.manual_seed(0)
    model, batches = Split(), [torch.randn(20, 3), torch.randn(10, 3)]
    shares, alone = (
        mps.profile(model, batches, one, mps.precisions("w2"), quantizer=lambda w, p: w + 0.5 * torch.sign(w))
        for one in (PathShapley(8, coverage=False), KLDivergence())
    )
    np.testing.assert_allclose(shares.sensitivity, alone.sensitivity, rtol=1e-4)


def test_inputs_take_their_part_of_the_path():
    """One layer, inputs alone: the integral of <dF/dx, D> is the damage."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(4, 3)), [torch.randn(32, 4)]
    shares, alone = (
        mps.profile(model, batches, one, mps.precisions("w16a2"))
        for one in (PathShapley(8, coverage=False), KLDivergence())
    )
    np.testing.assert_allclose(shares.sensitivity, alone.sensitivity, rtol=1e-4)


def test_coverage_costs_have_the_given_shares():
    """phi_i = a_i integral prod_{j != i} (1 - t a_j) dt by adaptive quadrature, and sum b = -log(1 - sum phi)."""
    shares = np.array([0.3, 0.0, 0.15, 0.05, 0.2])
    b = coverage_costs(shares)
    a = 1 - np.exp(-b)
    for i in range(len(a)):
        others = np.delete(a, i)
        phi = a[i] * quad(lambda t, others=others: np.prod(1 - t * others), 0, 1)[0]
        assert phi == pytest.approx(shares[i], abs=1e-9)
    assert b.sum() == pytest.approx(-math.log(1 - shares.sum()), rel=1e-9)
    assert b[1] == 0


def test_coverage_predicts_the_end_of_the_path():
    """c (1 - exp(-sum of costs / c)) is the damage of the whole column."""
    table = mps.profile(net(), data(), PathShapley(8), mps.precisions("w2 w3"))
    ceiling = table.origin["ceiling"]
    for column, damage in enumerate(table.origin["damage"].values()):
        predicted = ceiling * (1 - math.exp(-table.sensitivity[:, column].sum() / ceiling))
        assert predicted == pytest.approx(damage, rel=1e-3)
    assert table.unit == "relative"


def test_paths_are_of_a_metric_that_compares():
    with pytest.raises(mps.EstimatorError, match="a metric that compares with the unquantized model"):
        mps.profile(net(), data(), PathShapley(), mps.precisions("w2"), loss="cross-entropy")


# ------------------------------------------------------------------------------------------------ layers alone


class Called(nn.Module):
    """Convolutions with a stride and in groups, one of them called twice, by keyword."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.head = (
            nn.Conv2d(2, 4, 3, 2),
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        y = torch.relu(self.first(x))
        y = y + self.twice(input=torch.relu(self.twice(y)))
        return self.head(y.mean((2, 3)))


def test_the_error_of_a_layers_own_output():
    torch.manual_seed(0)
    model, batches = Called(), [torch.randn(4, 2, 7, 7), torch.randn(3, 2, 7, 7)]
    options = mps.precisions("w2 w3")
    table = mps.profile(model, batches, LayerOutputError(), options, groups={"g": ["first", "head"]})
    seen = {name: [] for name in ("first", "twice", "head")}
    for name, found in seen.items():
        model.get_submodule(name).register_forward_hook(
            lambda m, args, keywords, y, found=found: found.append((*args, *keywords.values())[0]), with_kwargs=True
        )
    with torch.no_grad():
        for batch in batches:
            model(batch)

        def powers(name, option):
            module = model.get_submodule(name)
            changed = copy.deepcopy(module)
            changed._forward_hooks.clear()
            changed.weight.copy_(RoundToNearest()(module.weight, option))
            plain = copy.deepcopy(module)
            plain._forward_hooks.clear()
            pairs = [(changed(x), plain(x)) for x in list(seen[name])]
            return np.array(
                [float(sum((a - b).square().sum() for a, b in pairs)), float(sum(b.square().sum() for _, b in pairs))]
            )

        rows = {layer.name: row for layer, row in zip(table.layers, table.sensitivity, strict=True)}
        for column, option in enumerate(options):
            noise, power = powers("first", option) + powers("head", option)
            assert 2 * rows["first"][column] == pytest.approx(noise / power, rel=1e-5)
            noise, power = powers("twice", option)
            assert rows["twice"][column] == pytest.approx(noise / power, rel=1e-5)


def test_the_relative_error_of_weights_and_inputs():
    model, batches = net(), data()
    table = mps.profile(model, batches, RelativeWeightError(), mps.precisions("w3 w16a3 w3a3"))
    x = torch.cat([x for x, _ in batches])
    inputs = [x, model[1](model[0](x)), model[3](model[2](model[1](model[0](x))))]
    for row, (place, a) in enumerate(zip((0, 2, 4), inputs, strict=True)):
        weight, a = model[place].weight.detach(), a.detach()
        change = RoundToNearest()(weight, table.precisions[0]) - weight
        step = float(a.max() - a.min()) / 7
        zero = round(-float(a.min()) / step)
        rounded = (a / step).round().clamp(-zero, 7 - zero) * step
        of_weights = float(change.square().sum() / weight.square().sum())
        of_inputs = float((rounded - a).square().sum() / a.square().sum())
        np.testing.assert_allclose(table.sensitivity[row], [of_weights, of_inputs, of_weights + of_inputs], rtol=1e-6)


def test_kurtosis_of_groups_and_constants():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    nn.init.constant_(model[2].weight, 0.25)
    table = mps.profile(
        model,
        [torch.ones(1, 6)],
        Kurtosis(),
        mps.precisions("w2"),
        groups={"g": ["0", "1"]},
        quantizer=lambda w, p: 2 * w,
    )
    both = torch.cat([model[0].weight.detach().flatten(), model[1].weight.detach().flatten()]).double()
    centered = both - both.mean()
    truth = float((centered**4).mean() / (centered**2).mean() ** 2)
    rows = {layer.name: value for layer, (value,) in zip(table.layers, table.sensitivity, strict=True)}
    assert rows["0"] + rows["1"] == pytest.approx(truth, rel=1e-9)  # relative error 1
    assert rows["2"] == pytest.approx(1, rel=1e-9)


def test_the_cross_entropy_by_its_name_is_that_of_pytorch():
    model, batches = net(), data()
    table = mps.profile(model, batches, TaskMetric(), mps.precisions("w2"))
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    after = logits_with(model, x, {0: RoundToNearest()(model[0].weight.detach(), table.precisions[0])})
    assert table.sensitivity[0, 0] == pytest.approx(float(F.cross_entropy(after, y) - F.cross_entropy(model(x), y)))
