"""Models with their weights in modules of their own give the outputs that they gave before."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import mpsearch as mps
from mpsearch.models.modules.decomposing import decomposed
from mpsearch.models.modules.weights import canonical
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources import MemoryBytes
from mpsearch.sensitivity import FisherProjection, KLDivergence


def attention(**settings):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, **settings).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


class Calls(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **keywords):
        return self.module(*args, **keywords)


@pytest.mark.parametrize(
    "settings",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 5, "vdim": 6}],
    ids=["plain", "first", "nobias", "kv"],
)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("masked", ["none", "bool", "float", "heads", "padding"])
def test_attention_gives_what_torch_gives(settings, average, masked):
    model = Calls(attention(**settings))
    batch, queries, keys = 3, 4, 5
    q = torch.randn(queries, batch, 8)
    k = torch.randn(keys, batch, settings.get("kdim", 8))
    v = torch.randn(keys, batch, settings.get("vdim", 8))
    if settings.get("batch_first"):
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    masks = {
        "none": {},
        "bool": {"attn_mask": causal},
        "float": {"attn_mask": torch.randn(queries, keys)},
        "heads": {"attn_mask": torch.randn(batch * 2, queries, keys)},
        "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * batch), "attn_mask": causal},
    }[masked]
    expected, weights = model(q, k, v, average_attn_weights=average, **masks)
    with decomposed(model):
        found, seen = model(q, k, v, average_attn_weights=average, **masks)
        alone, nothing = model(q, k, v, need_weights=False, **masks)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(seen, weights)
    assert nothing is None


def test_attention_of_one_sample_without_a_batch():
    for first in (True, False):
        model = Calls(attention(batch_first=first))
        x = torch.randn(4, 8)
        padding = torch.tensor([False, False, True, False])
        expected = model(x, x, x, key_padding_mask=padding)
        with decomposed(model):
            found = model(x, x, x, key_padding_mask=padding)
        torch.testing.assert_close(found, expected)


def encoder(training=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 3)).train(training)


def test_the_model_comes_back_with_its_modules_and_its_memory():
    model = encoder(training=True)
    modules, keys = list(model.modules()), list(model.state_dict())
    whole = model[0].layers[0].self_attn
    with decomposed(model):
        inner = model[0].layers[0].self_attn
        assert inner.q_proj.weight.data_ptr() == whole.in_proj_weight.data_ptr()
        assert inner.training
        assert inner.embed_dim == 8
    assert list(model.modules()) == modules
    with pytest.raises(RuntimeError), decomposed(model):
        model(torch.ones(1, 2, 3))
    assert list(model.modules()) == modules
    assert list(model.state_dict()) == keys
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_in_two_places_stays_one_module():
    shared = attention(batch_first=True)
    model = nn.ModuleList([Calls(shared), Calls(shared)])
    with decomposed(model):
        assert model[0].module is model[1].module
        assert model[0].module is not shared


def test_hooks_of_the_user_still_run():
    model = Calls(attention())
    seen = []
    model.module.register_forward_hook(lambda *_: seen.append(1))
    with decomposed(model):
        model(*[torch.randn(2, 1, 8)] * 3)
    assert seen == [1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
        lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
        lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
        lambda: weight_norm(nn.Linear(4, 4)),
        lambda: spectral_norm(nn.Linear(4, 4)),
        lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5),
        lambda: prune.random_unstructured(prune.l1_unstructured(nn.Linear(4, 4), "weight", 2), "weight", 2),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_parametrized_weight_is_decided_on_as_it_comes_out(make):
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    with decomposed(model):
        torch.testing.assert_close(model(x), expected)
        assert isinstance(model[0].weight, nn.Parameter)
    found = mps.layers(model, x)
    assert [(layer.name, layer.macs) for layer in found] == [("0", 16), ("2", 8)]
    table = mps.profile(model, [x], KLDivergence(), mps.precisions("w2 w16"), progress=False)
    assert table.sensitivity[0, 0] > 0
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("bag", [False, True])
def test_an_embedding_of_limited_norm_is_not_written_into(bag):
    """Rows beyond the norm are looked up at the norm; the weight itself stays, unlike in a run of the model."""
    torch.manual_seed(0)
    table = nn.EmbeddingBag(6, 4, max_norm=1.0) if bag else nn.Embedding(6, 4, max_norm=1.0)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(4 if bag else 12, 2)).eval()
    tokens = torch.tensor([[0, 1, 2], [3, 3, 1]])
    before = table.weight.detach().clone()
    clipped = before / before.norm(dim=1, keepdim=True).clamp(min=1)
    with decomposed(model):
        inside = model(tokens)
        torch.testing.assert_close(model[0].weight, clipped)
    names = [layer.name for layer in mps.layers(model, tokens)]
    assert names == ["0", "2"]
    mps.profile(model, [tokens], KLDivergence(), mps.precisions("w2 w16"), progress=False)
    assert torch.equal(table.weight, before)
    assert table.max_norm == 1
    torch.testing.assert_close(model(tokens), inside)


def test_attention_is_profiled_and_evaluated_as_four_linear_layers():
    """Quantizing the rows of the joined weight by hand gives the measured divergence."""
    model, x = encoder(), torch.randn(6, 5, 8)
    found = mps.layers(model, x, groups="fused")
    names = [layer.name for layer in found]
    assert names[:4] == [f"0.layers.0.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    assert {layer.group for layer in found[:3]} == {"0.layers.0.self_attn.q_proj (same input)"}
    assert [layer.macs for layer in found[:4]] == [5 * 64] * 4
    precision = mps.precisions("w2 w16")
    measured, gradient = mps.profile(
        model, [x], [KLDivergence(), FisherProjection()], precision, layers=found, progress=False
    )
    changed = copy.deepcopy(model)
    inner = changed[0].layers[0].self_attn
    with torch.no_grad():
        inner.in_proj_weight.copy_(RoundToNearest()(inner.in_proj_weight, precision[0]))
        p, q = model(x).log_softmax(-1), changed(x).log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert measured.sensitivity[:3, 0].sum() == pytest.approx(expected, rel=1e-3)
    assert (gradient.sensitivity[:4, 0] > 0).all()
    plan = mps.Plan({name: precision[0] if name in names[:3] else precision[1] for name in names})
    assert mps.evaluate(model, [x], plan, progress=False).kl == pytest.approx(expected, rel=1e-3)


def test_bytes_of_the_parts_are_those_of_the_whole():
    model, x = encoder(), torch.randn(2, 5, 8)
    found = mps.layers(model, x)
    whole = sum(p.numel() * 4 for p in model.parameters())
    with decomposed(model):
        memory = MemoryBytes()(model, found, mps.precisions("w16"))
        assert sum(canonical(model.get_submodule(layer.name)).numel() for layer in found) * 4 == memory.usage.sum()
    assert memory.usage.sum() + memory.fixed == memory.reference == whole
