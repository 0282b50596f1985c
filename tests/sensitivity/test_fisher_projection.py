"""Half the squared projection on the real perturbation, with and without pairs of layers, against dense matrices."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models.running import call
from mpsearch.sensitivity import FisherProjection, HessianAugmented
from mpsearch.sensitivity import hessian_augmented as part

OPTIONS = mps.precisions("w2 w4")


def error(weight, precision, size=0.05):
    """Half as large, and of another direction, for twice the bits."""
    steps = torch.arange(weight.numel(), dtype=weight.dtype).reshape(weight.shape)
    return torch.cos(int(precision.weight) + 2 * steps) * size * 2 / int(precision.weight)


def shifted(weight, precision):
    return weight + error(weight, precision)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(sizes=(5, 8)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, generator=generator, dtype=torch.double) for n in sizes]


def projections(model, batches, options=OPTIONS):
    """(samples, labels, cells) <grad log p(c), D> and (samples, labels) p(c)."""
    layers = [module for module in model if isinstance(module, nn.Linear)]
    found, shares = [], []
    for x in torch.cat(batches):
        log_p = model(x[None])[0].log_softmax(-1)
        rows = []
        for q in log_p:
            gradients = torch.autograd.grad(q, [layer.weight for layer in layers], retain_graph=True)
            pairs = zip(layers, gradients, strict=True)
            rows.append([float((g * error(layer.weight, o)).sum()) for layer, g in pairs for o in options])
        found.append(rows)
        shares.append(log_p.exp().tolist())
    return np.array(found), np.array(shares)


def gram(model, batches, options=OPTIONS):
    """(cells, cells) D_i^T F D_j by enumeration over labels."""
    values, shares = projections(model, batches, options)
    return np.einsum("nc,nci,ncj->ij", shares, values, values) / len(values)


def test_the_quadratic_form_of_the_dense_block():
    model, batches = net(), data()
    table = mps.profile(model, batches, FisherProjection(800), OPTIONS, quantizer=shifted)
    truth = 0.5 * np.diag(gram(model, batches)).reshape(3, 2)
    np.testing.assert_allclose(table.sensitivity, truth, rtol=0.1)
    assert (abs(table.sensitivity - truth) < 4 * table.sensitivity_se).all()


def test_a_perturbation_twice_as_large_does_four_times_the_damage():
    model, batches = net(), data()
    one, two = (
        mps.profile(
            model, batches, FisherProjection(3), OPTIONS, quantizer=lambda w, p, k=k: w + k * error(w, p)
        ).sensitivity
        for k in (1, 2)
    )
    np.testing.assert_allclose(two, 4 * one, rtol=1e-9)


def test_errors_of_weights_and_inputs_in_one_square():
    """<dT/dY, Y_o - Y>, by hand for one layer and given labels."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(6, 4).double(), torch.arange(6) % 3
    options = mps.precisions("w16a2 w2a2")
    table = mps.profile(model, [(x, y)], FisherProjection(), options, loss="cross-entropy", quantizer=shifted)
    step = (float(x.max()) - float(x.min())) / 3
    zero = round(-float(x.min()) / step)
    rounded = (x / step).round().clamp(-zero, 3 - zero) * step
    out = model(x).detach()
    g = out.softmax(1) - nn.functional.one_hot(y, 3)
    for column, option in enumerate(options):
        w = shifted(model[0].weight.detach(), option) if option.quantizes_weight else model[0].weight.detach()
        difference = nn.functional.linear(rounded, w, model[0].bias.detach()) - out
        truth = 0.5 * float((g * difference).sum(1).square().mean())
        assert table.sensitivity[0, column] == pytest.approx(truth, rel=1e-6)


# ------------------------------------------------------------------------------------------------ pairs of layers


def matrix(table, count=6):
    """(cells, cells) of the table: 2 x sensitivity on the diagonal, interactions of pairs."""
    found = np.diag(2 * table.sensitivity.flatten())
    pairs = table.interactions
    for (u, p), (v, q), value in zip(pairs.first, pairs.second, pairs.value, strict=True):
        found[2 * u + p, 2 * v + q] = found[2 * v + q, 2 * u + p] = value
    return found


def test_interactions_are_those_of_the_dense_matrix():
    model, batches = net(), data()
    table = mps.profile(model, batches, HessianAugmented(800, shrink=0), OPTIONS, quantizer=shifted)
    truth, found = gram(model, batches), matrix(table)
    rows = np.arange(6) // 2
    within = rows[:, None] == rows  # pairs inside a layer are never chosen together
    scale = np.sqrt(np.diag(truth))
    assert (abs(found - truth) / np.outer(scale, scale))[~within | np.eye(6, dtype=bool)].max() < 0.1


def test_the_matrix_of_a_plan_has_no_negative_damage():
    """A Gram matrix: positive semidefinite for every choice of one precision a layer, whatever the number of draws."""
    table = mps.profile(net(), data(), HessianAugmented(1, shrink=0), OPTIONS, quantizer=shifted)
    found = matrix(table)
    for chosen in np.ndindex(2, 2, 2):
        cells = [2 * u + p for u, p in enumerate(chosen)]
        assert np.linalg.eigvalsh(found[np.ix_(cells, cells)]).min() > -1e-12


def test_clado_measures_the_same_with_runs_of_pairs():
    """L(i, j) - L(i) - L(j) + L(0) at small errors: what CLADO takes (L P)^2 / 2 runs for."""
    model, batches = net(), data()
    table = mps.profile(model, batches, HessianAugmented(800, shrink=0), OPTIONS, quantizer=shifted)
    found, size = matrix(table), 1e-3
    layers = [0, 2, 4]
    x = torch.cat(batches)
    reference = model(x).log_softmax(1).detach()

    def damage(*cells):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for u, p in cells:
                changed[layers[u]].weight += size * error(model[layers[u]].weight, OPTIONS[p])
            return float((reference.exp() * (reference - changed(x).log_softmax(1))).sum(1).mean())

    for u, p, v, q in [(0, 0, 1, 0), (0, 1, 2, 0), (1, 0, 2, 1), (1, 1, 2, 1)]:
        pair = (damage((u, p), (v, q)) - damage((u, p)) - damage((v, q))) / size**2
        scale = np.sqrt(found[2 * u + p, 2 * u + p] * found[2 * v + q, 2 * v + q])
        assert found[2 * u + p, 2 * v + q] == pytest.approx(pair, abs=0.1 * scale)


def test_whole_plans_are_predicted():
    """Sensitivities and interactions add up to the measured damage of plans of small errors; without pairs they do not."""
    model, batches = net(), data((100,))

    def slightly(weight, precision):
        return weight + error(weight, precision, 0.005)

    table = mps.profile(model, batches, HessianAugmented(300, shrink=0), OPTIONS, quantizer=slightly)
    found = matrix(table)
    reference = call(model, batches[0]).log_softmax(1).detach()
    alone, together, measured = [], [], []
    for chosen in np.ndindex(2, 2, 2):
        cells = [2 * u + p for u, p in enumerate(chosen)]
        block = found[np.ix_(cells, cells)]
        alone.append(0.5 * block.trace())
        together.append(0.5 * block.sum())
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for layer, p in zip((0, 2, 4), chosen, strict=True):
                changed[layer].weight.copy_(slightly(model[layer].weight, OPTIONS[p]))
            after = changed(batches[0]).log_softmax(1)
        measured.append(float((reference.exp() * (reference - after)).sum(1).mean()))
    np.testing.assert_allclose(together, measured, rtol=0.1)
    assert abs(np.array(alone) / measured - 1).max() > 0.2


def test_shrinking_scales_pairs_alone():
    tables = [
        mps.profile(net(), data(), HessianAugmented(2, shrink=shrink), OPTIONS, quantizer=shifted)
        for shrink in (0.0, 0.25, 1.0)
    ]
    np.testing.assert_allclose(0.75 * tables[0].interactions.value, tables[1].interactions.value, rtol=1e-12)
    assert len(tables[2].interactions.value) == 0
    for table in tables[1:]:
        np.testing.assert_array_equal(table.sensitivity, tables[0].sensitivity)


def test_a_matrix_that_would_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(part, "MOST_CELLS", 5)
    with pytest.raises(mps.EstimatorError, match=r"3 decisions x 2 precisions are 6 cells: .* at most 5 cells"):
        mps.profile(net(), data(), HessianAugmented(), OPTIONS, quantizer=shifted)


@pytest.mark.parametrize("settings", [{"draws": 0}, {"shrink": -0.1}, {"shrink": 1.1}])
def test_settings_that_make_no_sense(settings):
    (name,) = settings
    with pytest.raises(mps.EstimatorError, match=f"{name}=.*: expected"):
        HessianAugmented(**settings)
