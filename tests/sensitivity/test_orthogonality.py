"""Network orthogonality against CKA by explicit centring matrices."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity.orthogonality import Orthogonality, importance


def profile(model, batches, estimator=Orthogonality(), **keywords):  # noqa: B008 frozen
    return mps.profile(
        model, batches, estimator, mps.precisions("w4"), quantizer=lambda w, p: 2 * w, **keywords
    ).sensitivity[:, 0]


def centred(x):
    n = len(x)
    h = np.eye(n) - 1 / n
    return h @ (x @ x.T) @ h


def by_hand(features, beta):
    """Importance from (n, d) features of layers in order, one list a batch."""
    count = len(features[0])
    theta = []
    for i in range(count):
        gamma = 0.0
        for j in range(count):
            if i != j:
                dot = sum((centred(f[i]) * centred(f[j])).sum() for f in features)
                sizes = [sum((centred(f[k]) ** 2).sum() for f in features) for k in (i, j)]
                gamma += dot / np.sqrt(sizes[0] * sizes[1])
        theta.append(np.exp(-beta * gamma))
    return [np.mean(theta[i:]) for i in range(count)]


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_centring_matrices(beta):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)
    ).double()
    batches = [torch.randn(n, 1, 4, 4).double() for n in (6, 4)]
    features = []
    for x in batches:
        outputs = [model[: i + 1](x).detach().flatten(1).numpy() for i in (0, 2, 5)]
        features.append(outputs)
    np.testing.assert_allclose(profile(model, batches, Orthogonality(beta)), by_hand(features, beta))


def test_order_of_running_not_of_names():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.late, self.early = nn.Linear(3, 2).double(), nn.Linear(3, 3).double()

        def forward(self, x):
            return self.late(self.early(x).tanh())

    torch.manual_seed(0)
    model, x = Net(), torch.randn(5, 3).double()
    features = [[model.early(x).detach().numpy(), model(x).detach().numpy()]]
    np.testing.assert_allclose(profile(model, [x]), by_hand(features, 1.0)[::-1])


def test_invariance_and_bounds():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 4))
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    k, same = centred(x), centred(3 * x @ rotation)
    other = centred(rng.normal(size=(7, 9)))
    grams = np.stack([k.ravel(), same.ravel(), other.ravel()])
    found = importance(grams @ grams.T, 1.0)
    # the first two have CKA 1 with one another and the same CKA with the third, so theta is equal
    orm = (k * other).sum() / np.sqrt((k**2).sum() * (other**2).sum())
    assert 0 <= orm <= 1
    first, last = np.exp(-1 - orm), np.exp(-2 * orm)
    np.testing.assert_allclose(found, [(2 * first + last) / 3, (first + last) / 2, last])


def test_a_layer_that_runs_twice_has_the_features_of_both_calls():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.head = nn.Linear(3, 3).double(), nn.Linear(3, 2).double()

        def forward(self, x):
            return self.head(self.twice(self.twice(x).tanh()))

    model, x = Net(), torch.randn(5, 3).double()
    first = model.twice(x)
    both = torch.cat([first, model.twice(first.tanh())], 1).detach().numpy()
    np.testing.assert_allclose(profile(model, [x]), by_hand([[both, model(x).detach().numpy()]], 1.0))


def test_a_group_adds_up():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), torch.randn(5, 3)
    alone = profile(model, [x])
    assert profile(model, [x], groups={"both": ["0", "1"]}).sum() == pytest.approx(alone.sum())


def test_errors():
    with pytest.raises(mps.EstimatorError, match="one sample"):
        profile(nn.Sequential(nn.Linear(2, 2)), [torch.ones(1, 2)] * 3)
    with pytest.raises(mps.EstimatorError, match="beta=0"):
        Orthogonality(0.0)
