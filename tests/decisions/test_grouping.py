"""Groups of `mps.layers`: found, cut, added, refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps


class Attention(nn.Module):
    def __init__(self, names=("q", "k", "v", "o"), cross=False):
        super().__init__()
        self.names, self.cross = names, cross
        for name in names:
            self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        q, k, v = (getattr(self, name) for name in self.names[:3])
        other = x + 1 if self.cross else x
        return getattr(self, self.names[3])(F.scaled_dot_product_attention(q(x), k(other), v(other)))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attn, self.mlp, self.head = Attention(**settings), Gated(), nn.Linear(4, 3)

    def forward(self, x):
        x = x + self.attn(x)
        return self.head(x + self.mlp(x))


X = torch.randn(2, 5, 4)


def groups(model, groups="fused", **settings):
    found: dict[str, set[str]] = {}
    for layer in mps.layers(model, X, groups=groups, **settings):
        if layer.group:
            found.setdefault(layer.group, set()).add(layer.name)
    return found


def test_without_a_target_only_what_shares_memory_shares_a_precision():
    """Also where the names are those that engines join."""
    model = Block(names=("q_proj", "k_proj", "v_proj", "o_proj"))
    assert groups(model, "auto") == {}
    model.mlp.up.weight = model.mlp.gate.weight
    assert groups(model, "auto") == {"mlp.gate (shared weight)": {"mlp.gate", "mlp.up"}}
    assert groups(model, "auto", target="torchao") == {"mlp.gate (shared weight)": {"mlp.gate", "mlp.up"}}
    assert groups(model, "auto", target="vllm") == {
        "attn.q_proj (one matrix in vllm)": {"attn.q_proj", "attn.k_proj", "attn.v_proj"},
        "mlp.gate (shared weight)": {"mlp.gate", "mlp.up"},
    }
    with pytest.raises(mps.TableError, match="groups='all', expected 'auto', 'fused', 'none' or name -> layers"):
        groups(model, "all")


def test_found_by_the_flow_whatever_the_names():
    assert groups(Block()) == {
        "attn.q (same input)": {"attn.q", "attn.k", "attn.v"},
        "mlp.gate (same input)": {"mlp.gate", "mlp.up"},
    }
    assert groups(Block(names=("one", "two", "three", "four")))["attn.one (same input)"] == {
        "attn.one",
        "attn.two",
        "attn.three",
    }


def test_names_do_not_join_what_reads_different_tensors():
    found = groups(Block(names=("q_proj", "k_proj", "v_proj", "o_proj"), cross=True))
    assert found["attn.k_proj (same input)"] == {"attn.k_proj", "attn.v_proj"}


class Projections(nn.Module):
    """DeepSeek's two: they read the same tensor and meet only behind other layers."""

    def __init__(self):
        super().__init__()
        self.q_a_proj, self.kv_a_proj_with_mqa, self.q_b_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.q_b_proj(self.q_a_proj(x)) * self.kv_a_proj_with_mqa(x)


def test_names_join_what_reads_the_same_tensor():
    assert groups(Projections()) == {
        "q_a_proj (same input, by name)": {"q_a_proj", "kv_a_proj_with_mqa"},
    }


def test_heads_stay_apart():
    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 3)])
    model.forward = lambda x: torch.cat([head(x) for head in model], -1)
    assert groups(model) == {}


def test_cut_takes_layers_out():
    assert groups(Block(), cut=["attn.v", "mlp.*"]) == {"attn.q (same input)": {"attn.q", "attn.k"}}
    assert groups(Block(), cut=["*"]) == {}
    assert groups(Block(), groups="none") == {}
    with pytest.raises(mps.TableError, match=r"cut='attn\.w' matches no layer"):
        groups(Block(), cut=["attn.w"])


def test_shared_weights_cannot_be_cut():
    model = Block()
    model.mlp.up.weight = model.mlp.gate.weight
    assert groups(model, cut=["*"]) == {"mlp.gate (shared weight)": {"mlp.gate", "mlp.up"}}
    assert "mlp.gate (shared weight, same input)" in groups(model)
    with pytest.raises(mps.TableError, match=r"'mlp\.up' cannot be cut from mlp.gate: shared weight"):
        groups(model, cut=["mlp.up"])


def test_own_groups_take_patterns_and_whole_groups():
    found = groups(Block(), groups={"front": ["attn.*"], "back": ["mlp.down", "head"]})
    assert found["front"] == {"attn.q", "attn.k", "attn.v", "attn.o"}
    assert found["back"] == {"mlp.down", "head"}
    assert set(found) == {"front", "back"}


def test_a_partial_group_is_refused():
    mine = {"mine": ["attn.o", "head"]}
    with pytest.raises(
        mps.TableError, match=r"'mine' splits the layers attn.o, mlp.down \(outputs added\); cut=\['attn.o'\]"
    ):
        groups(Block(), mine, tie_residuals=True)
    assert groups(Block(), mine, tie_residuals=True, cut=["attn.o"]) == {"mine": {"attn.o", "head"}}
    named = Block(names=("q_proj", "k_proj", "v_proj", "o_proj"))
    with pytest.raises(
        mps.TableError, match=r"'mine' splits the layers attn.q_proj, attn.k_proj, attn.v_proj \(one matrix in vllm\)$"
    ):
        groups(named, {"mine": ["attn.q_proj", "head"]}, target="vllm")
    with pytest.raises(mps.TableError, match="'head' is in two groups, 'a' and 'b'"):
        groups(Block(), groups={"a": ["head", "attn.o"], "b": ["head", "mlp.down"]})
    with pytest.raises(
        mps.TableError, match=r"'attn.k' is excluded but in one group with 'attn.q', 'attn.v' \(same input\)"
    ):
        groups(Block(), exclude=["attn.k"])
    assert groups(Block(), exclude=["attn.k"], cut=["attn.k"])["attn.q (same input)"] == {"attn.q", "attn.v"}
    assert set(groups(Block(), exclude=["attn.[qkv]"])) == {"mlp.gate (same input)"}


def test_operands_of_residual_sums_are_an_option():
    assert "outputs added" not in "".join(groups(Block()))
    assert groups(Block(), tie_residuals=True)["attn.o (outputs added)"] == {"attn.o", "mlp.down"}


def test_groups_reach_the_plan():
    model = Block()
    table = mps.profile(
        model, [X], mps.sensitivity.KLDivergence(), mps.precisions("w2 w4 w8"), groups="fused", progress=False
    )
    for bits in (3, 4, 5, 6):
        plan = mps.solve(table, mps.Budget(average_bits=bits)).plan
        assert plan["attn.q"] == plan["attn.k"] == plan["attn.v"]
        assert plan["mlp.gate"] == plan["mlp.up"]
