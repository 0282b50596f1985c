"""Inputs of proxies against loops over samples and dense Hessians."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.proxies.inputs import cost, weight_inputs
from mpsearch.estimation.proxies.tree import INPUTS


class Reader:
    """An estimator that keeps what it is given."""

    def __init__(self, *names, num_samples=2, seed=0):
        self.names, self.num_samples, self.seed = names, num_samples, seed

    def estimate(self, context):
        found = weight_inputs(context, self.names, num_samples=self.num_samples, seed=self.seed)
        place = {p: layer.name for decision in context.decisions for p, layer in context.parameters(decision).items()}
        self.found = {place[p]: {name: x.clone() for name, x in inputs.items()} for p, inputs in found.items()}
        self.passes = context.passes
        return Estimate(np.zeros((len(context.decisions), len(context.precisions))), unit="relative")


def read(model, batches, *names, loss=None, **settings):
    reader = Reader(*names, **settings)
    mps.profile(model, batches, reader, mps.precisions("w4"), loss=loss, progress=False)
    return reader


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def batches():
    torch.manual_seed(1)
    return [(torch.randn(n, 3).double(), torch.randint(0, 3, (n,))) for n in (4, 2)]


def test_weight_and_gradient():
    model, found = net(), read(net(), batches(), "weight", "gradient").found
    total = sum(len(x) for x, _ in batches())
    for x, y in batches():
        (len(x) / total * F.cross_entropy(model(x), y)).backward()
    for name in ("0", "2"):
        weight = model.get_submodule(name).weight
        assert torch.equal(found[name]["weight"], weight)
        torch.testing.assert_close(found[name]["gradient"], weight.grad)
        assert set(found[name]) == {"weight", "gradient"}


def test_virtual_gradient():
    model, found = net(), read(net(), batches(), "virtual_gradient").found
    model(torch.ones(1, 3).double()).sum().backward()
    torch.testing.assert_close(found["0"]["virtual_gradient"], model[0].weight.grad)


def loss(model, batch):
    return model(batch[0]).square().mean() + model[2].weight.pow(4).sum()


def test_hessian_diagonal_is_dense_on_average():
    """One probe is z (H z) exactly; the mean of all sign vectors is the diagonal."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Tanh(), nn.Linear(1, 2, bias=False)).double()
    data = [(torch.randn(3, 2).double(), None)]
    weights = [model[0].weight, model[2].weight]

    def value(a, b):
        out = torch.tanh(data[0][0] @ a.T) @ b.T
        return out.square().mean() + b.pow(4).sum()

    blocks = torch.autograd.functional.hessian(value, tuple(w.detach() for w in weights))
    diagonals = [blocks[i][i].reshape(2, 2).diagonal() for i in range(2)]
    found = read(model, data, "hessian", loss=loss, num_samples=1500).found
    for name, diagonal in zip(("0", "2"), diagonals, strict=True):
        np.testing.assert_allclose(found[name]["hessian"].flatten(), diagonal, rtol=0.1, atol=0.03)
    once = read(model, data, "hessian", loss=loss, num_samples=1, seed=5).found
    generator = torch.Generator().manual_seed(5)
    z = [2.0 * torch.randint(0, 2, w.shape, generator=generator, dtype=torch.int8).double() - 1 for w in weights]
    for i, name in enumerate(("0", "2")):
        product = sum(blocks[i][j].reshape(2, 2) @ z[j].flatten() for j in range(2))
        torch.testing.assert_close(once[name]["hessian"].flatten(), z[i].flatten() * product)


def test_the_hessian_of_batches_is_their_mean():
    (x, y), (u, v) = batches()
    apart = read(net(), [(x, y), (u, v)], "hessian", num_samples=500).found["0"]["hessian"]
    together = read(net(), [(torch.cat([x, u]), torch.cat([y, v]))], "hessian", num_samples=500).found["0"]["hessian"]
    np.testing.assert_allclose(apart, together, atol=0.2 * float(together.abs().max()))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2), (3, 4, 7, 6)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 5, 5)),
        (nn.Conv1d(3, 5, 2), (2, 3, 6)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 3, 3)),
        (nn.Linear(4, 2), (3, 5, 4)),
    ],
)
def test_activation_is_what_each_weight_multiplies(layer, shape):
    """With one weight at 1, all others 0 and no bias, the output is the input that it multiplies."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    first, second = x[:1], x[1:]
    found = read(nn.Sequential(layer), [first, second], "activation").found["0"]["activation"]
    places = layer(x).numel() / (6 if isinstance(layer, nn.ConvTranspose2d) else len(layer.weight))
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.zero_()
        for place in range(0, layer.weight.numel(), 5):
            layer.weight.zero_()
            layer.weight.view(-1)[place] = 1
            power = float(layer(x).square().sum()) / places
            assert float(found.flatten()[place]) == pytest.approx(power**0.5, rel=1e-5, abs=1e-7)


class Tied(nn.Module):
    """Tokens, two linear layers of one weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.relu(self.one(self.embedding(x))))


def test_activation_of_tokens_and_of_a_shared_weight():
    torch.manual_seed(0)
    model, tokens = Tied(), torch.tensor([[0, 1, 1], [3, 1, 0]])
    found = read(model, [tokens], "activation").found
    frequency = torch.tensor([2, 3, 0, 1, 0]) / 6
    torch.testing.assert_close(found["embedding"]["activation"], frequency.sqrt().double()[:, None].expand(5, 4))
    with torch.no_grad():
        x = model.embedding(tokens).reshape(-1, 4)
        seen = torch.cat([x, torch.relu(model.one(x))]).double()
    expected = seen.square().mean(0).sqrt().expand(4, 4)
    torch.testing.assert_close(found["one"]["activation"], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("names", [[name] for name in INPUTS] + [list(INPUTS)])
def test_what_it_costs(names):
    counted = read(net(), batches(), *names, num_samples=3).passes
    told = cost(names, 2, 3)
    assert (counted.forward, counted.backward) == pytest.approx((told.forward, told.backward))


def test_seed():
    data = [x for x, _ in batches()]
    for name in ("gradient", "hessian"):
        a, b, c = (read(net(), data, name, seed=seed).found["0"][name] for seed in (0, 0, 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


class Steep(nn.Module):
    """The identity, with an infinite slope."""

    def forward(self, x):
        return (x - x.detach()).abs().sqrt() + x


def test_what_is_not_finite_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), Steep())
    with pytest.raises(mps.EstimatorError, match="the virtual_gradient of a layer is not finite"):
        read(model, [torch.ones(2, 3)], "virtual_gradient")
