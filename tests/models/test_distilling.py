"""Data made from a model alone."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models.distilling import distill_data, statistics_loss
from mpsearch.models.running import state_fingerprint
from mpsearch.sensitivity import KLDivergence


def cnn(seed=0):
    """A network whose batch norms remember data of its own."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3, momentum=None),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 3),
    )
    x = torch.randn(64, 2, 6, 6).cumsum(3)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    model(x)
    return model.eval(), x


def by_hand(model, x):
    """Unbiased variances, as batch norm remembers them."""
    total = 0.0
    stages = [(x, torch.zeros(2), torch.ones(2))]
    for i in (1, 4):
        stages.append((model[:i](x), model[i].running_mean, model[i].running_var.sqrt()))
    for found, mean, deviation in stages:
        for channel in range(found.shape[1]):
            values = found[:, channel].flatten()
            total += float((values.mean() - mean[channel]) ** 2 + (values.std() - deviation[channel]) ** 2)
    return total


def test_loss():
    model, x = cnn()
    noise = torch.randn(8, 2, 6, 6)
    with torch.no_grad():
        assert float(statistics_loss(model, noise)) == pytest.approx(by_hand(model, noise), rel=1e-4)
        assert float(statistics_loss(model, x)) < 1e-6  # the data that the statistics come from
        assert float(statistics_loss(model, x + 0.1)) > 1e-2


def test_statistics_are_matched():
    model, _ = cnn()
    (found,) = distill_data(model, (2, 6, 6), num_samples=32, iterations=100)
    torch.manual_seed(0)
    with torch.no_grad():
        before = float(statistics_loss(model, torch.randn(32, 2, 6, 6)))
        after = float(statistics_loss(model, found))
    assert after < 0.02 * before
    assert found.shape == (32, 2, 6, 6)
    assert not found.requires_grad


def test_batches_seeds_and_the_model():
    model, _ = cnn()
    model[0].weight.requires_grad_(False)
    model.train()
    state, random_state = state_fingerprint(model), torch.get_rng_state()
    first = distill_data(model, (2, 6, 6), num_samples=5, batch_size=3, iterations=3, seed=1)
    again = distill_data(model, (2, 6, 6), num_samples=5, batch_size=3, iterations=3, seed=1)
    other = distill_data(model, (2, 6, 6), num_samples=5, batch_size=3, iterations=3, seed=2)
    assert [len(x) for x in first] == [3, 2]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert state_fingerprint(model) == state
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 9
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_it_profiles():
    model, _ = cnn()
    batches = distill_data(model, (2, 6, 6), num_samples=8, iterations=5)
    table = mps.profile(model, batches, KLDivergence(), mps.precisions("w2 w8"))
    assert (table.sensitivity[:, 0] > table.sensitivity[:, 1]).all()


def test_half_precision():
    model, _ = cnn()
    (found,) = distill_data(model.bfloat16(), (2, 6, 6), num_samples=8, iterations=5)
    assert found.dtype == torch.bfloat16


def test_models_without_batch_norm():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)

        def forward(self, ids):
            return self.head(self.embed(ids))

    tokens = distill_data(Language(), (500,), num_samples=3, batch_size=2)
    assert [x.shape for x in tokens] == [(2, 500), (1, 500)]
    assert torch.cat([x.flatten() for x in tokens]).unique().tolist() == list(range(11))
    mps.profile(Language(), tokens, KLDivergence(), mps.precisions("w4"))
    (noise,) = distill_data(nn.Sequential(nn.Linear(3, 2)), (3,), num_samples=2000, batch_size=2000)
    assert noise.dtype == torch.float32
    assert float(noise.mean().abs()) < 0.06
    assert abs(float(noise.std()) - 1) < 0.05


def test_errors():
    model, _ = cnn()
    for keyword in ("num_samples", "batch_size", "iterations"):
        with pytest.raises(mps.EstimatorError, match=f"{keyword}=0"):
            distill_data(model, (2, 6, 6), **{keyword: 0})
    with pytest.raises(mps.EstimatorError, match="the model fails on a batch of shape"):
        distill_data(model, (7, 6, 6))
    model[1].running_mean.fill_(float("nan"))
    with pytest.raises(mps.EstimatorError, match="is nan after 0 iterations"):
        distill_data(model, (2, 6, 6), num_samples=2)
