"""`kv_cache_bytes` against tensors that are really filled."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.quantize import RoundToNearest
from mpsearch.resources import KVCacheBytes


class Decoder(nn.Module):
    """Two layers with caches of different shape, values shorter than keys; the second keeps 10 tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, ids, use_cache=False):
        x = self.embed(ids)
        shapes = [(len(ids), 2, ids.shape[1], 8), (len(ids), 1, ids.shape[1], 16)]
        layers = [
            SimpleNamespace(keys=torch.zeros(shape), values=torch.zeros(shape)[..., :5], sliding_window=window)
            for shape, window in zip(shapes, (None, 10), strict=True)
        ]
        return SimpleNamespace(logits=x, past_key_values=SimpleNamespace(layers=layers) if use_cache else None)


IDS = torch.tensor([[1, 2, 3]])
CACHES = [mps.Layer(f"cache.{number}", "kv_cache", (4,)) for number in range(4)]


def filled(heads, size, tokens, precision):
    """Bytes of all heads of all tokens, each packed alone."""
    if not precision.quantizes_weight:
        return 4 * heads * size * tokens
    one = RoundToNearest().codes(torch.randn(heads, size), precision).pack().nbytes
    return one * tokens


def test_decisions_layer_by_layer():
    options = mps.precisions("w16 w8 w4 wmxfp4")
    found = KVCacheBytes(context=100, batch=3)(Decoder(), [mps.Layer("fc"), *CACHES], options, example=IDS)
    rows = [[0.0] * 4]
    for heads, size, tokens in ((2, 8, 100), (2, 5, 100), (1, 16, 10), (1, 5, 10)):
        rows.append([3.0 * filled(heads, size, tokens, one) for one in options])
    assert found.usage.tolist() == rows
    assert found.fixed == 0
    assert found.reference == sum(row[0] for row in rows)


def test_without_decisions_at_the_stated_precisions():
    found = KVCacheBytes(100, 1, mps.Precision("8"), mps.Precision("4"))(
        Decoder(), [mps.Layer("fc")], mps.precisions("w4"), example=IDS
    )
    keys = filled(2, 8, 100, mps.Precision("8")) + filled(1, 16, 10, mps.Precision("8"))
    values = filled(2, 5, 100, mps.Precision("4")) + filled(1, 5, 10, mps.Precision("4"))
    assert found.fixed == keys + values
    assert not found.usage.any()


def test_a_format_that_cannot_hold_a_head_is_not_allowed():
    found = KVCacheBytes(10)(Decoder(), CACHES, mps.precisions("wq8_0 w8"), example=IDS)
    assert np.isnan(found.usage).tolist() == [[True, False]] * 4


def test_refusals():
    with pytest.raises(mps.TableError, match="2 layers of kind kv_cache for 4 keys and values; decide all or none"):
        KVCacheBytes()(Decoder(), CACHES[:2], mps.precisions("w4"), example=IDS)
    with pytest.raises(mps.TableError, match="Linear takes no use_cache=True"):
        KVCacheBytes()(nn.Linear(2, 2), [mps.Layer("fc")], mps.precisions("w4"), example=torch.ones(1, 2))
    with pytest.raises(mps.TableError, match="0 tokens x 1 sequences"):
        KVCacheBytes(context=0)


def test_a_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=20,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    found = KVCacheBytes(context=50, batch=2)(model, [], mps.precisions("w4"), example={"input_ids": IDS})
    assert found.reference == found.fixed == 2 * 50 * 3 * 2 * 2 * 8 * 4
