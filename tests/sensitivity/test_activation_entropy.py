"""Entropy of feature maps against plain histograms."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.sensitivity.activation_entropy import ActivationEntropy


def change(weight, precision):
    return weight + 1


def profile(model, batches, estimator=ActivationEntropy(), precisions="w1 w2 w4 w8 w16", **keywords):  # noqa: B008 frozen
    return mps.profile(model, batches, estimator, mps.precisions(precisions), quantizer=change, **keywords)


def entropy(values, bits):
    """Entropy of equal steps over the range of the values."""
    low, high = min(values), max(values)
    codes = Counter(min(int((v - low) / (high - low) * 256), 255) >> (8 - bits) for v in values)
    return -sum(n / len(values) * math.log2(n / len(values)) for n in codes.values())


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()
    return model, [torch.randn(n, 1, 5, 5).double() for n in (6, 4)]


def maps(model, batches):
    x = torch.cat(batches)
    return [x, model[:3](x).detach()]


def test_histograms():
    model, batches = net()
    table = profile(model, batches)
    values = [found.flatten().tolist() for found in maps(model, batches)]
    total = sum(entropy(v, 8) for v in values)
    expected = [[(entropy(v, 8) - entropy(v, bits)) / total for bits in (1, 2, 4, 8, 8)] for v in values]
    np.testing.assert_allclose(table.sensitivity, expected, atol=1e-12)
    assert (np.diff(table.sensitivity) <= 0).all()  # nested steps never lose entropy
    assert (table.sensitivity[:, 0] * total <= 8).all()


def test_activation_bits_come_before_weight_bits():
    model, batches = net()
    by_weight = profile(model, batches, precisions="w2 w4").sensitivity
    by_input = profile(model, batches, precisions="w4a2 w2a4 w16a2").sensitivity
    np.testing.assert_array_equal(by_input[:, :2], by_weight)
    np.testing.assert_array_equal(by_input[:, 2], by_weight[:, 0])


def test_computation_saved():
    model, batches = net()
    entropy_only, macs = profile(model, batches), np.array([2 * 9 * 9, 18 * 3])
    mixed = profile(model, batches, ActivationEntropy(accuracy_weight=0.6)).sensitivity
    for p, bits in enumerate((1, 2, 4, 8, 8)):
        saved = macs * (8 - bits) / (8 * macs.sum())
        np.testing.assert_allclose(mixed[:, p], 0.6 * entropy_only.sensitivity[:, p] - 0.4 * saved)


def outlier_share(x, patches, tail):
    """Share of square patches of (N, C, H, W) that hold a far value, cut as adaptive pooling cuts them."""
    limit = tail * float(x.var(unbiased=False).sqrt())
    far = (x - x.mean()).abs() > limit
    hits = []
    size = x.shape[-1]
    edges = [(i * size // patches, -(-(i + 1) * size // patches)) for i in range(patches)]
    for sample in far:
        for top, bottom in edges:
            for left, right in edges:
                hits.append(bool(sample[:, top:bottom, left:right].any()))
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("patches", "tail"), [(2, 2.0), (4, 2.5), (1, 1.0)])
def test_outlier_patches(patches, tail):
    model, batches = net()
    table = profile(model, batches, ActivationEntropy(patches=patches, tail=tail))
    expected = outlier_share(torch.cat(batches), patches, tail)
    assert table.origin["outlier_patches"]["0"] == pytest.approx(expected)
    assert expected > 0


def test_layers_with_many_outliers_keep_eight_bits():
    model, batches = net()
    batches[0][0, 0, 0, 0] = 50.0  # one sample of ten, in one corner of the input
    estimator = ActivationEntropy(patches=1, tail=6.0, outlier_share=0.05)
    table = profile(model, batches, estimator)
    assert table.origin["outlier_patches"]["0"] == pytest.approx(0.1)
    assert np.isnan(table.sensitivity[0]).tolist() == [True, True, True, False, False]
    low = profile(model, batches, estimator, precisions="w2 w4").sensitivity
    assert np.isfinite(low).all()  # nothing to fall back on


def test_tokens():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

        def forward(self, ids):
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    model, ids = Net(), torch.randint(0, 5, (4, 6))
    found = profile(model, [ids]).sensitivity
    np.testing.assert_allclose(found[0], found[1])  # the map of an embedding is its output, here the input of the head


def test_constant_maps_and_weights_on_the_grid():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    constant = profile(model, [torch.zeros(3, 2)])
    assert (constant.sensitivity[0] == 0).all()
    model, batches = net()
    same = mps.profile(model, batches, ActivationEntropy(), mps.precisions("w2"), quantizer=lambda w, p: w)
    assert (same.sensitivity == 0).all()


def test_settings():
    for keywords in ({"accuracy_weight": 0.0}, {"patches": 0}, {"tail": 0.0}, {"outlier_share": 2.0}):
        with pytest.raises(mps.EstimatorError, match=next(iter(keywords))):
            ActivationEntropy(**keywords)
