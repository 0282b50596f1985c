"""Samples between samples, against a loop over pairs."""

import numpy as np
import pytest
import torch

from mpsearch.models.data.mixup import mixup

IMAGES = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0))


def partners(between, images=IMAGES):
    """Of each sample the one that it was averaged with, by looking at all."""
    found = []
    for i, sample in enumerate(between):
        fits = [j for j in range(len(images)) if torch.allclose(sample, (images[i] + images[j]) / 2, atol=1e-6)]
        assert len(fits) == 1
        found += fits
    return found


@pytest.mark.parametrize("batch", [IMAGES, (IMAGES, torch.arange(7)), {"x": IMAGES, "labels": torch.arange(7)}])
def test_every_sample_is_averaged_with_another_one_and_is_taken_once_as_a_partner(batch):
    (found,) = mixup([batch], seed=3)
    between = found["x"] if isinstance(batch, dict) else found[0] if isinstance(batch, tuple) else found
    chosen = partners(between)
    assert sorted(chosen) == list(range(7))
    assert all(i != j for i, j in enumerate(chosen))
    assert "labels" not in found if isinstance(batch, dict) else not isinstance(batch, tuple) or found[1] is None


def test_each_draw_has_partners_of_its_own_and_a_seed_says_which():
    first, second, third = mixup([IMAGES], seed=1, draws=3)
    assert len({tuple(partners(one)) for one in (first, second, third)}) > 1
    assert all(map(torch.equal, mixup([IMAGES], seed=1, draws=3), (first, second, third)))
    assert not torch.equal(mixup([IMAGES], seed=2)[0], first)


def test_what_is_no_number_cannot_be_averaged():
    tokens = torch.arange(6).reshape(3, 2)
    assert mixup([tokens], seed=0) == []
    assert mixup([{"x": IMAGES, "mask": torch.ones(7, 2, dtype=torch.bool)}], seed=0) == []
    assert mixup([IMAGES, (tokens, None)], seed=0) == []
    assert mixup([], seed=0) == []


def test_what_belongs_to_no_sample_stays_and_a_lonely_sample_is_left_out():
    scale = torch.tensor([2, 5])
    (found,) = mixup([{"x": IMAGES, "scale": scale}, {"x": IMAGES[:1], "scale": scale}], seed=0)
    assert torch.equal(found["scale"], scale)
    assert len(found["x"]) == len(IMAGES)


def test_parts_of_an_input_have_the_same_partners():
    ((pair, _),) = mixup([((IMAGES, 2 * IMAGES), None)], seed=0)
    assert partners(pair[0]) == partners(pair[1], 2 * IMAGES)
    np.testing.assert_allclose(pair[1], 2 * pair[0], rtol=1e-6)
