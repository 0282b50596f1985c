"""Entropy of codes against counting them."""

import math
from collections import Counter

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity.weight_entropy import WeightEntropy, entropy


def score(weight, bits=4):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    table = mps.profile(
        model,
        [torch.ones(1, weight.shape[1])],
        WeightEntropy(bits),
        mps.precisions("w4"),
        quantizer=lambda w, p: 2 * w,
    )
    return table.sensitivity[0, 0]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_counted_codes(bits):
    torch.manual_seed(0)
    weight = torch.randn(7, 30)
    codes = RoundToNearest(granularity="tensor").codes(weight, mps.Precision(str(bits)))
    counts = Counter((codes.rounded / codes.scales).round().flatten().tolist())
    expected = -sum(n / 210 * math.log2(n / 210) for n in counts.values())
    assert score(weight, bits) == pytest.approx(expected)
    assert score(weight, bits) <= bits


def test_uniform_codes_and_constants():
    assert score(torch.arange(-7.0, 8.0)[None]) == pytest.approx(math.log2(15))
    assert score(torch.ones(3, 4)) == 0
    assert entropy(torch.arange(256)) == pytest.approx(8)
    assert entropy(torch.zeros(5)) == 0


def test_finer_codes_carry_more():
    torch.manual_seed(0)
    weight = torch.randn(20, 50)
    found = [score(weight, bits) for bits in (1, 2, 3, 4, 6, 8)]
    assert found == sorted(found)


def test_settings():
    for bits in (0, 16):
        with pytest.raises(mps.EstimatorError, match=f"bits={bits}"):
            WeightEntropy(bits)
