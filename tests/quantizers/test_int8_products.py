"""int8 products that saturate: found by measuring, told, and avoided by 7 bits."""

import warnings

import numpy as np
import pytest

from mpsearch.quantizers import int8_products
from mpsearch.quantizers.int8_products import PRODUCTS, saturation, warn_of_saturation

NEEDS = {"torch": "torch", "onnxruntime": "onnxruntime", "onnxruntime MatMulNBits": "onnxruntime"}


def saturating(inputs, weights):
    """What `vpmaddubsw` and its sum compute: pairs of products in 16 bits that end at 32767 and -32768."""
    products = inputs.astype(np.int64)[:, :, None] * weights.astype(np.int64)[None]
    pairs = products.reshape(len(inputs), -1, 2, weights.shape[1]).sum(axis=2)
    return np.clip(pairs, -32768, 32767).sum(axis=1)


@pytest.fixture(autouse=True)
def forgotten():
    saturation.cache_clear()
    yield
    saturation.cache_clear()


@pytest.fixture
def engine(monkeypatch):
    """An engine on a CPU without VNNI."""
    inputs, weights = np.full((2, 64), 255, np.uint8), np.full((64, 2), 127, np.int8)
    share = saturating(inputs, weights)[0, 0] / (255 * 127 * 64)
    monkeypatch.setitem(PRODUCTS, "old", lambda: float(share))
    return "old"


def test_seven_bits_never_saturate_and_eight_do():
    g = np.random.default_rng(0)
    inputs = np.concatenate([np.full((1, 64), 255), g.integers(0, 256, (20, 64))]).astype(np.uint8)
    for most, exact in ((63, True), (64, True), (127, False)):
        for weights in (np.full((64, 1), most), np.full((64, 1), -most), g.integers(-most, most + 1, (64, 30))):
            equal = np.array_equal(saturating(inputs, weights), inputs.astype(np.int64) @ weights)
            assert equal or not exact
        assert (
            np.array_equal(
                saturating(inputs, np.full((64, 1), most)), inputs.astype(np.int64).sum(1, keepdims=True) * most
            )
            is exact
        )


def test_a_saturating_engine_is_found_and_told(engine):
    assert saturation(engine) == pytest.approx(1 - 32767 / (2 * 255 * 127))
    with pytest.warns(
        UserWarning, match=r"'fc' and 1 more\) give outputs here that are off by several percent; use w7"
    ):
        warn_of_saturation(engine, ["fc", "head"], "use w7")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_saturation(engine, [], "use w7")


@pytest.mark.parametrize("name", NEEDS)
def test_an_engine_here_is_exact_or_far_off(name):
    """The measure tells apart what exists; which of the two this machine is no test says."""
    pytest.importorskip(NEEDS[name])
    lost = saturation(name)
    assert lost == 0 or abs(lost) > 0.2


def test_each_engine_runs_once_a_process(monkeypatch):
    calls = []
    monkeypatch.setitem(int8_products.PRODUCTS, "counted", lambda: calls.append(1) or 1.0)
    assert [saturation("counted") for _ in range(3)] == [0, 0, 0]
    assert calls == [1]
