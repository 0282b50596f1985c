"""Mixture of experts: routed by hand, so that it is known who sees a token."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.models.modules.experts import routers
from mpsearch.sensitivity import FisherProjection, KLDivergence


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Mixture(nn.Module):
    """Sends a token to the expert that its first number names."""

    def __init__(self, count=4):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(4, count, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(count))
        self.shared_gate = nn.Linear(4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        score = self.gate(x).sigmoid()
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens = (x[:, 0].long() == number).nonzero()[:, 0]
            if len(tokens):
                total[tokens] = expert(x[tokens]) * score[tokens, number, None]
        return self.head(x + total + self.shared_gate(x).sigmoid() * x)


def tokens(*numbers):
    torch.manual_seed(1)
    x = torch.randn(len(numbers), 4)
    x[:, 0] = torch.tensor(numbers) + 0.5
    return x


def names(found):
    return [layer.name for layer in found]


def test_routers_are_left_alone_unless_asked_for():
    model, x = Mixture(), tokens(0, 1, 2, 3)
    assert "gate" not in names(mps.layers(model, x))
    assert "shared_gate" not in names(mps.layers(model, x))
    assert {"gate", "shared_gate"} < set(names(mps.layers(model, x, decide_routers=True)))
    assert routers(model, {"gate": model.gate, "head": model.head}) == ["gate"]


def test_a_router_beside_experts_that_are_no_layers():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 4))

    model = nn.Module()
    model.experts, model.router, model.up = Stack(), nn.Linear(4, 3), nn.Linear(4, 8)
    assert routers(model, {"router": model.router, "up": model.up}) == ["router"]


def test_activity_is_counted_in_macs():
    found = {layer.name: layer.macs for layer in mps.layers(Mixture(), tokens(0, 0, 0, 1))}
    assert found["experts.0.w1"] == 24 * 3 // 4
    assert found["experts.1.w1"] == 24 * 1 // 4
    assert found["experts.2.w1"] == 0


def test_an_expert_without_tokens_is_grouped_as_the_others():
    found = {layer.name: layer.group for layer in mps.layers(Mixture(), tokens(0, 0, 1, 1), groups="fused")}
    for number in range(4):
        assert found[f"experts.{number}.w1"] == found[f"experts.{number}.w3"] == f"experts.{number}.w1 (same input)"
        assert found[f"experts.{number}.w2"] == ""


def test_blocks_and_groups_of_experts():
    block = {layer.name: layer.group for layer in mps.layers(Mixture(), tokens(0, 1, 2, 3), experts="block")}
    assert {block[name] for name in block if "experts" in name} == {"experts.0.w1 (experts of one block)"}
    halves = {"low": ["experts.[01].*"], "high": ["experts.[23].*"]}
    own = {layer.name: layer.group for layer in mps.layers(Mixture(), tokens(0, 1, 2, 3), groups=halves)}
    assert own["experts.0.w2"] == own["experts.1.w1"] == "low"
    assert own["experts.3.w2"] == "high"
    with pytest.raises(mps.TableError, match="experts='all', expected 'each' or 'block'"):
        mps.layers(Mixture(), tokens(0), experts="all")


@pytest.mark.parametrize("estimator", [KLDivergence(), FisherProjection()])
def test_experts_without_tokens_get_the_mean_of_the_others_and_are_named(estimator):
    model, batches = Mixture(), [tokens(0, 0, 1, 1), tokens(0, 2, 2, 1)]
    with pytest.warns(UserWarning, match=r"no calibration data reached the experts' layers experts.3.w1"):
        table = mps.profile(model, batches, estimator, mps.precisions("w2 w4 w16"), progress=False)
    row = {layer.name: table.sensitivity[i] for i, layer in enumerate(table.layers)}
    for part in ("w1", "w2", "w3"):
        others = np.mean([row[f"experts.{number}.{part}"] for number in (0, 1, 2)], axis=0)
        np.testing.assert_allclose(row[f"experts.3.{part}"], others)
        assert row[f"experts.3.{part}"][0] > 0
        assert row[f"experts.2.{part}"][0] > 0, "reached by the second batch only, and measured"
    assert table.origin["scored_by_mean_of_experts"] == [f"experts.3.{part}" for part in ("w1", "w3", "w2")]
    if table.sensitivity_se is not None:
        se = dict(zip(names(table.layers), table.sensitivity_se, strict=True))
        assert np.isnan(se["experts.3.w1"]).all()
        assert np.isfinite(se["experts.2.w1"]).all()


def test_a_block_that_nobody_reaches_is_left_out():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 2)
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, x):
            return self.head(x)

    with pytest.warns(UserWarning, match="never calls experts.0"):
        assert names(mps.layers(Dead(), tokens(0))) == ["head"]


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixture = Mixture(2)

    def forward(self, x):
        return self.mixture(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)


def test_routed_tokens_are_not_taken_for_samples():
    """Two tokens of the first sample reach the first expert: as many as there are samples, and none of the second."""
    torch.manual_seed(3)
    model, x = Sequences(), torch.randn(2, 4, 4)
    x[..., 0] = torch.tensor([[0.5, 0.5, 1.5, 1.5], [1.5, 1.5, 1.5, 1.5]])
    settings = {"precisions": mps.precisions("w2 w16"), "layers": mps.layers(model, x, cut=["*"]), "progress": False}
    together, alone = (
        mps.profile(model, batches, FisherProjection(draws=300), **settings).sensitivity[:, 0]
        for batches in ([x], [x[:1], x[1:]])
    )
    np.testing.assert_allclose(together, alone, rtol=0.15, atol=1e-7)


def test_routers_one_module_deeper_and_experts_by_other_names():
    """Switch and NLLB name experts `expert_3`, Phi `local_experts`; JetMoE, DBRX and Switch have a router in a module of its own."""

    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.wi, self.wo = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.wo(torch.relu(self.wi(x)))

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(4, 3)

        def forward(self, x):
            return self.classifier(x)

    class Block(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.router, self.shared = Router(), nn.Linear(4, 4)
            self.local_experts = nn.ModuleDict({name.format(n): Expert() for n in range(3)})

        def forward(self, x):
            first, *_ = self.local_experts.values()  # the others are given nothing
            return self.shared(x) + first(x) * self.router(x).softmax(-1)[:, :1]

    for name in ("{}", "expert_{}"):
        block = Block(name)
        found = [layer.name for layer in mps.layers(block, torch.randn(5, 4))]
        each = [f"local_experts.{name.format(n)}.{part}" for n in range(3) for part in ("wi", "wo")]
        assert found == ["shared", *each]
        routed = mps.layers(block, torch.randn(5, 4), decide_routers=True)
        assert [layer.name for layer in routed] == ["router.classifier", "shared", *each]


def test_stacks_of_experts_that_functions_read():
    """As Llama 4 (experts, in, out), JetMoE (experts, out, in), one at a time, and DBRX (experts x ffn, hidden) have them."""

    class Experts(nn.Module):
        def __init__(self, *shapes):
            super().__init__()
            self.up, self.down = (nn.Parameter(torch.randn(shape) / 3) for shape in shapes)

    class Block(nn.Module):
        def __init__(self, way, *shapes):
            super().__init__()
            self.way, self.router, self.experts = way, nn.Linear(4, 3), Experts(*shapes)

        def forward(self, x):
            up, down, way = self.experts.up, self.experts.down, self.way
            gates = self.router(x).softmax(-1).T[..., None]  # (3, tokens, 1)
            if way == "bmm":
                made = torch.bmm(torch.relu(torch.bmm(x.expand(3, -1, -1), up)), down)
            elif way == "one by one":
                made = torch.stack([torch.relu(x @ up[i].T) @ down[i].T for i in range(3)])
            else:
                first, second = up.view(3, 6, 4), down.view(3, 6, 4)
                made = torch.stack([torch.relu(x @ first[i].T) @ second[i] for i in range(3)])
            return (gates * made).sum(0)

    shapes = {
        "bmm": ((3, 4, 6), (3, 6, 4)), "one by one": ((3, 6, 4), (3, 4, 6)), "behind each other": ((18, 4), (18, 4)),
    }  # fmt: skip
    for way, of in shapes.items():
        layers = mps.layers(Block(way, *of), torch.randn(5, 4))
        assert [(layer.name, layer.weight_shape) for layer in layers] == [
            ("experts.up", (18, 4)),
            ("experts.down", (12, 6)),
        ]
        assert [layer.macs for layer in layers] == [3 * 24, 3 * 24]
