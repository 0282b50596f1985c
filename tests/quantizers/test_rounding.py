"""The reference quantizers against enumeration, loops and torch's own formats."""

import math

import numpy as np
import pytest
import torch

import mpsearch as mps
from mpsearch import Precision
from mpsearch.models.peak_memory import live_bytes
from mpsearch.quantizers.formats import grid_of
from mpsearch.quantizers.packing import packed_bytes
from mpsearch.quantizers.rounding import RoundToNearest


def weight(seed=0, shape=(6, 40), dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grid(bits, symmetric):
    """Integer codes, by the definition."""
    if not symmetric:
        return list(range(2**bits))
    return [-1, 1] if bits == 1 else list(range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1)))


def integer(bits):
    """`16` means left alone."""
    return Precision("int16" if bits == 16 else str(bits))


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("scale", ["max", "mse"])
def test_symmetric_integers_take_the_nearest_code(bits, scale):
    w = weight()
    codes = RoundToNearest(scale=scale).codes(w, integer(bits))
    values = codes.values()
    for row in range(len(w)):
        s = float(codes.scales[row])
        levels = np.array([c * s for c in grid(bits, True)])
        for x, q in zip(w[row].tolist(), values[row].tolist(), strict=True):
            assert abs(q - x) <= np.abs(levels - x).min() + 1e-5 * s + 1e-6 * abs(x)
        assert len(values[row].unique()) <= 2**bits


@pytest.mark.parametrize("bits", range(1, 17))
def test_asymmetric_integers_have_zero_on_the_grid(bits):
    w = weight() + 0.7
    w[0] = w[0].abs()  # a row without negative weights
    codes = RoundToNearest(symmetric=False, scale="max").codes(w, integer(bits))
    assert codes.zeros is not None
    stored = (codes.rounded / codes.scales + codes.zeros).round()
    assert stored.min() >= 0
    assert stored.max() <= 2**bits - 1
    assert torch.equal(codes.zeros, codes.zeros.round())
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    assert ((codes.values() - w).abs().amax(1) <= 1.001 * (high - low) / (2**bits - 1)).all()


@pytest.mark.parametrize("options", [{}, {"scale": "max"}, {"symmetric": False}, {"granularity": "tensor"}])
@pytest.mark.parametrize(
    "text", ["w1", "w2", "w3", "w4", "w8", "w4g16", "w3g7", "wfp4_e2m1", "wfp8_e4m3", "wnf4", "wmxfp4"]
)
def test_quantizing_twice_changes_nothing(options, text):
    quantizer, precision = RoundToNearest(**options), Precision.parse(text)
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
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("text", ["w1", "w2", "w3", "w4", "w5", "w6", "w8", "w4g16", "wfp4_e2m1", "wfp8_e4m3", "wnf4"])
def test_quantizing_twice_changes_no_bit(dtype, scale, symmetric, text):
    quantizer, precision = RoundToNearest(symmetric, scale), Precision.parse(text)
    for seed in range(4):
        once = quantizer(weight(seed, dtype=dtype) + (seed % 2) * 0.7, precision)
        assert torch.equal(quantizer(once, precision), once)


@pytest.mark.parametrize("bits", [8, 12, 15])
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_scales_below_the_normal_numbers_of_float16_do_not_vanish(bits, size):
    w = (weight() * size).half()
    assert float(w.float().abs().max()) / (2 ** (bits - 1) - 1) < torch.finfo(torch.float16).smallest_normal
    for quantizer in (RoundToNearest(), RoundToNearest(scale="max"), RoundToNearest(symmetric=False, scale="max")):
        codes = quantizer.codes(w, Precision(str(bits)))
        step = codes.scales.half().float()
        assert (step > 0).all()
        assert torch.equal(step, codes.scales)
        if quantizer.scale == "max":  # nothing is clipped: half a step at most, and the rounding of the result
            gap = (codes.values().float() - w.float()).abs()
            assert (gap <= 0.5001 * step + w.float().abs() * 2**-11 + 2**-25).all()
        error = (codes.values().float() - w.float()).square().sum()
        assert error < 0.1 * w.float().square().sum()


@pytest.mark.parametrize(
    ("w", "options", "text"),
    [
        (torch.tensor([[-3e38, 3e38]]), {"symmetric": False}, "w4"),
        (torch.tensor([[-6e4, 6e4]]).half(), {"symmetric": False}, "w1"),
    ],
)
@pytest.mark.parametrize("scale", ["mse", "max"])
def test_what_overflows_is_refused_with_the_numbers(w, options, text, scale):
    with pytest.raises(mps.EstimatorError, match=r"weights from -\S+ to \S+ overflow: .* greatest number of float"):
        RoundToNearest(scale=scale, **options)(w, Precision.parse(text))
    assert RoundToNearest(scale=scale)(w, Precision.parse(text)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("text", ["w1", "w2", "w4", "w8", "wfp4_e2m1", "wfp8_e4m3"])
def test_the_search_finds_the_best_of_all_80_factors(dtype, symmetric, text):
    """Every factor tried to the end, a row at a time: stopping early and looking at few elements first lose nothing."""
    name = text[1:]
    for seed, power in ((0, 1), (1, 3)):
        w = (weight(seed, (5, 70)) ** power + 0.2).to(dtype)
        found = RoundToNearest(symmetric)(w, Precision.parse(text))
        wide = w.float()
        for row, ours in zip(wide, found.float(), strict=True):
            errors = []
            for factor in (1 - 0.01 * step for step in range(80)):
                grid = grid_of(name, symmetric)
                scale, _ = grid.fit((row.min() * factor).reshape(1, 1), (row.max() * factor).reshape(1, 1))
                scale = scale.to(dtype).float()
                zero = grid.zero_point(row.min() * factor, scale) if grid.asymmetric else torch.zeros(1, 1)
                values = grid.round(row[None], scale, zero).to(dtype).float()
                errors.append(float((values - row).double().square().sum()))
            assert float((ours - row).double().square().sum()) == min(errors)


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


PACKED = [
    *(
        "w1",
        "w2",
        "w3",
        "w4",
        "w5",
        "w8",
        "w15",
        "wint16",
        "w4g16",
        "w3g7",
        "wfp3_e2m0",
        "wfp4_e2m1",
        "wfp5_e1m3",
        "wfp6_e3m2g8",
    ),
    *("wfp7_e4m2", "wfp8_e4m3", "wfp8_e5m2", "wnf4", "wnf4g16", "wmxfp4", "wmxfp6_e2m3", "wmxfp6_e3m2", "wmxfp8"),
    *("wmxfp8_e5m2", "wmxint8", "wnvfp4", "wnvfp4g16", "wbfp4", "wbfp9g5", "wbf16", "wfp16", "wfp32"),
]


@pytest.mark.parametrize("options", [{}, {"granularity": "tensor"}, {"symmetric": False}])
@pytest.mark.parametrize("text", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_packing_is_lossless_and_as_large_as_counted(options, text, dtype):
    quantizer, precision = RoundToNearest(scale="max", **options), Precision.parse(text)
    for shape in ((6, 41), (3, 2, 3, 3), (7,)):
        w = weight(shape=shape, dtype=dtype)
        w[0] = 0
        packed = quantizer.codes(w, precision).pack()
        outputs = shape[0] if len(shape) > 1 else 1
        assert packed.nbytes == packed_bytes(w.numel(), outputs, w.element_size(), precision, quantizer)
        assert len(packed.codes) == math.ceil(w.numel() * precision.weight_bits / 8)
        values = packed.unpack(shape)
        assert values.dtype == dtype
        assert torch.equal(values, quantizer(w, precision))


def test_nf4_takes_the_nearest_of_its_values_in_blocks_of_any_size():
    w = weight(shape=(3, 100))
    for size, text in ((64, "wnf4"), (10, "wnf4g10")):
        found = RoundToNearest()(w, Precision.parse(text))
        for row, ours in zip(w, found, strict=True):
            for block, mine in zip(row.split(size), ours.split(size), strict=True):
                top = block.abs().max()
                levels = grid_of("nf4", True).decode(torch.arange(16), torch.float32) * top
                assert torch.equal(mine, levels[(block[:, None] - levels).abs().argmin(1)])


def test_casts_saturate_and_else_equal_torch():
    w = torch.tensor([[1e30, -1e30, 1 / 3, 3e38, -3.4e38]])
    assert RoundToNearest()(w, Precision("fp16")).tolist() == [
        [65504.0, -65504.0, float(w[0, 2].half()), 65504.0, -65504.0]
    ]
    assert torch.equal(RoundToNearest()(w[:, :3], Precision("bf16")), w[:, :3].bfloat16().float())
    assert torch.equal(RoundToNearest()(w, Precision("fp32")), w)


def test_a_block_format_has_the_blocks_of_its_definition():
    with pytest.raises(mps.EstimatorError, match="mxfp4 has blocks of 32 by definition: write wmxfp4, without g64"):
        RoundToNearest()(weight(), Precision.parse("wmxfp4g64"))


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "bfp6", "nf4", "q8_0", "fp8_e4m3", "bf16"])
def test_inputs_in_any_format_are_as_near_as_weights(name):
    x = weight(shape=(4, 5, 64))
    low, high = float(x.min()), float(x.max())
    found = RoundToNearest().activation_values(x, name, low, high)
    assert found.shape == x.shape
    rows = x.reshape(-1, 64)
    if name == "fp8_e4m3":  # one scale from the calibrated range
        scale = max(-low, high) / 448
        truth = (rows / scale).to(torch.float8_e4m3fn).float() * scale
    else:
        truth = RoundToNearest()(rows, Precision(name))
    torch.testing.assert_close(found.reshape(-1, 64), truth, rtol=1e-6, atol=0)
    assert float((found - x).abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "text", ["w4", "w4g128", "wfp8_e4m3", "wnf4", "wmxfp4", "wnvfp4", "wbfp6", "wq4_0", "wq6_k", "wbf16"]
)
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"granularity": "tensor"}])
def test_memory_beside_the_weight(dtype, text, options):
    """The result and all that is held on the way: at most twice the layer."""
    w = weight(shape=(1024, 2048), dtype=dtype)
    with live_bytes() as peak:
        RoundToNearest(scale="max", **options)(w, Precision.parse(text))
    assert w.nbytes <= peak.bytes <= 2 * w.nbytes


@pytest.mark.parametrize("text", ["w3", "w4g16", "wmxfp6_e2m3", "wnvfp4", "wq4_0", "wfp16"])
def test_parts_of_a_large_weight_are_quantized_as_the_whole_is(text, monkeypatch):
    w, precision = weight(shape=(40, 64)), Precision.parse(text)
    whole = RoundToNearest().codes(w, precision)
    monkeypatch.setattr("mpsearch.quantizers.rounding._LEAST_CHUNK", 130)  # two rows at a time
    parts = RoundToNearest().codes(w, precision)
    assert torch.equal(parts.values(), whole.values())
    assert parts.pack().codes == whole.pack().codes
    assert torch.equal(RoundToNearest()(w, precision), whole.values())
