"""Quantizers around a quantizer, against loops and explicit matrices."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import mpsearch as mps
from mpsearch import Precision
from mpsearch.quantizers.hadamard import HadamardRotation
from mpsearch.quantizers.packing import packed_bytes
from mpsearch.quantizers.percentile import PercentileClip
from mpsearch.quantizers.rounding import RoundToNearest


def weight(*shape, outliers=False, dtype=torch.float32):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if outliers:
        w[:, 3] *= 30
    return w.to(dtype)


@pytest.mark.parametrize("percentile", [50, 90, 99.9, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 30), (3, 2, 3, 3), (9,)])
def test_clipping_a_channel_at_a_time(percentile, dtype, shape):
    w = weight(*shape, dtype=dtype)
    clipped = torch.empty_like(w)
    for i, row in enumerate(w if w.ndim > 1 else [w]):
        sizes = sorted(row.abs().reshape(-1).tolist())
        limit = sizes[math.ceil(percentile / 100 * len(sizes)) - 1]
        (clipped[i] if w.ndim > 1 else clipped).copy_(row.clamp(-limit, limit))
    truth = RoundToNearest(scale="max")(clipped, Precision("4"))
    assert torch.equal(PercentileClip(percentile)(w, Precision("4")), truth)
    if percentile == 100:
        assert torch.equal(clipped, w)


def test_clipping_an_outlier_helps_the_rest():
    w = weight(8, 1000)
    w[:, 0] = 40
    plain, clipped = (q(w, Precision("4")) - w for q in (RoundToNearest(scale="max"), PercentileClip(99)))
    assert clipped[:, 1:].square().mean() < 0.1 * plain[:, 1:].square().mean()


@pytest.mark.parametrize(
    ("shape", "block", "size"), [((5, 64), 128, 64), ((5, 96), 16, 16), ((5, 96), 128, 32), ((5, 7), 128, 1)]
)
def test_rotation_by_an_explicit_matrix(shape, block, size):
    w = weight(*shape, outliers=True)
    signs = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(3)) * 2 - 1
    one = np.diag(signs.numpy()) @ scipy.linalg.hadamard(size) / math.sqrt(size)
    matrix = scipy.linalg.block_diag(*[one] * (shape[1] // size))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(shape[1]), atol=1e-12)
    rotated = torch.tensor(w.numpy() @ matrix, dtype=torch.float32)
    for text in ("w4", "w4g16", "wmxfp4"):
        precision = Precision.parse(text)
        truth = RoundToNearest()(rotated, precision).numpy() @ matrix.T
        found = HadamardRotation(block=block, seed=3)(w, precision).numpy()
        wrong = np.abs(found - truth).max(1) > 1e-4  # an element at the middle of two values may go either way
        assert wrong.mean() <= 0.2


def test_rotating_spreads_outliers_and_exact_formats_come_back():
    w = weight(16, 128, outliers=True)
    plain, rotated = (float((q(w, Precision("4")) - w).square().mean()) for q in (RoundToNearest(), HadamardRotation()))
    assert rotated < 0.2 * plain
    torch.testing.assert_close(HadamardRotation()(w, Precision("fp32")), w, rtol=0, atol=1e-4)
    assert torch.equal(HadamardRotation()(w, Precision("16")), w)
    assert not torch.equal(HadamardRotation(seed=1)(w, Precision("4")), HadamardRotation()(w, Precision("4")))
    conv = weight(4, 8, 3, 3)
    torch.testing.assert_close(HadamardRotation()(conv, Precision("fp32")), conv, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_shape_and_dtype_survive(dtype):
    for shape in ((6,), (4, 3), (4, 8, 3)):
        w = weight(*shape, dtype=dtype)
        for quantizer in (HadamardRotation(), PercentileClip(90)):
            found = quantizer(w, Precision("4"))
            assert (found.shape, found.dtype) == (w.shape, w.dtype)


def test_rotated_inputs_and_weights_belong_together():
    """The fake-quantized layer computes Q(x R) Q(w R)^T."""
    x, w = weight(6, 32), weight(5, 32, outliers=True)
    inner = RoundToNearest(activation="token")
    quantizer = HadamardRotation(inner)
    rotation = quantizer._rotation(x)
    product = inner.activation_values(x @ rotation, "8", math.nan, math.nan) @ inner(w @ rotation, Precision("8")).T
    found = quantizer.activation_values(x, "8", math.nan, math.nan) @ quantizer(w, Precision("8")).T
    torch.testing.assert_close(found, product, rtol=1e-4, atol=1e-4)


def test_the_doors_take_wrappers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    x = torch.randn(4, 4, 4, 4)
    plan = mps.Plan({"0": Precision("4", "8"), "3": Precision("4", "8")})
    assert mps.evaluate(model, [x], plan, quantizer=PercentileClip(99)).kl > 0
    rotated = HadamardRotation(RoundToNearest(activation="token"))
    assert mps.evaluate(model, [x], plan, quantizer=rotated).kl > 0
    with pytest.raises(mps.EstimatorError, match="input of layer '0' at w4a8: the calibrated range"):
        mps.evaluate(model, [x], plan, quantizer=HadamardRotation())
    asymmetric = PercentileClip(99, RoundToNearest(symmetric=False))
    assert packed_bytes(96, 3, 4, Precision("4"), asymmetric) == 48 + 12 + 2


@pytest.mark.parametrize(
    "make", [lambda: PercentileClip(0), lambda: PercentileClip(101), lambda: HadamardRotation(block=0)]
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(mps.EstimatorError, match="expected"):
        make()
