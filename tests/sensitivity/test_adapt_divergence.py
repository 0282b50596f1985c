"""Divergence of histograms, and word lengths, against plain counting."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity.adapt_divergence import AdaPTDivergence, fixed_point


def model_of(weight):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return model


def profile(weight, estimator, precisions="w2 w4 w8 w16"):
    return mps.profile(model_of(weight), [torch.ones(1, weight.shape[1])], estimator, mps.precisions(precisions))


def by_hand(weight, quantized, bins):
    low, high = min(weight), max(weight)

    def shares(values):
        counts = [1] * bins
        for value in values:
            counts[min(max(int((value - low) * bins / (high - low)), 0), bins - 1)] += 1
        return [count / sum(counts) for count in counts]

    return sum(p * math.log(p / q) for p, q in zip(shares(weight), shares(quantized), strict=True))


@pytest.mark.parametrize("resolution", [2, 10, 100])
def test_histograms(resolution):
    torch.manual_seed(0)
    weight = torch.randn(6, 50)
    found = profile(weight, AdaPTDivergence(resolution)).sensitivity[0]
    for p, precision in enumerate(mps.precisions("w2 w4 w8")):
        quantized = RoundToNearest()(weight, precision)
        expected = by_hand(weight.double().flatten().tolist(), quantized.double().flatten().tolist(), resolution)
        assert found[p] == pytest.approx(max(expected, 0), abs=1e-12)
    assert found[3] == 0


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_fixed_point_weights_lose_nothing_at_their_word_length(bits):
    torch.manual_seed(0)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (10, 400)).float()
    codes[0, 0] = -(2 ** (bits - 1))
    weight = codes * 2.0**-7
    assert torch.equal(fixed_point(weight, bits), weight.double())
    estimator = AdaPTDivergence(resolution=2**bits, tolerance=1e-9)
    assert estimator.word_length(weight) == bits
    divergences = [estimator.divergence(weight, fixed_point(weight, b)) for b in range(2, 12)]
    assert divergences[bits - 2 :] == [0.0] * (12 - bits)


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_fixed_point_is_the_nearest_number(bits):
    torch.manual_seed(0)
    weight = 3 * torch.randn(40)
    found = fixed_point(weight, bits)
    levels = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).double()
    for exponent in range(-20, 20):  # the finest step that holds all weights up to half a step
        grid = levels * 2.0**exponent
        if grid[0] <= weight.min() and grid[-1] >= weight.max():
            break
    nearest = grid[(weight.double()[:, None] - grid).abs().argmin(1)]
    torch.testing.assert_close(found, nearest)
    assert torch.equal(fixed_point(torch.zeros(3), bits), torch.zeros(3).double())


def test_word_length_is_reported_and_can_be_a_floor():
    torch.manual_seed(0)
    weight = torch.randn(20, 100)
    table = profile(weight, AdaPTDivergence())
    length = table.origin["word_lengths"]["0"]
    assert 3 <= length <= 10
    assert np.isfinite(table.sensitivity).all()
    floor = profile(weight, AdaPTDivergence(floor=True), "w2 w12 w16").sensitivity[0]
    assert np.isnan(floor).tolist() == [True, False, False]
    assert (profile(weight, AdaPTDivergence(tolerance=10.0), "w4").origin["word_lengths"]["0"]) == 2
    only = profile(weight, AdaPTDivergence(floor=True, tolerance=1e-9), "w2 w3").sensitivity[0]
    assert np.isnan(only).tolist() == [True, False]  # the widest is always allowed


def test_a_group_counts_both_weights_and_takes_the_longer_word():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight.sign())
    batch = [torch.ones(1, 30)]
    alone = mps.profile(model, batch, AdaPTDivergence(), mps.precisions("w4"))
    both = mps.profile(model, batch, AdaPTDivergence(), mps.precisions("w4"), groups={"both": ["0", "1"]})
    assert both.sensitivity.sum() == pytest.approx(alone.sensitivity.sum())
    assert both.origin["word_lengths"] == {"both": max(alone.origin["word_lengths"].values())}


def test_settings():
    with pytest.raises(mps.EstimatorError, match="resolution=1"):
        AdaPTDivergence(1)
    with pytest.raises(mps.EstimatorError, match="tolerance=0"):
        AdaPTDivergence(tolerance=0.0)


def test_quantized_inputs_are_refused():
    with pytest.raises(mps.EstimatorError, match="w4a8 quantizes inputs"):
        profile(torch.ones(2, 2), AdaPTDivergence(), "w4a8")
