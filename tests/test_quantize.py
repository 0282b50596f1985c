"""The reference quantizers against enumeration, loops and torch's own formats."""

import math

import numpy as np
import pytest
import torch

import mpsearch as mps
from mpsearch import Precision
from mpsearch.formats import enumerate_minifloat, minifloat_max, round_minifloat
from mpsearch.quantize import RoundToNearest, packed_bytes


def weight(seed=0, shape=(6, 40), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grid(bits, symmetric):
    """Integer codes, by the definition."""
    if not symmetric:
        return list(range(2**bits))
    return [-1, 1] if bits == 1 else list(range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12, 15])
@pytest.mark.parametrize("scale", ["max", "mse"])
def test_symmetric_integers_take_the_nearest_code(bits, scale):
    w = weight()
    codes = RoundToNearest(scale=scale).codes(w, Precision(str(bits)))
    values = codes.values()
    for row in range(len(w)):
        s = float(codes.scales[row])
        levels = np.array([c * s for c in grid(bits, True)])
        for x, q in zip(w[row].tolist(), values[row].tolist(), strict=True):
            assert abs(q - x) <= np.abs(levels - x).min() + 1e-5 * s + 1e-6 * abs(x)
        assert len(values[row].unique()) <= 2**bits


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_asymmetric_integers_have_zero_on_the_grid(bits):
    w = weight() + 0.7
    w[0] = w[0].abs()  # a row without negative weights
    codes = RoundToNearest(symmetric=False, scale="max").codes(w, Precision(str(bits)))
    assert codes.zeros is not None
    stored = (codes.rounded / codes.scales + codes.zeros).round()
    assert stored.min() >= 0
    assert stored.max() <= 2**bits - 1
    assert torch.equal(codes.zeros, codes.zeros.round())
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    assert ((codes.values() - w).abs().amax(1) <= 1.001 * (high - low) / (2**bits - 1)).all()


@pytest.mark.parametrize("options", [{}, {"scale": "max"}, {"symmetric": False}, {"granularity": "tensor"}])
@pytest.mark.parametrize(
    "text", ["w1", "w2", "w3", "w4", "w8", "w4g16", "w3g7", "wfp4_e2m1", "wfp8_e4m3", "wnf4", "wmxfp4", "wnvfp4"]
)
def test_quantizing_twice_changes_nothing(options, text):
    quantizer, precision = RoundToNearest(**options), Precision.parse(text)
    if text == "wnvfp4":
        pytest.skip("the scale of NVFP4 depends on the largest value, which its own rounding may move")
    once = quantizer(weight(), precision)
    again = quantizer(once, precision)
    assert torch.allclose(once, again, rtol=1e-5, atol=0 if options.get("symmetric", True) else 1e-5)


def test_weights_on_the_grid_come_back_bit_for_bit():
    for bits in (2, 3, 4, 8):
        top = 2 ** (bits - 1) - 1
        for scale in (0.1, 1 / 3, 0.0123):
            w = torch.randint(-top, top + 1, (5, 30), generator=torch.Generator().manual_seed(bits)) * torch.tensor(
                scale
            )
            w[:, 0] = top * torch.tensor(scale)
            assert torch.equal(RoundToNearest()(w, Precision(str(bits))), w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["mse", "max"])
@pytest.mark.parametrize("text", ["w1", "w2", "w3", "w4", "w5", "w6", "w8", "w4g16", "wfp4_e2m1", "wfp8_e4m3"])
def test_quantizing_twice_changes_no_bit(dtype, scale, text):
    quantizer, precision = RoundToNearest(scale=scale), Precision.parse(text)
    for seed in range(5):
        once = quantizer(weight(seed, dtype=dtype), precision)
        assert torch.equal(quantizer(once, precision), once)


@pytest.mark.parametrize("bits", range(1, 9))
def test_searching_the_scale_never_hurts_and_helps_at_few_bits(bits):
    w = weight(shape=(16, 200))
    errors = {
        scale: float((RoundToNearest(scale=scale)(w, Precision(str(bits))) - w).square().sum())
        for scale in ("max", "mse")
    }
    assert errors["mse"] <= errors["max"]
    if bits in (2, 3):
        assert errors["mse"] < 0.8 * errors["max"]


def test_the_error_of_gaussian_weights_is_the_published_one():
    """Least squared error of a symmetric uniform quantizer near the optimum for a normal (QuEST, 2502.05003)."""
    w = weight(shape=(4, 50000))
    for bits, optimum in ((4, 0.0115429), (5, 3.49521e-3), (8, 8.76862e-5)):
        found = float((RoundToNearest()(w, Precision(str(bits))) - w).square().mean())
        assert optimum * 0.98 < found < optimum * 1.25  # 2^b - 1 levels instead of 2^b


def test_groups_have_scales_of_their_own():
    w = weight(shape=(3, 10))
    found = RoundToNearest(scale="max")(w, Precision.parse("w4g4"))
    for row in range(3):
        for start in (0, 4, 8):
            part = w[row, start : start + 4]
            s = float(part.abs().max()) / 7
            torch.testing.assert_close(found[row, start : start + 4], (part / s).round() * s)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shape_dtype_and_device_survive(dtype):
    for shape in ((6,), (4, 3), (4, 3, 3), (4, 2, 3, 3)):
        w = weight(shape=shape, dtype=dtype)
        found = RoundToNearest()(w, Precision("4"))
        assert (found.shape, found.dtype) == (w.shape, w.dtype)


def test_rows_of_zeros_stay_zero():
    w = torch.zeros(2, 5)
    for text in ("w2", "w4g2", "wfp4_e2m1", "wnf4", "wmxfp8", "wnvfp4"):
        assert torch.equal(RoundToNearest()(w, Precision.parse(text)), w)
    assert torch.equal(RoundToNearest(symmetric=False)(w, Precision("4")), w)


def test_what_is_not_finite_is_refused():
    w = weight()
    w[1, 1] = math.nan
    with pytest.raises(mps.EstimatorError, match="1 of 240 weights are not finite"):
        RoundToNearest()(w, Precision("4"))


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_minifloats_bit_for_bit_as_torch(name, dtype):
    x = torch.cat([weight(shape=(20000,)) * 10.0**k for k in range(-6, 4)])
    x = x.clamp(-minifloat_max(name), minifloat_max(name))
    assert torch.equal(round_minifloat(x, name), x.to(dtype).float())


@pytest.mark.parametrize(
    "name", ["fp3_e2m0", "fp4_e2m1", "fp4_e3m0", "fp5_e2m2", "fp6_e2m3", "fp6_e3m2", "fp8_e3m4", "fp8_e4m3", "fp8_e5m2"]
)
def test_minifloats_take_the_nearest_of_all_values(name):
    values = np.array(enumerate_minifloat(name))
    assert values[-1] == minifloat_max(name)
    x = weight(shape=(500,)) * minifloat_max(name) / 2
    found = round_minifloat(x, name)
    for a, b in zip(x.tolist(), found.tolist(), strict=True):
        assert abs(b) in values
        assert abs(abs(a) - abs(b)) == pytest.approx(np.abs(values - abs(a)).min(), abs=1e-12)
    exact = torch.tensor(values, dtype=torch.float32)
    assert torch.equal(round_minifloat(exact, name), exact)
    assert torch.equal(round_minifloat(-exact, name), -exact)


def test_microscaling_blocks_by_hand():
    w = torch.zeros(1, 64)
    w[0, 0], w[0, 1] = 5.0, 0.3  # scale 2^(2 - 2) = 1
    w[0, 32], w[0, 33] = 48.0, 5.0  # scale 2^(5 - 2) = 8
    found = RoundToNearest()(w, Precision("mxfp4"))
    assert found[0, [0, 1, 32, 33]].tolist() == [4.0, 0.5, 48.0, 4.0]


def test_nvfp4_by_hand():
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1], w[0, 16] = 6.0 * 448, 100.0, 6.0
    found = RoundToNearest()(w, Precision("nvfp4"))
    assert found[0, [0, 1, 16]].tolist() == [2688.0, 0.0, 6.0]  # scales 448 and 1


def test_activations_per_tensor_and_per_token():
    x = torch.tensor([[0.0, 1.0, 2.0, 9.0], [0.0, 0.1, 0.2, 0.3]])
    tensor = RoundToNearest().activation_values(x, "2", 0.0, 3.0)
    assert tensor.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    token = RoundToNearest(activation="token").activation_values(x, "2", 0.0, 3.0)
    torch.testing.assert_close(token, torch.tensor([[0.0, 0.0, 3.0, 9.0], [0.0, 0.1, 0.2, 0.3]]))
    assert RoundToNearest().activation_values(x.half(), "8", 0.0, 9.0).dtype == torch.float16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("text", ["w1", "w2", "w3", "w4", "w5", "w8", "w15", "w4g16", "w3g7"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_is_lossless_and_as_large_as_counted(symmetric, granularity, text, dtype):
    quantizer, precision = RoundToNearest(symmetric, "max", granularity), Precision.parse(text)
    for shape in ((6, 41), (3, 2, 3, 3), (7,)):
        w = weight(shape=shape, dtype=dtype)
        packed = quantizer.codes(w, precision).pack()
        outputs = shape[0] if len(shape) > 1 else 1
        assert packed.nbytes == packed_bytes(w.numel(), outputs, w.element_size(), precision, quantizer)
        values = packed.unpack(precision.weight_bits, shape, precision.group_size)
        assert torch.equal(values, quantizer(w, precision))
