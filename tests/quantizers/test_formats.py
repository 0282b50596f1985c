"""Number formats against enumeration, loops over single numbers, and torch's own types."""

import itertools
import math

import numpy as np
import pytest
import torch

from mpsearch import PlanError, Precision
from mpsearch.core.formats import number_format
from mpsearch.quantizers.formats import FORMATS, grid_of
from mpsearch.quantizers.formats.minifloats import enumerate_minifloat, minifloat_max, round_minifloat
from mpsearch.quantizers.formats.shared_scales import SharedScaleFormat
from mpsearch.quantizers.packing import packed_bytes
from mpsearch.quantizers.rounding import RoundToNearest

MINIFLOATS = [f"fp{1 + e + m}_e{e}m{m}" for e, m in itertools.product(range(1, 8), range(7)) if 3 <= 1 + e + m <= 8]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantize_blocks(blocks, name):
    form = FORMATS[name]
    assert isinstance(form, SharedScaleFormat)
    return form.round_blocks(blocks)


def value_of(code, exponent, mantissa):
    """A minifloat from its bits, by the definition; infinities and nans are not told apart."""
    sign, e, m = code >> (exponent + mantissa), code >> mantissa & (2**exponent - 1), code & (2**mantissa - 1)
    bias = max(2 ** (exponent - 1) - 1, 1)
    size = (1 + m / 2**mantissa) * 2.0 ** (e - bias) if e else m / 2**mantissa * 2.0 ** (1 - bias)
    return -size if sign else size


def finite_codes(name):
    exponent, mantissa = int(name[5]), int(name[7])
    reserved = {"fp8_e4m3": 1, "fp8_e5m2": 4}.get(name, 0)  # at the upper end of either sign
    half = 1 << (exponent + mantissa)
    return [(sign | c, value_of(sign | c, exponent, mantissa)) for sign in (0, half) for c in range(half - reserved)]


def test_all_splits_are_here():
    assert len(MINIFLOATS) == 27
    assert {"fp3_e2m0", "fp4_e2m1", "fp6_e3m2", "fp8_e4m3", "fp8_e7m0", "fp8_e1m6"} <= set(MINIFLOATS)


@pytest.mark.parametrize("name", MINIFLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_minifloats_by_enumeration_of_their_bits(name, dtype):
    codes, values = zip(*finite_codes(name), strict=True)
    assert max(values) == minifloat_max(name)
    assert sorted({abs(v) for v in values}) == list(enumerate_minifloat(name))
    exact = torch.tensor(values, dtype=dtype)
    grid = grid_of(name, True)
    assert torch.equal(round_minifloat(exact, name), exact)
    assert torch.equal(grid.decode(torch.tensor(codes), dtype), exact)
    assert grid.encode(exact).tolist() == list(codes)
    levels = np.array(enumerate_minifloat(name))
    x = torch.cat([normal(300), normal(300) * minifloat_max(name) / 2, normal(300) * float(levels[1])]).to(dtype)
    found = round_minifloat(x, name).double().numpy()
    x = x.double().numpy()
    nearest = np.abs(np.abs(x)[:, None] - levels).min(1)
    np.testing.assert_array_equal(np.abs(np.abs(x) - np.abs(found)), nearest)
    assert np.isin(np.abs(found), levels).all()
    assert (np.sign(found) * np.sign(x) >= 0).all()


@pytest.mark.parametrize("name", [name for name in MINIFLOATS if not name.endswith("m0")])
def test_ties_go_to_the_even_mantissa(name):
    levels = enumerate_minifloat(name)
    middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(levels)], dtype=torch.float64)
    found = grid_of(name, True).encode(round_minifloat(middles, name))
    assert found.tolist() == [i + i % 2 for i in range(len(levels) - 1)]


@pytest.mark.parametrize(("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)])
def test_eight_bits_bit_for_bit_as_torch(name, dtype):
    x = torch.cat([normal(20000) * 10.0**k for k in range(-8, 4)])
    x = torch.cat([x, torch.tensor([0.0, -0.0]), torch.arange(1, 2000) * 2.0**-18])
    x = x.clamp(-minifloat_max(name), minifloat_max(name))
    theirs, grid = x.to(dtype), grid_of(name, True)
    ours = round_minifloat(x, name)
    assert torch.equal(ours.view(torch.int32), theirs.float().view(torch.int32))
    assert torch.equal(grid.encode(ours), theirs.view(torch.uint8).long())
    every = torch.arange(256, dtype=torch.uint8)
    finite = every.view(dtype).float().isfinite()
    assert torch.equal(grid.decode(every[finite].long(), torch.float32), every[finite].view(dtype).float())


def microscaled(block, name):
    """One block of OCP microscaling, section 6.3, in plain Python."""
    top = max(abs(x) for x in block)
    if name == "mxint8":
        emax, levels = 0, [k / 64 for k in range(128)]
    else:
        element = {"mxfp8": "fp8_e4m3"}.get(name, name.replace("mxfp8", "fp8").replace("mxfp6", "fp6"))
        levels = enumerate_minifloat("fp4_e2m1" if name == "mxfp4" else element)
        emax = math.floor(math.log2(levels[-1]))
    if top == 0:
        return None, [0.0] * len(block)
    scale = 2.0 ** (math.floor(math.log2(top)) - emax)
    return scale, [math.copysign(min(levels, key=lambda v: abs(v - abs(x) / scale)) * scale, x) for x in block]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2", "mxint8"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_microscaling_against_a_loop(name, size):
    blocks = torch.cat([normal(20, 32) * size, torch.zeros(1, 32)])
    values, stored, whole = quantize_blocks(blocks, name)
    assert whole is None
    scales = stored.view(torch.float8_e8m0fnu).float()
    for i, block in enumerate(blocks.tolist()):
        scale, expected = microscaled(block, name)
        assert scale is None or float(scales[i]) == scale
        np.testing.assert_array_equal(np.abs(values[i].numpy()), np.abs(expected))
        np.testing.assert_array_equal(values[i].sign() * blocks[i].sign() >= 0, True)


def test_block_floating_point_by_hand_and_as_microscaling():
    values, stored, _ = quantize_blocks(torch.tensor([[1.0, 0.3, -7.9, 0.0]]), "bfp4")
    assert values.tolist() == [[1.0, 0.0, -7.0, 0.0]]  # 4 <= 7.9 < 8: step 4 / 4
    assert stored.tolist() == [[127 + 2]]
    blocks = normal(10, 32)
    for ours, theirs in zip(quantize_blocks(blocks, "bfp8"), quantize_blocks(blocks, "mxint8"), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e3])
def test_nvfp4_against_a_loop(size):
    blocks = normal(30, 16) * size * torch.logspace(-6, 0, 30)[:, None]
    blocks[7] = 0
    values, stored, whole = quantize_blocks(blocks, "nvfp4")
    tensor_scale = (blocks.abs().max() / (6 * 448)).item()
    assert whole.tolist() == [tensor_scale]
    scales = stored.view(torch.float8_e4m3fn).float()
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for block, found, scale in zip(blocks.numpy(), values.numpy(), scales[:, 0].tolist(), strict=True):
        ideal = torch.tensor(np.abs(block).max() / np.float32(6) / np.float32(tensor_scale))
        assert scale == max(float(ideal.to(torch.float8_e4m3fn)), 2.0**-9 if ideal > 0 else 0)
        step = np.float32(scale) * np.float32(tensor_scale)
        grid = np.concatenate([-levels[::-1], levels]) * step
        assert np.isin(found, grid).all()
        gaps = np.abs(block[:, None] - grid).min(1)
        np.testing.assert_allclose(np.abs(block - found), gaps, rtol=1e-5, atol=1e-6 * step)


#: What torchao calls the elements.
THEIRS = {
    "mxfp4": "float4_e2m1fn_x2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp8": "float8_e4m3fn",
    "mxfp8_e5m2": "float8_e5m2",
}


@pytest.mark.parametrize("name", THEIRS)
def test_microscaling_bit_for_bit_as_torchao(name):
    torchao = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    x = torch.cat([normal(40, 64) * size for size in (1e-6, 1e-3, 1.0, 1e4)])
    x[3] = 0
    scales, data = torchao.to_mx(x.clone(), getattr(torch, THEIRS[name], THEIRS[name]), 32)
    data = (
        kernels.unpack_uint4(data.view(torch.uint8).reshape(len(x), -1)) if name == "mxfp4" else data.view(torch.uint8)
    )
    values, stored, _ = quantize_blocks(x.reshape(-1, 32), name)
    codes = grid_of(name, True).encode(values / FORMATS[name].steps(stored, None, torch.float32))
    assert torch.equal(stored.reshape(-1), scales.view(torch.uint8).reshape(-1))
    assert torch.equal(codes.reshape(-1), data.reshape(-1).long())


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e3])
def test_nvfp4_bit_for_bit_as_torchao(size):
    torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    x = normal(40, 64) * size
    scales, data = torchao.nvfp4_quantize(x, 16, x.abs().max() / (6 * 448))
    values, stored, whole = quantize_blocks(x.reshape(-1, 16), "nvfp4")
    codes = grid_of("fp4_e2m1", True).encode(values / FORMATS["nvfp4"].steps(stored, whole, torch.float32))
    assert torch.equal(stored.reshape(-1), scales.view(torch.uint8).reshape(-1))
    assert torch.equal(codes.reshape(-1), kernels.unpack_uint4(data.view(torch.uint8)).reshape(-1).long())


def test_stored_scales_are_all_that_is_needed():
    for name in ("mxfp4", "mxint8", "bfp5", "nvfp4"):
        blocks = normal(6, 16)
        values, stored, whole = quantize_blocks(blocks, name)
        element = grid_of({"mxfp4": "fp4_e2m1", "mxint8": "8", "bfp5": "5", "nvfp4": "fp4_e2m1"}[name], True)
        steps = FORMATS[name].steps(stored, whole, torch.float32)
        assert torch.equal(element.decode(element.encode(values / steps), torch.float32) * steps, values)


SYMMETRIC = [
    *(
        "w2",
        "w3",
        "w4",
        "w8",
        "w12",
        "wint16",
        "w4g16",
        "wfp3_e1m1",
        "wfp4_e2m1",
        "wfp5_e3m1",
        "wfp6_e2m3",
        "wfp8_e4m3",
    ),
    *("wmxfp4", "wmxfp6_e3m2", "wmxfp8_e5m2", "wmxint8", "wnvfp4", "wbfp3", "wbfp6g8", "wbf16", "wfp16"),
]
OTHERS = ["w1", "wnf4", "wnf4g16", "wq4_0", "wq4_1", "wq8_0", "wq2_k", "wq3_k", "wq4_k", "wq6_k", "wiq4_xs", "wtq1_0"]
#: Weights that share scale and offset in types of GGUF.
SHARED = {
    "q4_0": 32,
    "q4_1": 32,
    "q8_0": 32,
    "q2_k": 16,
    "q3_k": 16,
    "q4_k": 32,
    "q6_k": 16,
    "iq4_xs": 32,
    "tq1_0": 256,
}


@pytest.mark.parametrize("text", SYMMETRIC + OTHERS)
def test_what_any_format_does(text):
    quantizer, precision = RoundToNearest(), Precision.parse(text)
    w = normal(6, 512)
    found = quantizer(w, precision)
    assert torch.equal(quantizer(w * 8, precision), found * 8)  # a power of two goes through
    if text != "w1":
        assert torch.equal(quantizer(w * 0, precision), w * 0)
    if text in SYMMETRIC:
        assert torch.equal(quantizer(-w, precision), -found)
    size = precision.group_size or SHARED.get(precision.weight, number_format(precision.weight).block or 512)
    for x, y in zip(w.reshape(-1, size), found.reshape(-1, size), strict=True):
        assert (y[x.argsort()].diff() >= 0).all()  # the order of what shares a scale is kept
        assert len(y.unique()) <= 2**precision.weight_bits
    assert 0 < float((found - w).square().mean()) < float(w.square().mean())


def test_one_exponent_bit_is_an_integer_format():
    w = normal(5, 100)
    for bits in range(3, 9):
        integers = RoundToNearest()(w, Precision(str(bits)))
        torch.testing.assert_close(RoundToNearest()(w, Precision(f"fp{bits}_e1m{bits - 2}")), integers)


@pytest.mark.parametrize(
    ("text", "symmetric", "bits"),
    [
        ("w4g128", False, 4.15625),
        ("w4g128", True, 4.125),
        ("wnf4", True, 4.25),
        ("wmxfp4", True, 4.25),
        ("wmxfp6_e2m3", True, 6.25),
        ("wmxfp8", True, 8.25),
        ("wmxint8", True, 8.25),
        ("wnvfp4", True, 4.5 + 32 / 2**18),
        ("wbfp4", True, 4.5),
    ],
)
def test_published_effective_bits_of_half_precision_weights(text, symmetric, bits):
    found = packed_bytes(2**18, 2**6, 2, Precision.parse(text), RoundToNearest(symmetric))
    assert found * 8 / 2**18 == bits


@pytest.mark.parametrize(
    ("text", "weight", "activation", "group"),
    [
        ("wq4_k", "q4_k", "16", None),
        ("wiq4_xsa8", "iq4_xs", "8", None),
        ("wq8_0aq8_0", "q8_0", "q8_0", None),
        ("wbfp4abfp8g32", "bfp4", "bfp8", 32),
        ("wmxfp8_e5m2amxfp8", "mxfp8_e5m2", "mxfp8", None),
        ("wfp8_e5m2abf16", "fp8_e5m2", "bf16", None),
    ],
)
def test_names_in_the_grammar(text, weight, activation, group):
    found = Precision.parse(text)
    assert (found.weight, found.activation, found.group_size) == (weight, activation, group)
    assert str(found) == text


@pytest.mark.parametrize("text", ["wbfp1", "wbfp17", "wq4_2", "wq4", "wQ4_K", "wfp9_e4m4", "wfp4_e0m3", "wmxfp3"])
def test_names_that_are_none_are_refused(text):
    with pytest.raises(PlanError):
        Precision.parse(text)
