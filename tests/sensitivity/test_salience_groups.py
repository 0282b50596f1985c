"""Salience against explicit patches and dense inverses."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models.modules.weights import canonical
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import salience_groups
from mpsearch.sensitivity.salience_groups import SalienceGroups

PRECISIONS = mps.precisions("w2 w4 w16")


def by_hand(weight, columns, samples, group_size, damping):
    """Cells of one weight: rows of `columns` are what the rows of the weight see, (places, columns) for each output."""
    cells = np.zeros(len(PRECISIONS))
    rows = weight.flatten(1).double().numpy()
    for p, precision in enumerate(PRECISIONS[:-1]):
        found = RoundToNearest()(weight, precision).flatten(1).double().numpy()
        salience = np.zeros_like(rows)
        for i, seen in enumerate(columns):
            h = 2 / samples * seen.T @ seen
            h[np.diag_indices_from(h)] += (h.diagonal() == 0) + damping
            lower = np.linalg.cholesky(np.linalg.inv(h)[::-1, ::-1])[::-1, ::-1]  # flipped: U U^T = H^-1
            upper = np.linalg.cholesky(np.linalg.inv(h)).T  # U^T U = H^-1, as in the code of the paper
            assert np.allclose(upper.T @ upper, lower @ lower.T)
            salience[i] = rows[i] ** 2 / upper.diagonal() ** 2
        for start in range(0, rows.shape[1], group_size):
            part = slice(start, start + group_size)
            ratio = ((found - rows)[:, part] ** 2).sum() / (rows[:, part] ** 2).sum()
            cells[p] += salience[:, part].sum() * ratio
    return cells


def profile(model, batches, estimator):
    return mps.profile(model, batches, estimator, PRECISIONS).sensitivity


@pytest.mark.parametrize("group_size", [2, 128])
def test_tokens_and_a_dead_column(group_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4))
    batches = [torch.randn(n, 3, 5) for n in (4, 2)]
    for x in batches:
        x[..., 1] = 0
    seen = torch.cat(batches).reshape(-1, 5).double().numpy()
    expected = by_hand(model[0].weight.detach(), [seen] * 4, 6, group_size, 0.1)
    np.testing.assert_allclose(profile(model, batches, SalienceGroups(group_size, 0.1))[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, (3, 2), groups=2, dilation=(1, 2)),
        nn.Conv2d(3, 3, 3, groups=3, padding="same", padding_mode="reflect"),
        nn.Conv1d(2, 3, 3, dilation=2, stride=2, padding=2),
    ],
    ids=["strided", "grouped", "depthwise", "1d"],
)
def test_convolutions(conv):
    """Patches are read off by convolving with every unit kernel."""
    torch.manual_seed(0)
    x = torch.randn(3, conv.in_channels, *[7] * (conv.weight.ndim - 2))
    weight = conv.weight.detach()
    columns = []
    for output in range(len(weight)):
        places = []
        for k in range(weight[0].numel()):
            probe = torch.zeros_like(weight).flatten(1)
            probe[output, k] = 1
            with torch.no_grad():
                places.append(conv._conv_forward(x, probe.reshape(weight.shape), None)[:, output].flatten())
        columns.append(torch.stack(places, 1).double().numpy())
    expected = by_hand(weight, columns, 3, 4, 0.01)
    np.testing.assert_allclose(profile(nn.Sequential(conv), [x], SalienceGroups(4))[0], expected, rtol=1e-4)


def test_embedding_is_a_linear_layer_on_one_hot_tokens():
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 3)
    tokens = torch.tensor([[0, 1, 1], [2, 2, 2]])
    linear = nn.Linear(6, 3, bias=False)
    linear.weight.data = embedding.weight.data.T.contiguous()
    hot = nn.functional.one_hot(tokens, 6).float()
    double = lambda w, p: w * 1.5  # noqa: E731 one group, and the same error in every element
    first, second = (
        mps.profile(nn.Sequential(layer), [x], SalienceGroups(), PRECISIONS[:1], quantizer=double).sensitivity
        for layer, x in ((embedding, tokens), (linear, hot))
    )
    np.testing.assert_allclose(first, second, rtol=1e-6)


@pytest.mark.parametrize("kind", [nn.Conv3d, nn.ConvTranspose3d])
def test_other_convolutions_share_channel_statistics(kind):
    torch.manual_seed(0)
    layer, x = kind(4, 4, 2, groups=2), torch.randn(3, 4, 3, 3, 3)
    channels = x.movedim(1, -1).reshape(-1, 4).double().numpy()
    weight = canonical(layer).detach()
    found = profile(nn.Sequential(layer), [x], SalienceGroups())[0]
    salience, rows = 0.0, weight.flatten(2).double().numpy()
    for output in range(4):
        seen = channels[:, :2] if output < 2 else channels[:, 2:]
        h = 2 / 3 * seen.T @ seen + 0.01 * np.eye(2)
        pivots = np.linalg.cholesky(np.linalg.inv(h)).diagonal() ** 2
        salience += (rows[output] ** 2 / pivots[:, None]).sum()
    ratio = (RoundToNearest()(weight, PRECISIONS[0]) - weight).double().square().sum() / (rows**2).sum()
    assert found[0] == pytest.approx(salience * float(ratio), rel=1e-5)


def test_turns_give_the_same_numbers(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 3)), [torch.randn(6, 4)]
    once = mps.profile(model, x, SalienceGroups(), PRECISIONS)
    monkeypatch.setattr(salience_groups, "HESSIAN_BYTES", 8 * (25 + 9))
    turns = mps.profile(model, x, SalienceGroups(), PRECISIONS)
    np.testing.assert_array_equal(once.sensitivity, turns.sensitivity)
    assert (once.origin["passes"]["forward"], turns.origin["passes"]["forward"]) == (1, 2)


def test_large_inputs_are_unfolded_in_parts(monkeypatch):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3)), [torch.randn(5, 2, 6, 6)]
    whole = profile(model, x, SalienceGroups())
    monkeypatch.setattr(salience_groups, "_CHUNK", 1)
    np.testing.assert_allclose(profile(model, x, SalienceGroups()), whole, rtol=1e-9)


def test_errors():
    with pytest.raises(mps.EstimatorError, match="group_size=0"):
        SalienceGroups(0)
    with pytest.raises(mps.EstimatorError, match="damping=0"):
        SalienceGroups(damping=0.0)


def test_quantized_inputs_are_refused():
    with pytest.raises(mps.EstimatorError, match="w4a8 quantizes inputs"):
        mps.profile(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)], SalienceGroups(), mps.precisions("w4a8"))


def test_each_use_of_a_shared_weight_counts():
    torch.manual_seed(0)
    tokens, model = torch.randint(0, 5, (3, 4)), nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    shared = profile(model, [tokens], SalienceGroups())
    hidden = model[0](tokens).detach()
    first = profile(nn.Sequential(model[0]), [tokens], SalienceGroups())
    second = profile(nn.Sequential(model[1]), [hidden], SalienceGroups())
    np.testing.assert_allclose(shared.sum(0), first[0] + second[0], rtol=1e-6)
