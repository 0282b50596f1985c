"""Data dealt out to parts: disjoint, complete, and each part with its share."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

import mpsearch as mps
from mpsearch.models.data.splitting import LEAST, cut, split
from mpsearch.models.running import samples

SHARES = {"score": 0.25, "select": 0.55, "report": 0.20}


def values(batches):
    return [int(v) for batch in batches for v in (batch["x"] if isinstance(batch, dict) else batch[0])]


def data(sizes):
    numbers = iter(torch.arange(sum(sizes)).split(list(sizes)))
    return [(part, part * 10) for part in numbers]


@pytest.mark.parametrize("sizes", [(32,) * 8, (64,), (1,) * 40, (7, 1, 30, 2), (5, 16, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_parts_are_disjoint_and_complete_and_have_their_share(sizes, seed):
    parts = split(data(sizes), SHARES, seed)
    found = {name: values(part) for name, part in parts.items()}
    assert sorted(v for part in found.values() for v in part) == list(range(sum(sizes)))
    for name, share in SHARES.items():
        assert abs(len(found[name]) - share * sum(sizes)) < 1
        assert found[name] == sorted(found[name])
        for x, y in parts[name]:
            assert torch.equal(y, x * 10)
    places = {int(v): number for number, (x, _) in enumerate(data(sizes)) for v in x}
    for part in parts.values():
        for x, _ in part:
            assert len({places[int(v)] for v in x}) == 1
    again = split(data(sizes), SHARES, seed)
    assert {name: values(part) for name, part in again.items()} == found


def test_another_seed_deals_otherwise():
    first, second = (split(data((64,)), SHARES, seed) for seed in (0, 1))
    assert values(first["select"]) != values(second["select"])


def test_every_batch_gives_its_share():
    """Not the first batches to one part and the last ones to another."""
    parts = split(data((20,) * 10), SHARES, 0)
    assert [len(x) for x, _ in parts["score"]] == [5] * 10
    assert [len(x) for x, _ in parts["report"]] == [4] * 10


def test_dicts_lists_and_tensors():
    x = torch.arange(20)
    mask = torch.ones(20, 3)
    (batch,) = split(
        [{"x": x, "attention_mask": mask, "labels": x + 1, "scale": torch.tensor(2.0), "flag": True}], SHARES, 0
    )["select"]
    assert torch.equal(batch["labels"], batch["x"] + 1)
    assert batch["attention_mask"].shape == (11, 3)
    assert (float(batch["scale"]), batch["flag"]) == (2.0, True)
    (batch,) = split([(x, list(range(20)))], SHARES, 0)["select"]
    assert batch[0].tolist() == batch[1]
    (batch,) = split([[x, x]], SHARES, 0)["select"]
    assert isinstance(batch, list)
    (batch,) = split([x], SHARES, 0)["select"]
    assert samples(batch) == 11
    (batch,) = split([((x, x * 2), x)], SHARES, 0)["select"]
    assert torch.equal(batch[0][1], batch[0][0] * 2)


def test_two_samples_with_two_inputs_each():
    """A tuple of as many tensors as there are samples is no list of labels."""
    pairs = [
        ((torch.tensor([i, i + 1]), torch.tensor([10 * i, 10 * i + 10])), torch.tensor([0, 1])) for i in range(0, 40, 2)
    ]
    for (first, second), _ in split(pairs, SHARES, 0)["select"]:
        assert torch.equal(second, first * 10)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_too_little_data_is_refused_with_the_numbers(count):
    with pytest.raises(mps.EstimatorError) as caught:
        split([torch.arange(count)], SHARES, 0)
    assert f"{count} samples are too few" in str(caught.value)
    assert f"at least {LEAST}" in str(caught.value)
    assert "to report" in str(caught.value)


def test_the_least_that_is_enough():
    assert {name: sum(map(len, part)) for name, part in split([torch.arange(20)], SHARES, 0).items()} == {
        "score": 5, "select": 11, "report": 4,
    }  # fmt: skip


@pytest.mark.parametrize(("sizes", "pieces"), [((10,), 4), ((32, 32), 4), ((1,) * 5, 4), ((3,), 7), ((9, 1, 5), 1)])
def test_cut(sizes, pieces):
    parts = cut(data(sizes), pieces)
    assert np.array_equal(values(parts), np.arange(sum(sizes)))
    assert max(samples(part) for part in parts) <= min(max(sizes), -(-sum(sizes) // pieces))
    assert len(parts) >= min(pieces, sum(sizes))
    assert all(torch.equal(y, x * 10) for x, y in parts)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_batches_with_names():
    """As a `DataLoader` makes them of a data set of named tuples."""
    x = torch.arange(20)
    for part in split([Pair(x, x * 10)], SHARES, 0).values():
        for inputs, labels in part:
            assert torch.equal(labels, inputs * 10)


@pytest.mark.parametrize("labels", [lambda x: x.numpy() * 10, lambda x: (x * 10).tolist(), lambda x: x * 10])
@pytest.mark.parametrize("size", [2, 20])
@pytest.mark.parametrize("inputs", [lambda x: x, lambda x: {"x": x}, lambda x: (x, x)])
def test_labels_of_any_kind_stay_with_their_samples(labels, size, inputs):
    batches = [(inputs(x), labels(x)) for x in torch.arange(40).split(size)]
    found = []
    for part in split(batches, SHARES, 0).values():
        for given, told in part:
            x = given["x"] if isinstance(given, dict) else given[0] if isinstance(given, tuple) else given
            assert torch.as_tensor(told).tolist() == (x * 10).tolist()
            found += x.tolist()
    assert sorted(found) == list(range(40))
