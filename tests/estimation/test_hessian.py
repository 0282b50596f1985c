"""Losses with a gradient, and the gradients, against loops over single samples."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.estimation.gradients.hessian import (
    differentiable_weights,
    mean_gradient,
    ones_like_sample,
    supervised_loss,
)
from mpsearch.estimation.relative_error import cells_from_scores


class Keep:
    """Runs a function on the setting and keeps what it returns."""

    def __init__(self, function):
        self.function = function

    def estimate(self, context):
        self.found = self.function(context)
        return cells_from_scores(context, torch.ones(len(context.decisions)).double().numpy())


def run(function, model, batches, loss=None):
    keep = Keep(function)
    mps.profile(model, batches, keep, mps.precisions("w8"), loss=loss)
    return keep.found


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(sizes=(5, 2)):
    torch.manual_seed(1)
    return [(torch.randn(n, 3).double(), torch.randint(0, 3, (n,))) for n in sizes]


def by_hand(model, samples):
    """Mean over samples of the gradient of -log p(label)."""
    total = [torch.zeros_like(w) for w in (model[0].weight, model[2].weight)]
    for x, y in samples:
        value = -model(x[None])[0].log_softmax(-1)[y] / len(samples)
        for whole, part in zip(total, torch.autograd.grad(value, (model[0].weight, model[2].weight)), strict=True):
            whole += part
    return total


@pytest.mark.parametrize("loss", [None, "cross-entropy"])
def test_labels_of_the_data(loss):
    model, batches = net(), data()
    found = run(lambda s: mean_gradient(s, differentiable_weights(s), 0), model, batches, loss)
    truth = by_hand(model, [pair for batch in batches for pair in zip(*batch, strict=True)])
    torch.testing.assert_close(found, truth)


def test_drawn_labels_follow_the_model():
    model = net()
    x = torch.randn(1, 3).double().expand(4000, 3)

    def share(context):
        generator = torch.Generator().manual_seed(0)
        return float(supervised_loss(context, x, generator).detach())

    p = model(x[:1])[0].softmax(-1).detach()
    found = run(share, model, [x])  # mean of -log p(drawn): the entropy of the prediction
    entropy = float(-(p * p.log()).sum())
    spread = float((p * p.log().square()).sum() - entropy**2) ** 0.5
    assert abs(found - entropy) < 4 * spread / 4000**0.5


def test_drawn_labels_are_seeded():
    model, batches = net(), [batch[0] for batch in data()]
    first, same, other = (
        run(lambda s, seed=seed: mean_gradient(s, differentiable_weights(s), seed), model, batches)
        for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])


def test_a_certain_model_draws_its_prediction():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    nn.init.constant_(model[2].bias, 0.0)
    with torch.no_grad():
        model[2].bias[1] = 60.0
    batches = data()
    found = run(lambda s: mean_gradient(s, differentiable_weights(s), 0), model, [batch[0] for batch in batches])
    truth = by_hand(model, [(x, 1) for batch in batches for x in batch[0]])
    torch.testing.assert_close(found, truth)


def test_half_precision_is_summed_in_float32():
    model, batches = net().bfloat16(), [torch.randn(4, 3).bfloat16()]
    found = run(lambda s: mean_gradient(s, differentiable_weights(s), 0), model, batches)
    assert {g.dtype for g in found} == {torch.float32}


def test_what_a_weight_does_not_reach_is_zero():
    model = net()
    loss = lambda m, batch: m[2].weight.sum() + 0 * m(batch).detach().sum()  # noqa: E731
    first, second = run(
        lambda s: mean_gradient(s, differentiable_weights(s), 0), model, [torch.ones(2, 3).double()], loss
    )
    assert torch.equal(first, torch.zeros_like(first))
    assert torch.equal(second, torch.ones_like(second))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, batch: m(batch).sum().detach(), "cannot be differentiated"),
        (lambda m, batch: m(batch).abs().sqrt().sum() * 0 + (m[0].weight * 0).abs().sqrt().sum(), "not finite"),
    ],
)
def test_errors(loss, message):
    with pytest.raises(mps.EstimatorError, match=message):
        run(lambda s: mean_gradient(s, differentiable_weights(s), 0), net(), [torch.ones(2, 3).double()], loss)


def test_ones():
    ids, mask = torch.tensor([[3, 4], [5, 6]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    found = ones_like_sample({"input_ids": ids, "mask": mask, "labels": ids})
    assert found.keys() == {"input_ids", "mask"}
    assert torch.equal(found["input_ids"], ids[:1])
    assert torch.equal(found["mask"], torch.ones(1, 2))
    (first, second), labels = ones_like_sample(((mask, ids), ids), torch.float64)
    assert torch.equal(first, torch.ones(1, 2).double())
    assert torch.equal(second, ids[:1])
    assert labels is None
