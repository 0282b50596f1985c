"""Channel Fisher information against masks, one sample at a time."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity.channel_fisher import ChannelFisher


def double(weight, precision):
    return 2 * weight


def scores(model, batches, loss=None, estimator=ChannelFisher()):  # noqa: B008 frozen
    table = mps.profile(model, batches, estimator, mps.precisions("w4"), loss=loss, quantizer=double)
    return dict(zip((layer.name for layer in table.layers), table.sensitivity[:, 0], strict=True))


class Masked(nn.Module):
    """A layer whose output channels are multiplied by ones."""

    def __init__(self, layer, channels, dim):
        super().__init__()
        self.layer, self.dim = layer, dim
        self.mask = nn.Parameter(torch.ones(channels, dtype=torch.double))

    def forward(self, x):
        return (self.layer(x).movedim(self.dim, -1) * self.mask).movedim(-1, self.dim)


def by_masks(masked, model, samples, loss):
    """1/2 mean over samples of (d loss / d mask)^2, summed over channels, times weights a channel."""
    total = 0.0
    for sample in samples:
        total += float(torch.autograd.grad(loss(model, sample), masked.mask)[0].square().sum())
    weight = masked.layer.weight
    return 0.5 * total / len(samples) * weight.numel() / len(masked.mask)


def test_convolutions_and_a_layer_that_runs_twice():
    def build(mask=None):
        torch.manual_seed(0)
        parts = {
            "conv": (nn.Conv2d(2, 4, 3, padding=1, bias=False).double(), 4, 1),
            "twice": (nn.Conv2d(4, 4, 1, groups=2).double(), 4, 1),
            "fc": (nn.Linear(4, 3).double(), 3, -1),
        }
        layers = {name: Masked(*part) if name == mask else part[0] for name, part in parts.items()}

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                for name, layer in layers.items():
                    setattr(self, name, layer)

            def forward(self, x):
                x = self.twice(self.twice(self.conv(x)).tanh())
                return self.fc(x.mean((2, 3)))

        return Net()

    batches = [(torch.randn(n, 2, 5, 5).double(), torch.randint(0, 3, (n,))) for n in (3, 2)]
    samples = [(x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)]
    found = scores(build(), batches)
    for name, value in found.items():
        model = build(name)
        loss = lambda m, sample: nn.functional.cross_entropy(m(sample[0]), sample[1])  # noqa: E731
        assert value == pytest.approx(by_masks(getattr(model, name), model, samples, loss), rel=1e-9)


def test_tokens():
    """Channels are the last axis, and all tokens of a sample are one draw; also where the layer sees them in one row."""
    for flattened in (False, True):
        torch.manual_seed(0)

        class Net(nn.Module):
            def __init__(self, layer, flattened):
                super().__init__()
                self.layer, self.flattened = layer, flattened

            def forward(self, x):
                return self.layer(x.flatten(0, 1)).reshape(*x.shape[:2], -1) if self.flattened else self.layer(x)

        linear, x = nn.Linear(3, 4).double(), torch.randn(5, 6, 3).double()
        loss = lambda m, batch: m(batch).square().sum((1, 2)).mean()  # noqa: E731
        found = scores(Net(linear, flattened), [x], loss)["layer"]
        masked = Masked(linear, 4, -1)
        truth = by_masks(masked, Net(masked, flattened), [sample[None] for sample in x], loss)
        assert found == pytest.approx(truth, rel=1e-9)


def test_duplicated_data_changes_nothing():
    """The gradient of a batch's mean loss would shrink with the batch."""
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(3, 4)), torch.randn(5, 3), torch.randint(0, 4, (5,))
    once, twice = scores(model, [(x, y)]), scores(model, [(torch.cat([x, x]), torch.cat([y, y]))])
    assert once["0"] == pytest.approx(twice["0"], rel=1e-5)


def test_seed_and_errors():
    model, x = nn.Sequential(nn.Linear(3, 4)), [torch.randn(5, 3)]
    assert scores(model, x) != scores(model, x, estimator=ChannelFisher(1))
    with pytest.raises(mps.EstimatorError, match="Fisher information of layer '0' is inf"):
        scores(model.double(), [1e100 * torch.ones(1, 3).double()], lambda m, batch: 1e100 * m(batch).sum())
    assert np.isfinite(list(scores(model, [x[0].double()]).values())).all()
