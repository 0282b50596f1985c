"""GGUF block types against the `gguf` package, and against ggml's C code written out in plain Python."""

import itertools
import math

import numpy as np
import pytest
import torch

import mpsearch as mps
from mpsearch import Precision
from mpsearch.quantizers import ggml
from mpsearch.quantizers.packing import packed_bytes
from mpsearch.quantizers.rounding import RoundToNearest

#: Bits a weight, from llama.cpp's table of types.
BITS = {
    "q4_0": 4.5, "q4_1": 5.0, "q5_0": 5.5, "q5_1": 6.0, "q8_0": 8.5, "q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5,
    "q5_k": 5.5, "q6_k": 6.5625, "iq4_nl": 4.5, "iq4_xs": 4.25, "tq1_0": 1.6875, "tq2_0": 2.0625,
}  # fmt: skip
#: Squared error of standard normal weights, measured with llama.cpp.
NOISE = {"q2_k": 0.088, "q3_k": 0.023, "q4_0": 0.0074, "iq4_xs": 0.0059, "q4_k": 0.0051, "q5_k": 0.0013, "q6_k": 0.0003}
LEGACY = ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0"]


def weights(kind="normal", shape=(12, 512)):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {
        "normal": w,
        "small": w * 1e-3,
        "heavy": w**3,
        "constant": torch.full(shape, -0.7),
        "zero": torch.zeros(shape),
    }[kind]


def plain(scale, codes, offset=0.0):
    return [np.float32(np.float32(scale) * np.float32(q)) - np.float32(offset) for q in codes]


def half(data):
    return float(np.frombuffer(bytes(data), np.float16)[0])


def decode_plainly(block, name):
    """dequantize_row_* of ggml-quants.c, one number at a time."""
    y = [0.0] * ggml.TYPES[name].size
    if name == "q4_0":
        for j in range(16):
            y[j], y[j + 16] = plain(half(block[:2]), [(block[2 + j] & 15) - 8, (block[2 + j] >> 4) - 8])
    elif name == "q5_1":
        d, m, high = half(block[:2]), half(block[2:4]), int.from_bytes(bytes(block[4:8]), "little")
        for j in range(16):
            low, up = block[8 + j] & 15 | (high >> j & 1) << 4, block[8 + j] >> 4 | (high >> (j + 16) & 1) << 4
            y[j], y[j + 16] = plain(d, [low, up], -m)
    elif name == "q8_0":
        y = plain(half(block[:2]), np.array(block[2:], np.uint8).view(np.int8))
    elif name == "q2_k":
        d, dmin, place, s = half(block[80:82]), half(block[82:84]), 0, 0
        for n in (0, 128):
            for shift in (0, 2, 4, 6):
                for start in (0, 16):
                    scale = block[s]
                    s += 1
                    offset = np.float32(dmin) * np.float32(scale >> 4)
                    q = [block[16 + n // 4 + start + j] >> shift & 3 for j in range(16)]
                    y[place : place + 16] = plain(np.float32(d) * np.float32(scale & 15), q, offset)
                    place += 16
    elif name == "q3_k":
        raw = block[96:108]
        scales = [
            (raw[j] & 15 if j < 8 else raw[j - 8] >> 4) | (raw[8 + j % 4] >> (2 * (j // 4)) & 3) << 4 for j in range(16)
        ]
        for i in range(256):
            q = (block[32 + i // 128 * 32 + i % 32] >> (i % 128 // 32 * 2) & 3) - (
                0 if block[i % 32] >> (i // 32) & 1 else 4
            )
            y[i] = plain(np.float32(half(block[108:110])) * np.float32(scales[i // 16] - 32), [q])[0]
    elif name in ("q4_k", "q5_k"):
        d, dmin, raw = half(block[:2]), half(block[2:4]), block[4:16]
        for i in range(256):
            j = i // 32
            if j < 4:
                sc, mn = raw[j] & 63, raw[j + 4] & 63
            else:
                sc, mn = raw[j + 4] & 15 | raw[j - 4] >> 6 << 4, raw[j + 4] >> 4 | raw[j] >> 6 << 4
            start = 16 if name == "q4_k" else 48
            q = block[start + i // 64 * 32 + i % 32] >> (4 * (j % 2)) & 15
            if name == "q5_k":
                q |= (block[16 + i % 32] >> j & 1) << 4
            y[i] = plain(np.float32(d) * np.float32(sc), [q], np.float32(dmin) * np.float32(mn))[0]
    elif name == "q6_k":
        for i in range(256):
            n, part, j = i // 128, i % 128 // 32, i % 32
            low = block[64 * n + 32 * (part % 2) + j] >> (4 * (part // 2)) & 15
            q = (low | (block[128 + 32 * n + j] >> (2 * part) & 3) << 4) - 32
            scale = np.array([block[192 + i // 16]], np.uint8).view(np.int8)[0]
            y[i] = plain(np.float32(half(block[208:210])) * np.float32(scale), [q])[0]
    return y


@pytest.mark.parametrize("name", ["q4_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_any_bytes_decode_as_the_c_code_says(name):
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (5, ggml.TYPES[name].nbytes), dtype=np.uint8)
    for place in {"q2_k": (81, 83), "q3_k": (109,), "q6_k": (209,), "q8_0": (1,), "q4_0": (1,)}.get(name, (1, 3)):
        data[:, place] &= 0b10111011  # a finite float16
    expected = np.array([decode_plainly(block.tolist(), name) for block in data], np.float32)
    np.testing.assert_array_equal(ggml.dequantize(torch.from_numpy(data), name).numpy(), expected)


def test_bit_for_bit_with_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    for name, kind in itertools.product(ggml.TYPES, ["normal", "small", "heavy", "constant", "zero"]):
        w, theirs = weights(kind), gguf.GGMLQuantizationType[name.upper()]
        data = ggml.quantize(w, name)
        assert gguf.GGML_QUANT_SIZES[theirs] == (ggml.TYPES[name].size, ggml.TYPES[name].nbytes)
        values = gguf.dequantize(data.numpy(), theirs)
        np.testing.assert_array_equal(ggml.dequantize(data, name).numpy(), values, err_msg=f"{name} {kind}")
        if name in LEGACY:
            with np.errstate(divide="ignore"):
                found = gguf.quantize(w.numpy(), theirs)
            np.testing.assert_array_equal(found, data.numpy(), err_msg=f"{name} {kind}")


@pytest.mark.parametrize("name", ggml.TYPES)
def test_any_bytes_mean_what_they_mean_to_the_gguf_package(name):
    gguf = pytest.importorskip("gguf")
    data = np.random.default_rng(1).integers(0, 256, (500, ggml.TYPES[name].nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(data, gguf.GGMLQuantizationType[name.upper()])
    ours = ggml.dequantize(torch.from_numpy(data), name).numpy()
    assert np.isnan(theirs).any() or name.startswith("tq1")  # scales of all kinds, nan and infinite ones too
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", LEGACY)
def test_the_bytes_of_weights_of_any_size_are_those_of_the_gguf_package(name):
    gguf = pytest.importorskip("gguf")
    w = torch.cat([weights(shape=(8, 256)) * 10.0**power for power in range(-10, 5)])
    w[3], w[5, :32], w[6] = 0.0, 0.0, -0.0
    with np.errstate(all="ignore"):
        theirs = gguf.quantize(w.numpy(), gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(ggml.quantize(w, name).numpy(), theirs)


@pytest.mark.parametrize("name", ggml.TYPES)
def test_bytes_and_noise_are_the_published_ones(name):
    w = weights(shape=(40, 1024))
    codes = RoundToNearest().codes(w, Precision(name))
    packed = codes.pack()
    assert (
        packed.nbytes == packed_bytes(w.numel(), 40, 4, Precision(name), RoundToNearest()) == w.numel() * BITS[name] / 8
    )
    assert torch.equal(packed.unpack((40, 1024)), codes.values())
    error = float((codes.values() - w).square().mean())
    assert error == pytest.approx(NOISE.get(name, error), rel=0.06)
    assert torch.equal(RoundToNearest()(w * 0, Precision(name)), w * 0)
    assert torch.equal(RoundToNearest()(w.bfloat16(), Precision(name)).float(), codes_of_bf16(w, name))


def codes_of_bf16(w, name):
    return ggml.dequantize(ggml.quantize(w.bfloat16().float(), name), name).bfloat16().float()


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q5_k"])
def test_the_search_for_scale_and_offset_against_the_c_code(name):
    """make_qkx2_quants of ggml-quants.c, one number at a time."""
    size, top, start, steps = {"q2_k": (16, 3, -0.5, 15), "q4_k": (32, 15, -1.0, 20), "q5_k": (32, 31, -0.5, 15)}[name]
    x = weights("heavy", (30, size)).double()
    weight = x.abs() if name == "q2_k" else x.square().mean(1, keepdim=True).sqrt() + x.abs()
    scale, offset = ggml._fit_affine(x, weight, top, start, steps, name == "q2_k")
    for row in range(len(x)):
        expected = affine_plainly(x[row].tolist(), weight[row].tolist(), top, start, steps, name == "q2_k")
        assert (float(scale[row]), float(offset[row])) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def affine_plainly(x, w, top, start, steps, absolute):
    low, high = min(0.0, *x), max(x)
    if high == low:
        return 0.0, -low
    sum_w, sum_x = sum(w), sum(a * b for a, b in zip(w, x, strict=True))

    def code(inverse, v):
        return max(0, min(top, round(inverse * (v - low))))

    def cost(s, m, q):
        gaps = [s * c + m - v for c, v in zip(q, x, strict=True)]
        return sum(a * (abs(g) if absolute else g * g) for a, g in zip(w, gaps, strict=True))

    scale = (high - low) / top
    best = cost(scale, low, [code(top / (high - low), v) for v in x])
    for step in range(steps + 1):
        q = [code((start + 0.1 * step + top) / (high - low), v) for v in x]
        sum_l = sum(a * c for a, c in zip(w, q, strict=True))
        sum_l2 = sum(a * c * c for a, c in zip(w, q, strict=True))
        sum_xl = sum(a * c * v for a, c, v in zip(w, q, x, strict=True))
        determinant = sum_w * sum_l2 - sum_l * sum_l
        if determinant > 0:
            s, m = (sum_w * sum_xl - sum_x * sum_l) / determinant, (sum_l2 * sum_x - sum_l * sum_xl) / determinant
            if m > 0:
                s, m = sum_xl / sum_l2, 0.0
            error = cost(s, m, q)
            if error < best:
                best, scale, low = error, s, m
    return scale, -low


def test_the_search_of_q3_k_against_the_c_code():
    """make_q3_quants of ggml-quants.c, one number at a time."""
    x = torch.cat([weights(kind, (150, 16)) for kind in ("normal", "heavy")]).double()
    found = ggml._fit_coordinates(x, 4)
    for row, scale in zip(x.tolist(), found[:, 0].tolist(), strict=True):
        peak = max(row, key=abs)
        q = [max(-4, min(3, round(-4 / peak * v))) for v in row]
        sum_xq, sum_qq = (
            sum(v**3 * c for v, c in zip(row, q, strict=True)),
            sum((v * c) ** 2 for v, c in zip(row, q, strict=True)),
        )
        for _ in range(5):
            for i, v in enumerate(row):
                rest_xq, rest_qq = sum_xq - v**3 * q[i], sum_qq - (v * q[i]) ** 2
                if rest_xq > 0:
                    new = max(-4, min(3, round(v * rest_qq / rest_xq)))
                    new_xq, new_qq = rest_xq + v**3 * new, rest_qq + (v * new) ** 2
                    if new != q[i] and new_qq > 0 and new_xq**2 * sum_qq > sum_xq**2 * new_qq:
                        q[i], sum_xq, sum_qq = new, new_xq, new_qq
        assert scale == pytest.approx(sum_xq / sum_qq, rel=1e-9)


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(mps.EstimatorError, match=r"q4_k packs rows of a multiple of 256 weights, got 40"):
        RoundToNearest()(torch.ones(3, 40), Precision("q4_k"))
    with pytest.raises(mps.EstimatorError, match=r"q4_0 packs rows of a multiple of 32 weights, got 40"):
        packed_bytes(120, 3, 4, Precision("q4_0"), RoundToNearest())
    with pytest.raises(mps.EstimatorError, match=r"q4_k has blocks of 256 by definition: write wq4_k, without g128"):
        RoundToNearest()(torch.ones(3, 256), Precision.parse("wq4_kg128"))


def test_the_bits_of_llama_3_1_8b_at_q4_k_m():
    """4.8944 bits a weight: the types of the tensors of the published file, norms and rope factors in float32."""
    hidden, ffn, kv, vocabulary, count = 4096, 14336, 1024, 128256, 32
    more = [
        i for i in range(count) if i < count // 8 or i >= 7 * count // 8 or (i - count // 8) % 3 == 2
    ]  # use_more_bits
    layers = [(vocabulary, hidden, "q4_k"), (vocabulary, hidden, "q6_k")]
    for i in range(count):
        better = "q6_k" if i in more else "q4_k"
        layers += [(hidden, hidden, "q4_k"), (kv, hidden, "q4_k"), (kv, hidden, better), (hidden, hidden, "q4_k")]
        layers += [(ffn, hidden, "q4_k"), (ffn, hidden, "q4_k"), (hidden, ffn, better)]
    total = sum(packed_bytes(n * k, n, 4, Precision(name), RoundToNearest()) for n, k, name in layers)
    numel = sum(n * k for n, k, _ in layers)
    floats = hidden * (2 * count + 1) + 64
    assert round(8 * (total + 4 * floats) / (numel + floats), 4) == 4.8944
    assert math.isclose(numel + floats, 8.03e9, rel_tol=1e-3)
