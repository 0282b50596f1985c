"""One memory under several parameters is one decision, whatever its views, and has one precision."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import FisherProjection, KLDivergence


class Net(nn.Module):
    """A table, and a head whose weight is made of the table's."""

    def __init__(self, head):
        super().__init__()
        self.table, self.inner = nn.Embedding(12, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = nn.Parameter(head(self.table.weight.detach()))
        self.transposed = self.head.weight.shape[0] == 6

    def forward(self, ids):
        h = torch.tanh(self.inner(self.table(ids)))
        return h @ self.head.weight if self.transposed else self.head(h)


HEADS = {
    "the same": lambda table: table,
    "a view": lambda table: table.view(12, 6),
    "a transpose": lambda table: table.T,
    "a slice of rows": lambda table: table[2:8],
    "a slice of columns": lambda table: table[:7, :6],
}


def ids():
    return torch.randint(0, 12, (4, 5), generator=torch.Generator().manual_seed(0))


def net(name):
    torch.manual_seed(0)
    return Net(HEADS[name]).eval()


@pytest.mark.parametrize("name", HEADS)
def test_one_decision_and_one_precision(name):
    model, precision = net(name), mps.Precision("2")
    layers = mps.layers(model, ids())
    decisions = {layer.group or layer.name for layer in layers}
    assert len(decisions) == 2
    parts = {layer.name: layer.macs for layer in layers}
    assert sum(parts.values()) - parts["inner"] == 5 * model.head.weight.numel()
    table = mps.profile(
        model, [ids()], KLDivergence(), [precision], layers=layers, resources=["memory_bytes"], progress=False
    )
    assert table.reference_usage["memory_bytes"] == 4 * (72 + 36 + 6)
    whole = mps.Plan({layer.name: mps.Precision("16") if layer.name == "inner" else precision for layer in layers})
    before = [p.detach().clone() for p in model.parameters()]
    found = mps.evaluate(model, [ids()], whole, metric="kl", progress=False)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    changed = net(name)
    with torch.no_grad():
        changed.table.weight.copy_(RoundToNearest()(model.table.weight.detach(), precision))
        p, q = (run(ids()).log_softmax(-1).double() for run in (model, changed))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    scores = [row[0] for layer, row in zip(table.layers, table.sensitivity, strict=True) if layer.name != "inner"]
    assert sum(scores) == pytest.approx(found.kl, rel=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_of_all_uses_count(name):
    """The weight's own gradient, which the sweep holds against what the calls account for."""
    table = mps.profile(net(name), [ids()], FisherProjection(), mps.precisions("w2 w4"), progress=False)
    assert (table.sensitivity > 0).all()


@pytest.mark.parametrize("name", ["a transpose", "a slice of rows"])
def test_a_plan_cannot_give_it_two(name):
    plan = mps.Plan({"table": mps.Precision("4"), "head": mps.Precision("2")})
    with pytest.raises(mps.PlanError, match="'table' and 'head' share a weight"):
        mps.evaluate(net(name), [ids()], plan, progress=False)
    with pytest.raises(mps.PlanError, match="lies in that of 'table'"):
        mps.evaluate(net(name), [ids()], mps.Plan({"head": mps.Precision("2")}), progress=False)
    both = mps.Plan(dict.fromkeys(["table", "head"], mps.Precision("4")))
    assert mps.evaluate(net(name), [ids()], both, metric="kl", progress=False).kl > 0


def test_slices_beside_each_other_are_decisions_of_their_own():
    buffer = torch.randn(40)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 5, bias=False))
    model[0].weight, model[1].weight = nn.Parameter(buffer[:20].view(4, 5)), nn.Parameter(buffer[20:].view(5, 4))
    x = torch.randn(8, 5)
    assert [(layer.name, layer.group) for layer in mps.layers(model, x)] == [("0", ""), ("1", "")]
    with torch.no_grad():
        expected = model(x)
    assert mps.evaluate(model, [x], mps.Plan({"0": mps.Precision("2")}), metric="kl", progress=False).kl > 0
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight, buffer[:20].view(4, 5))
