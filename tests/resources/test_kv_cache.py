"""`kv_cache_bytes` against tensors that are really filled and packed."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources import BitOps, KVCacheBytes, MeasuredLatency, MemoryBytes, Roofline, Total


class Decoder(nn.Module):
    """Two layers with caches of different shape, values shorter than keys; the second keeps 10 tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.k_cache, self.v_cache = mps.KVCache(), mps.KVCache()
        self.local = nn.ModuleDict({"k_cache": mps.KVCache(window=10), "v_cache": mps.KVCache(window=10)})

    def forward(self, ids):
        for caches, shape in ((self._modules, (2, 8)), (self.local._modules, (1, 16))):
            filled = torch.zeros(len(ids), shape[0], ids.shape[1], shape[1])
            caches["k_cache"](filled)
            caches["v_cache"](filled[..., :5])
        return self.embed(ids)


IDS = torch.tensor([[1, 2, 3]])
NAMES = ["k_cache", "v_cache", "local.k_cache", "local.v_cache"]
CACHES = [mps.Layer(name, "kv_cache") for name in NAMES]


def filled(heads, size, tokens, precision):
    """Bytes of all heads of all tokens, each token packed alone."""
    if not precision.quantizes_weight:
        return 4 * heads * size * tokens
    one = RoundToNearest().codes(torch.randn(heads, size), precision).pack().nbytes
    return one * tokens


def test_decisions_layer_by_layer():
    options = mps.precisions("w16 w8 w4 wmxfp4 w4g4")
    found = KVCacheBytes(context=100, batch=3)(Decoder(), [mps.Layer("embed"), *CACHES], options, example=IDS)
    rows = [[0.0] * 5]
    for heads, size, tokens in ((2, 8, 100), (2, 5, 100), (1, 16, 10), (1, 5, 10)):
        rows.append([3.0 * filled(heads, size, tokens, one) for one in options])
    assert found.usage.tolist() == rows
    assert found.fixed == 0
    assert found.reference == sum(row[0] for row in rows)


def test_caches_that_are_no_decision_at_the_stated_precisions():
    resource = KVCacheBytes(100, 1, mps.Precision("8"), mps.Precision("4"))
    found = resource(Decoder(), [CACHES[3]], mps.precisions("w2"), example=IDS)
    keys = filled(2, 8, 100, mps.Precision("8")) + filled(1, 16, 10, mps.Precision("8"))
    assert found.fixed == keys + filled(2, 5, 100, mps.Precision("4"))
    assert found.usage.tolist() == [[filled(1, 5, 10, mps.Precision("2"))]]


def test_a_format_that_cannot_hold_a_head_is_not_allowed():
    found = KVCacheBytes(10)(Decoder(), CACHES, mps.precisions("wq8_0 w8"), example=IDS)
    assert np.isnan(found.usage).tolist() == [[True, False]] * 4


def test_refusals():
    with pytest.raises(mps.TableError, match="fills no cache: Linear has neither attention of transformers"):
        KVCacheBytes()(nn.Linear(2, 2), [mps.Layer("fc")], mps.precisions("w4"), example=torch.ones(1, 2))
    with pytest.raises(mps.TableError, match="0 tokens x 1 sequences"):
        KVCacheBytes(context=0)
    with pytest.raises(mps.TableError, match=r"cache '0' is given \(2, 3\), expected \(batch, heads, tokens, size\)"):
        KVCacheBytes()(nn.Sequential(mps.KVCache()), [], mps.precisions("w4"), example=torch.ones(2, 3))


def test_other_resources_of_a_cache():
    """A cache is not stored with the model, has no kernel of its own, and moves its bytes twice."""
    model, options = Decoder(), mps.precisions("w4 w4a8 w16")
    assert not MemoryBytes()(model, CACHES, options).usage.any()
    timed = MeasuredLatency(cache=None, rounds=1)(model, CACHES, options, example=IDS).usage
    assert np.array_equal(timed, [[np.nan, np.nan, 0.0]] * 4, equal_nan=True)
    with pytest.raises(
        mps.TableError, match="latency_s of cache 'k_cache': nothing installed runs one in few bits; add w16"
    ):
        MeasuredLatency(cache=None, rounds=1)(model, CACHES, options[:2], example=IDS)
    counted = BitOps()(model, [mps.Layer("k_cache", "kv_cache", macs=10)], options).usage
    assert counted.tolist() == [[10 * 4 * 16, 10 * 4 * 16, 10 * 16 * 16]]
    seconds = Roofline("a100")(model, CACHES[:1], options, example=IDS).usage
    moved = [2 * filled(2, 8, 3, one) / 2039e9 + 5e-6 for one in options]
    np.testing.assert_allclose(seconds, [moved])


def test_weights_and_caches_in_one_memory():
    model, options = Decoder(), mps.precisions("w4 w16")
    layers = [mps.Layer("embed", "embedding", (5, 4)), *CACHES]
    parts = MemoryBytes(), KVCacheBytes(100)
    one, other = parts[0](model, layers, options), parts[1](model, layers, options, example=IDS)
    both = Total(parts)(model, layers, options, example=IDS)
    assert (both.usage == one.usage + other.usage).all()
    assert (both.fixed, both.reference) == (one.fixed + other.fixed, one.reference + other.reference)
    with pytest.raises(mps.TableError, match="is no sum over the layers"):
        Total((lambda model, layers, precisions: [[1.0, 2.0]] * 5,))(model, layers, options)
