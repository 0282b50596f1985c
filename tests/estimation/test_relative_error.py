"""Scores of layers made cells, and what all estimators that do so have in common."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.estimation.relative_error import cells_from_scores, unit_scores
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity.activation_entropy import ActivationEntropy
from mpsearch.sensitivity.adapt_divergence import AdaPTDivergence
from mpsearch.sensitivity.channel_fisher import ChannelFisher
from mpsearch.sensitivity.emq import EMQ
from mpsearch.sensitivity.gradient_weight import GradientWeight
from mpsearch.sensitivity.grasp import GraSP
from mpsearch.sensitivity.hawq_proxies import HAWQProxy, HAWQV2Proxy
from mpsearch.sensitivity.orthogonality import Orthogonality
from mpsearch.sensitivity.qe import QE
from mpsearch.sensitivity.salience_groups import SalienceGroups
from mpsearch.sensitivity.snip import SNIP
from mpsearch.sensitivity.synflow import Synflow
from mpsearch.sensitivity.weight_entropy import WeightEntropy

ESTIMATORS = [
    ActivationEntropy(),
    AdaPTDivergence(),
    ChannelFisher(),
    EMQ(),
    GradientWeight(),
    GraSP(),
    HAWQProxy(4),
    HAWQV2Proxy(16),
    Orthogonality(),
    QE(),
    SalienceGroups(),
    SNIP(),
    Synflow(),
    WeightEntropy(),
]


class Fixed:
    """Unit u scores u + 1, with a standard error of a tenth."""

    def estimate(self, context):
        weights = {w: u + 1.0 for u, decision in enumerate(context.decisions) for w in context.parameters(decision)}
        score = unit_scores(context, weights)
        return cells_from_scores(context, score, score / 10, {"note": 1})


class Tied(nn.Module):
    """An embedding and a head that share a weight, a layer that runs twice, one that nobody calls."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.twice = nn.Linear(6, 6)
        self.idle = nn.Linear(2, 2)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return self.head(self.twice(torch.tanh(self.twice(x))))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding="same", groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.dead = nn.Conv2d(4, 4, 1)
        nn.init.zeros_(self.dead.weight)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.up(self.depthwise(self.norm(self.conv(x)).relu()))
        return self.fc((x + self.dead(x)).mean((2, 3)))


def cnn(dtype=torch.float32):
    torch.manual_seed(0)
    model = Small()
    model.norm.running_mean.normal_()
    return model.to(dtype), [torch.randn(n, 2, 6, 6, dtype=dtype) for n in (4, 3)]


def tokens():
    torch.manual_seed(0)
    ids = torch.randint(0, 9, (3, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    return Tied(), [{"input_ids": ids, "attention_mask": mask, "labels": ids}, {"input_ids": ids[:2]}]


MODELS = {"cnn": cnn, "bfloat16": lambda: cnn(torch.bfloat16), "tokens": tokens}


@pytest.mark.filterwarnings("ignore:the example never calls idle")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_contract(estimator, name):
    model, batches = MODELS[name]()
    rounding = RoundToNearest(scale="max")
    table = mps.profile(model, batches, estimator, mps.precisions("w2 w4 w16"), quantizer=rounding)
    assert table.unit == "relative"
    assert np.isfinite(table.sensitivity).all()
    assert (table.sensitivity[:, 2] == 0).all()
    assert (table.sensitivity.sum(0)[:2] > 0).all()
    assert table.sensitivity[:, 0].sum() > table.sensitivity[:, 1].sum()
    if name != "tokens":
        row = [layer.name for layer in table.layers].index("dead")
        assert (table.sensitivity[row] == 0).all()  # a weight of zeros lies on every grid
    decisions = len({layer.group or layer.name for layer in table.layers})
    cost, used = estimator.cost(len(batches), decisions, 3), table.origin["passes"]
    assert used == pytest.approx({"forward": cost.forward, "backward": cost.backward})
    again = mps.profile(model, batches, estimator, mps.precisions("w2 w4 w16"), quantizer=rounding)
    np.testing.assert_array_equal(table.sensitivity, again.sensitivity)
    assert eval(repr(estimator)) == estimator


def test_cells_against_a_loop():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.Linear(6, 2))
    precisions = mps.precisions("w2 w3g2 w16")
    table = mps.profile(model, [torch.randn(3, 4)], Fixed(), precisions, groups={"pair": ["0", "2"]})
    errors = {}
    for name in ("0", "2", "3"):
        w = model.get_submodule(name).weight.detach().double()
        noise = [(RoundToNearest()(w.float(), p).double() - w).square().sum().item() for p in precisions]
        errors[name] = (np.array(noise), w.square().sum().item())
    pair = (errors["0"][0] + errors["2"][0]) / (errors["0"][1] + errors["2"][1])
    last = errors["3"][0] / errors["3"][1]
    # the pair's score is the sum over its two weights, and is shared by its two layers
    np.testing.assert_allclose(table.sensitivity, [pair * 1.0, pair * 1.0, last * 2.0], rtol=1e-9)
    np.testing.assert_allclose(table.sensitivity_se, table.sensitivity / 10)
    assert table.origin["note"] == 1
    assert table.origin["passes"] == {"forward": 0, "backward": 0}


def test_quantized_inputs_add_their_own_error():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [torch.randn(6, 4), torch.randn(2, 4)]
    table = mps.profile(model, batches, Fixed(), mps.precisions("w4 w16a3 w4a3"))
    x = torch.cat(batches)
    for row, given in enumerate((x, model[1](model[0](x)).detach())):
        low, high = min(0.0, float(given.min())), max(0.0, float(given.max()))
        step = (high - low) / 7
        zero = round(-low / step)
        found = (given / step).round().clamp(-zero, 7 - zero) * step
        expected = float((found - given).square().sum() / given.square().sum()) * (row + 1)
        assert table.sensitivity[row, 1] == pytest.approx(expected, rel=1e-3)
        assert table.sensitivity[row, 2] == pytest.approx(table.sensitivity[row, :2].sum())
    assert table.origin["passes"] == {"forward": 1, "backward": 0}


def test_zeros_that_do_not_stay_zeros_are_named():
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    with pytest.raises(mps.EstimatorError, match="'0' at w4 is inf"):
        mps.profile(model, [torch.ones(1, 2)], Fixed(), mps.precisions("w4"), quantizer=lambda w, p: w + 1)
