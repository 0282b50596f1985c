"""The block types of GGUF files, byte for byte as ggml lays them out.

`gguf.quants` decodes all of these types and encodes the legacy and the ternary ones, and its bytes and values are the same to the bit:
tests hold every type against it. It computes with numpy, though: each weight, and each input in `aq8_0`, of a model on a graphics card
would go to the host and back, where this is about as fast on a processor and stays on the card. It has no encoder of K and IQ4 types, whose
scales are searched for; and it would bring `requests` and four further packages to every installation. So it is an extra, for the files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.core.formats import NUMBER_FORMATS
from mpsearch.errors import EstimatorError

#: Weights worked on at once.
_CHUNK = 1 << 18
#: Below this a block counts as zeros (ggml: GROUP_MAX_EPS).
_EPS = 1e-15
#: The 16 values of IQ4_NL and IQ4_XS.
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_POWERS_OF_3 = (81, 27, 9, 3, 1)


@dataclass(frozen=True)
class BlockType:
    """A block type.

    Attributes:
        size: weights of a block.
        nbytes: bytes of a block, scales included.
        encode: (S, size) float32 -> (S, nbytes) uint8.
        decode: back.
    """

    size: int
    nbytes: int
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def quantize(rows: Tensor, name: str) -> Tensor:
    """The bytes of a matrix in a block type.

    Legacy and ternary types equal the reference quantizer of ggml byte for byte; K and IQ4 types search scales as it does (ggml-quants.c
    without importance weights), up to the order of sums.

    Args:
        rows: (N, K); K is a multiple of the block size.
        name: `q4_0`, `q4_k`, ...: a key of `TYPES`.

    Returns:
        (N, K / size * nbytes) uint8.

    Raises:
        EstimatorError: where K is no multiple of the block size.

    >>> quantize(torch.ones(2, 64), "q8_0").shape
    torch.Size([2, 68])
    """
    kind = TYPES[name]
    check_width(rows.shape[1], name)
    blocks = rows.float().reshape(-1, kind.size)
    parts = [kind.encode(part) for part in blocks.split(max(1, _CHUNK // kind.size))]
    return torch.cat(parts).reshape(len(rows), -1)


def dequantize(data: Tensor, name: str) -> Tensor:
    """The float32 weights of bytes that `quantize` or llama.cpp wrote.

    Args:
        data: (N, bytes of a row) uint8.
        name: the type.

    Returns:
        (N, K).

    >>> dequantize(quantize(torch.ones(1, 32), "q8_0"), "q8_0")[0, :3]
    tensor([0.9999, 0.9999, 0.9999])
    """
    kind = TYPES[name]
    blocks = data.reshape(-1, kind.nbytes)
    parts = [kind.decode(part) for part in blocks.split(max(1, _CHUNK // kind.size))]
    return torch.cat(parts).reshape(len(data), -1)


def check_width(width: int, name: str) -> None:
    """Refuse rows that a block type cannot hold.

    Raises:
        EstimatorError: where the width is no multiple of the block size.
    """
    if width % TYPES[name].size:
        raise EstimatorError(
            f"{name} packs rows of a multiple of {TYPES[name].size} weights, got {width}; give this layer another format"
        )


def _fold(codes: Tensor, bits: int, width: int) -> Tensor:
    """Codes of fewer than 8 bits in bytes: byte j of a run of `width` holds the codes j, j + width, j + 2 width, ..., lowest bits first."""
    shifts = torch.arange(0, 8, bits, device=codes.device, dtype=torch.int32)[:, None]
    planes = codes.int().reshape(len(codes), -1, 8 // bits, width) << shifts
    return planes.sum(2).to(torch.uint8).reshape(len(codes), -1)


def _unfold(data: Tensor, bits: int, width: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, device=data.device, dtype=torch.int32)[:, None]
    planes = (data.int().reshape(len(data), -1, 1, width) >> shifts) & ((1 << bits) - 1)
    return planes.reshape(len(data), -1)


def _half(values: Tensor) -> Tensor:
    """(S, 1) float32 -> (S, 2) bytes of a float16."""
    return values.half().contiguous().view(torch.uint8)


def _float(data: Tensor) -> Tensor:
    """(S, 2) bytes of a float16 -> (S, 1) float32."""
    return data.contiguous().view(torch.float16).float()


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.zeros_like(x), 1 / x)


def _over(number: float, x: Tensor) -> Tensor:
    """A quotient rounded once; `number / x` is the product with a rounded inverse."""
    return torch.full_like(x, number) / x


def _away(x: Tensor) -> Tensor:
    """Round half away from zero, as C does."""
    a = x.abs()
    floor = a.floor()
    return x.sign() * (floor + (2 * (a - floor)).floor())


def _signed_peak(blocks: Tensor) -> Tensor:
    """The element of greatest size, with its sign, along the last axis, (..., 1)."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


# Legacy types: one or two float16 a block of 32.


def _encode_symmetric(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    half = 1 << (bits - 1)
    d = _signed_peak(blocks) / -half
    return d, (blocks * _inverse(d) + (half + 0.5)).trunc().clamp(0, 2 * half - 1).int()


def _encode_affine(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    top = (1 << bits) - 1
    low, high = blocks.aminmax(dim=1, keepdim=True)
    d = (high - low) / top
    return d, low, ((blocks - low) * _inverse(d) + 0.5).trunc().clamp(0, top).int()


def _encode_q4_0(blocks: Tensor) -> Tensor:
    d, q = _encode_symmetric(blocks, 4)
    return torch.cat([_half(d), _fold(q, 4, 16)], 1)


def _decode_q4_0(data: Tensor) -> Tensor:
    return _float(data[:, :2]) * (_unfold(data[:, 2:], 4, 16) - 8).float()


def _encode_q4_1(blocks: Tensor) -> Tensor:
    d, low, q = _encode_affine(blocks, 4)
    return torch.cat([_half(d), _half(low), _fold(q, 4, 16)], 1)


def _decode_q4_1(data: Tensor) -> Tensor:
    return _float(data[:, :2]) * _unfold(data[:, 4:], 4, 16).float() + _float(data[:, 2:4])


def _encode_q5_0(blocks: Tensor) -> Tensor:
    d, q = _encode_symmetric(blocks, 5)
    return torch.cat([_half(d), _fold(q >> 4, 1, 1), _fold(q & 15, 4, 16)], 1)


def _decode_q5_0(data: Tensor) -> Tensor:
    q = _unfold(data[:, 6:], 4, 16) | _unfold(data[:, 2:6], 1, 1) << 4
    return _float(data[:, :2]) * (q - 16).float()


def _encode_q5_1(blocks: Tensor) -> Tensor:
    d, low, q = _encode_affine(blocks, 5)
    return torch.cat([_half(d), _half(low), _fold(q >> 4, 1, 1), _fold(q & 15, 4, 16)], 1)


def _decode_q5_1(data: Tensor) -> Tensor:
    q = _unfold(data[:, 8:], 4, 16) | _unfold(data[:, 4:8], 1, 1) << 4
    return _float(data[:, :2]) * q.float() + _float(data[:, 2:4])


def _encode_q8_0(blocks: Tensor) -> Tensor:
    d = blocks.abs().amax(1, keepdim=True) / 127
    return torch.cat([_half(d), _away(blocks * _inverse(d)).to(torch.int8).view(torch.uint8)], 1)


def _decode_q8_0(data: Tensor) -> Tensor:
    return data[:, 2:].contiguous().view(torch.int8).float() * _float(data[:, :2])


# K types: blocks of 256 with quantized scales of 16 or 32 weights each.


def _fit_affine(x: Tensor, weight: Tensor, top: int, start: float, steps: int, absolute: bool) -> tuple[Tensor, Tensor]:
    """Scale s and offset m >= 0 of least weighted error of x ~ s q - m, q in 0..top (ggml: make_qkx2_quants).

    Candidates are `steps` + 1 stretches of the range, each followed by weighted least squares for its codes; the range starts
    from the best offset so far.
    """
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True)
    constant = high <= low
    high = torch.where(constant, low + 1, high)
    sum_w, sum_x = weight.sum(1, keepdim=True), (weight * x).sum(1, keepdim=True)

    def cost(s: Tensor, m: Tensor, q: Tensor) -> Tensor:
        gap = s * q + m - x
        return (weight * (gap.abs() if absolute else gap * gap)).sum(1, keepdim=True)

    scale, offset = (high - low) / top, low
    best = cost(scale, offset, (_over(top, high - low) * (x - low)).round().clamp(0, top))
    for step in range(steps + 1):
        q = (_over(start + 0.1 * step + top, high - offset) * (x - offset)).round().clamp(0, top)
        wq = weight * q
        sum_q, sum_qq, sum_xq = wq.sum(1, keepdim=True), (wq * q).sum(1, keepdim=True), (wq * x).sum(1, keepdim=True)
        determinant = sum_w * sum_qq - sum_q * sum_q
        s = (sum_w * sum_xq - sum_x * sum_q) / determinant
        m = (sum_qq * sum_x - sum_q * sum_xq) / determinant
        s, m = torch.where(m > 0, sum_xq / sum_qq, s), m.clamp(max=0)
        error = cost(s, m, q)
        better = (determinant > 0) & (error < best)
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, m, offset)
    return torch.where(constant, torch.zeros_like(scale), scale), torch.where(constant, -low, -offset)


def _fit_grid(x: Tensor, rounding: Callable[[Tensor], Tensor], factors: list[float]) -> Tensor:
    """Scale of least error, weighted by x^2, of x ~ s q (ggml: make_qx_quants; quantize_row_iq4_nl_impl).

    For each factor f the codes are `rounding(f x / peak)`; the scale is their least squares, sum w q x / sum w q^2.
    """
    peak = _signed_peak(x)
    dead = peak.abs() < _EPS
    peak = torch.where(dead, torch.ones_like(peak), peak)
    weight = x * x
    scale, best = torch.zeros_like(peak), torch.zeros_like(peak)
    for place, factor in enumerate(factors):
        q = rounding(_over(factor, peak) * x)
        wq = weight * q
        sum_xq, sum_qq = (wq * x).sum(1, keepdim=True), (wq * q).sum(1, keepdim=True)
        better = (sum_qq > 0) & ((sum_xq * sum_xq > best * sum_qq) if place else torch.ones_like(dead))
        s = sum_xq / sum_qq
        scale, best = torch.where(better, s, scale), torch.where(better, s * sum_xq, best)
    return torch.where(dead, torch.zeros_like(scale), scale)


def _fit_coordinates(x: Tensor, half: int) -> Tensor:
    """Scale of x ~ s q, q in -half..half-1: codes improved one at a time, five rounds (ggml: make_q3_quants)."""
    peak = _signed_peak(x)
    dead = (peak.abs() < _EPS)[:, 0]
    peak = torch.where(dead[:, None], torch.ones_like(peak), peak)
    weight = x * x
    codes = (_over(-half, peak) * x).round().clamp(-half, half - 1)
    sum_xq, sum_qq = (weight * x * codes).sum(1), (weight * codes * codes).sum(1)
    for _ in range(5):
        for i in range(x.shape[1]):
            w, xi, q = weight[:, i], x[:, i], codes[:, i]
            rest_xq, rest_qq = sum_xq - w * xi * q, sum_qq - w * q * q
            new = (xi * rest_qq / rest_xq).round().clamp(-half, half - 1)
            new = torch.where(rest_xq > 0, new, q)
            new_xq, new_qq = rest_xq + w * xi * new, rest_qq + w * new * new
            better = (new != q) & (new_qq > 0) & (new_xq * new_xq * sum_qq > sum_xq * sum_xq * new_qq)
            codes[:, i] = torch.where(better, new, q)
            sum_xq, sum_qq = torch.where(better, new_xq, sum_xq), torch.where(better, new_qq, sum_qq)
    return torch.where(dead | (sum_qq == 0), torch.zeros_like(sum_qq), sum_xq / sum_qq)[:, None]


def _scaled_codes(x: Tensor, d: Tensor, low: int, high: int) -> Tensor:
    """Codes under the scales as they are stored; 0 where the scale is 0."""
    return torch.where(d == 0, torch.zeros_like(x), x / d).round().clamp(low, high).int()


def _nonnegative_scales(scales: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """(B, n) scales as codes 0..top of a float16 step: step (B, 1) float32 before it is stored, and codes."""
    peak = scales.amax(1, keepdim=True).clamp(min=0)
    factor = torch.where(peak > 0, _over(top, peak), torch.zeros_like(peak))
    codes = (scales * factor).round().clamp(0, top).int()
    return peak / top, codes


def _signed_scales(scales: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The same with codes -half..half-1."""
    peak = _signed_peak(scales)
    factor = torch.where(peak == 0, torch.zeros_like(peak), _over(-half, peak))
    return _inverse(factor), (scales * factor).round().clamp(-half, half - 1).int()


def _encode_q2_k(blocks: Tensor) -> Tensor:
    x = blocks.reshape(-1, 16)
    scale, offset = _fit_affine(x, x.abs(), 3, -0.5, 15, True)
    d, sc = _nonnegative_scales(scale.reshape(-1, 16), 15)
    dmin, mn = _nonnegative_scales(offset.reshape(-1, 16), 15)
    q = _super_codes(x, d, sc, dmin, mn, 3)
    return torch.cat([(sc | mn << 4).to(torch.uint8), _fold(q, 2, 32), _half(d), _half(dmin)], 1)


def _super_codes(x: Tensor, d: Tensor, sc: Tensor, dmin: Tensor, mn: Tensor, top: int) -> Tensor:
    """(B, 256) codes 0..top of x ~ d sc q - dmin mn, with d and dmin as they are stored."""
    step = (d.half().float() * sc).reshape(-1, 1)
    offset = (dmin.half().float() * mn).reshape(-1, 1)
    return _scaled_codes(x + offset, step, 0, top).reshape(len(d), 256)


def _decode_q2_k(data: Tensor) -> Tensor:
    scales = data[:, :16].int()
    step = _float(data[:, 80:82]) * (scales & 15).float()
    offset = _float(data[:, 82:84]) * (scales >> 4).float()
    q = _unfold(data[:, 16:80], 2, 32).float().reshape(-1, 16, 16)
    return (step[:, :, None] * q - offset[:, :, None]).reshape(-1, 256)


def _encode_q3_k(blocks: Tensor) -> Tensor:
    x = blocks.reshape(-1, 16)
    d, sc = _signed_scales(_fit_coordinates(x, 4).reshape(-1, 16), 32)
    q = _scaled_codes(x, (d.half().float() * sc).reshape(-1, 1), -4, 3).reshape(-1, 256) + 4
    stored = sc + 32
    scales = torch.cat([_fold(stored & 15, 4, 8), _fold(stored >> 4, 2, 4)], 1)
    return torch.cat([_fold(q >> 2, 1, 32), _fold(q & 3, 2, 32), scales, _half(d)], 1)


def _decode_q3_k(data: Tensor) -> Tensor:
    scales = (_unfold(data[:, 96:104], 4, 8) | _unfold(data[:, 104:108], 2, 4) << 4) - 32
    q = (_unfold(data[:, 32:96], 2, 32) | _unfold(data[:, :32], 1, 32) << 2) - 4
    step = _float(data[:, 108:]) * scales.float()
    return (step[:, :, None] * q.float().reshape(-1, 16, 16)).reshape(-1, 256)


def _pack_six(sc: Tensor, mn: Tensor) -> Tensor:
    """Eight scales and eight offsets of 6 bits in 12 bytes."""
    low = torch.cat([sc[:, :4], mn[:, :4]], 1) | torch.cat([sc[:, 4:], mn[:, 4:]], 1) >> 4 << 6
    return torch.cat([low, (sc[:, 4:] & 15) | (mn[:, 4:] & 15) << 4], 1).to(torch.uint8)


def _unpack_six(data: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c = (data[:, i : i + 4].int() for i in (0, 4, 8))
    return torch.cat([a & 63, (c & 15) | a >> 6 << 4], 1), torch.cat([b & 63, c >> 4 | b >> 6 << 4], 1)


def _fit_k(blocks: Tensor, top: int, start: float, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """d, scales, dmin, offsets and codes of Q4_K and Q5_K."""
    x = blocks.reshape(-1, 32)
    weight = x.square().mean(1, keepdim=True).sqrt() + x.abs()
    scale, offset = _fit_affine(x, weight, top, start, steps, False)
    d, sc = _nonnegative_scales(scale.reshape(-1, 8), 63)
    dmin, mn = _nonnegative_scales(offset.reshape(-1, 8), 63)
    return d, sc, dmin, mn, _super_codes(x, d, sc, dmin, mn, top)


def _encode_q4_k(blocks: Tensor) -> Tensor:
    d, sc, dmin, mn, q = _fit_k(blocks, 15, -1.0, 20)
    return torch.cat([_half(d), _half(dmin), _pack_six(sc, mn), _fold(q, 4, 32)], 1)


def _decode_k(data: Tensor, q: Tensor) -> Tensor:
    sc, mn = _unpack_six(data[:, 4:16])
    step, offset = _float(data[:, :2]) * sc.float(), _float(data[:, 2:4]) * mn.float()
    return (step[:, :, None] * q.float().reshape(-1, 8, 32) - offset[:, :, None]).reshape(-1, 256)


def _decode_q4_k(data: Tensor) -> Tensor:
    return _decode_k(data, _unfold(data[:, 16:], 4, 32))


def _encode_q5_k(blocks: Tensor) -> Tensor:
    d, sc, dmin, mn, q = _fit_k(blocks, 31, -0.5, 15)
    return torch.cat([_half(d), _half(dmin), _pack_six(sc, mn), _fold(q >> 4, 1, 32), _fold(q & 15, 4, 32)], 1)


def _decode_q5_k(data: Tensor) -> Tensor:
    return _decode_k(data, _unfold(data[:, 48:], 4, 32) | _unfold(data[:, 16:48], 1, 32) << 4)


def _encode_q6_k(blocks: Tensor) -> Tensor:
    x = blocks.reshape(-1, 16)
    factors = [-32.0] + [-(32 + 0.1 * step) for step in range(-9, 10) if step]
    scale = _fit_grid(x, lambda scaled: scaled.round().clamp(-32, 31), factors)
    d, sc = _signed_scales(scale.reshape(-1, 16), 128)
    q = _scaled_codes(x, (d.half().float() * sc).reshape(-1, 1), -32, 31).reshape(-1, 256) + 32
    scales = sc.to(torch.int8).view(torch.uint8)
    return torch.cat([_fold(q & 15, 4, 64), _fold(q >> 4, 2, 32), scales, _half(d)], 1)


def _decode_q6_k(data: Tensor) -> Tensor:
    q = (_unfold(data[:, :128], 4, 64) | _unfold(data[:, 128:192], 2, 32) << 4) - 32
    step = _float(data[:, 208:]) * data[:, 192:208].contiguous().view(torch.int8).float()
    return (step[:, :, None] * q.float().reshape(-1, 16, 16)).reshape(-1, 256)


# IQ4: 16 values that are not equally spaced.


def _iq4_codes(scaled: Tensor) -> Tensor:
    values = torch.tensor(_IQ4, dtype=scaled.dtype, device=scaled.device)
    return torch.bucketize(scaled, (values[1:] + values[:-1]) / 2, right=True)  # ties go up, as in C


def _iq4_values(codes: Tensor) -> Tensor:
    return torch.tensor(_IQ4, dtype=torch.float32, device=codes.device)[codes]


def _fit_iq4(x: Tensor) -> Tensor:
    return _fit_grid(x, lambda scaled: _iq4_values(_iq4_codes(scaled)), [127.0, *range(-134, -119)])


def _encode_iq4_nl(blocks: Tensor) -> Tensor:
    scale = _fit_iq4(blocks)
    return torch.cat([_half(scale), _fold(_iq4_codes(blocks * _inverse(scale)), 4, 16)], 1)


def _decode_iq4_nl(data: Tensor) -> Tensor:
    return _float(data[:, :2]) * _iq4_values(_unfold(data[:, 2:], 4, 16))


def _encode_iq4_xs(blocks: Tensor) -> Tensor:
    x = blocks.reshape(-1, 32)
    scale = _fit_iq4(x).reshape(-1, 8)
    d = _signed_peak(scale) / -32
    sc = (scale * _inverse(d)).round().clamp(-32, 31).int()
    q = _iq4_codes(x * _inverse((d * sc).reshape(-1, 1))).reshape(-1, 256)
    stored = sc + 32
    scales = torch.cat([_fold(stored >> 4, 2, 1), _fold(stored & 15, 4, 1)], 1)
    return torch.cat([_half(d), scales, _fold(q, 4, 16)], 1)


def _decode_iq4_xs(data: Tensor) -> Tensor:
    scales = (_unfold(data[:, 4:8], 4, 1) | _unfold(data[:, 2:4], 2, 1) << 4) - 32
    step = _float(data[:, :2]) * scales.float()
    return (step[:, :, None] * _iq4_values(_unfold(data[:, 8:], 4, 16)).reshape(-1, 8, 32)).reshape(-1, 256)


# Ternary types: -1, 0 and 1 under one float16 a block of 256.


def _trits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    d = blocks.abs().amax(1, keepdim=True)
    return d, (_away(blocks * _inverse(d)) + 1).int()


def _encode_tq2_0(blocks: Tensor) -> Tensor:
    d, q = _trits(blocks)
    return torch.cat([_fold(q, 2, 32), _half(d)], 1)


def _decode_tq2_0(data: Tensor) -> Tensor:
    return _float(data[:, 64:]) * (_unfold(data[:, :64], 2, 32) - 1).float()


def _encode_tq1_0(blocks: Tensor) -> Tensor:
    d, q = _trits(blocks)
    powers = torch.tensor(_POWERS_OF_3, device=q.device)[:, None]
    parts = ((q[:, :160], 5, 32), (q[:, 160:240], 5, 16), (q[:, 240:], 4, 4))
    sums = [(part.reshape(-1, digits, width) * powers[:digits]).sum(1) for part, digits, width in parts]
    return torch.cat([((torch.cat(sums, 1) * 256 + 242) // 243).to(torch.uint8), _half(d)], 1)


def _decode_tq1_0(data: Tensor) -> Tensor:
    powers = torch.tensor(_POWERS_OF_3[::-1], device=data.device)[:, None]
    parts = ((data[:, :32], 5), (data[:, 32:48], 5), (data[:, 48:52], 4))
    digits_of = [
        ((part.int()[:, None] * powers[:digits] & 255) * 3 >> 8).reshape(len(data), -1) for part, digits in parts
    ]
    return _float(data[:, 52:]) * (torch.cat(digits_of, 1) - 1).float()


_CODECS = {
    "q4_0": (_encode_q4_0, _decode_q4_0),
    "q4_1": (_encode_q4_1, _decode_q4_1),
    "q5_0": (_encode_q5_0, _decode_q5_0),
    "q5_1": (_encode_q5_1, _decode_q5_1),
    "q8_0": (_encode_q8_0, _decode_q8_0),
    "q2_k": (_encode_q2_k, _decode_q2_k),
    "q3_k": (_encode_q3_k, _decode_q3_k),
    "q4_k": (_encode_q4_k, _decode_q4_k),
    "q5_k": (_encode_q5_k, _decode_q5_k),
    "q6_k": (_encode_q6_k, _decode_q6_k),
    "iq4_nl": (_encode_iq4_nl, _decode_iq4_nl),
    "iq4_xs": (_encode_iq4_xs, _decode_iq4_xs),
    "tq1_0": (_encode_tq1_0, _decode_tq1_0),
    "tq2_0": (_encode_tq2_0, _decode_tq2_0),
}
#: Name, in lower case -> block type; the sizes are those of `core.formats`.
TYPES: dict[str, BlockType] = {
    name: BlockType(facts.block or 0, facts.block_bytes or 0, *_CODECS[name])
    for name, facts in NUMBER_FORMATS.items()
    if facts.family == "gguf block"
}
