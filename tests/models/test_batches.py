import collections
import dataclasses
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.models.data.batches import (
    arranged,
    collect,
    data_fingerprint,
    inputs_of,
    mapped,
    moved,
    samples,
    targets_of,
)
from mpsearch.models.data.splitting import first_samples, split
from mpsearch.models.running import call

IDS = torch.randint(5, (8, 4), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(8, 4, dtype=torch.long)
LABELS = torch.arange(8) % 3
Pair = collections.namedtuple("Pair", "ids mask")
Odd = collections.namedtuple("Odd", "x y")
Row = dataclasses.make_dataclass("Row", ["ids", "mask", "labels"])


class Net(nn.Module):
    """A linear layer after an embedding; what `forward` takes besides is added."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 3)

    def run(self, ids, *more):
        x = self.embed(ids)
        for part in more:
            if part is not None:
                x = x * part[..., None]
        return self.head(x.mean(1))


class Plain(Net):
    def forward(self, ids):
        return self.run(ids)


class Two(Net):
    def forward(self, ids, mask):
        return self.run(ids, mask)


class Optional(Net):
    def forward(self, ids, mask=None):
        return self.run(ids, mask)


class Three(Net):
    def forward(self, ids, mask, scale):
        return self.run(ids, mask, scale)


class Flagged(Net):
    def forward(self, ids, flag=False):
        return self.run(ids)


class Open(Net):
    def forward(self, *args, **keywords):
        return self.run(*args)


def read(model, batch):
    """Number of inputs and whether there are labels; and what is told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (reading,) = collect([batch], model)
    inputs = inputs_of(reading)
    return (
        len(inputs) if isinstance(inputs, tuple | dict) else 1,
        targets_of(reading) is not None,
        [str(w.message) for w in told],
    )


@pytest.mark.parametrize(
    ("model", "batch", "inputs", "labelled", "words"),
    [
        (Plain, IDS, 1, False, ""),
        (Plain, (IDS, LABELS), 1, True, ""),
        (Plain, [IDS, LABELS], 1, True, ""),
        (Plain, (IDS, None), 1, False, ""),
        (Plain, (IDS,), 1, False, ""),
        (Plain, [IDS], 1, False, ""),
        (Plain, Odd(IDS, LABELS), 1, True, ""),
        (Two, (IDS, MASK), 2, False, ""),
        (Two, [IDS, MASK], 2, False, ""),
        (Two, Pair(IDS, MASK), 2, False, ""),
        (Two, ((IDS, MASK), LABELS), 2, True, ""),
        (Two, (IDS, MASK, LABELS), 2, True, ""),
        (Two, Row(IDS, MASK, LABELS), 2, True, ""),
        (Two, ({"ids": IDS, "mask": MASK}, LABELS), 2, True, ""),
        (Two, {"ids": IDS, "mask": MASK, "labels": LABELS}, 2, True, ""),
        (Two, collections.UserDict(ids=IDS, mask=MASK), 2, False, ""),
        (Optional, (IDS, LABELS), 1, True, "taken for labels and not for mask"),
        (Optional, (IDS, MASK), 2, False, "taken for mask and not for labels"),
        (Optional, (IDS, MASK, LABELS), 2, True, ""),
        (Optional, ((IDS,), MASK), 1, True, ""),
        (Optional, (IDS, None), 1, False, ""),
        (Optional, Pair(IDS, MASK), 2, False, ""),
        (Three, (IDS, MASK, MASK), 3, False, ""),
        (Three, (IDS, MASK, MASK, LABELS), 3, True, ""),
        (Flagged, (IDS, LABELS), 1, True, ""),
        (Open, (IDS, LABELS), 1, True, ""),
        (Open, (IDS, MASK, LABELS), 2, True, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile])
def test_what_of_a_batch_is_input(model, batch, inputs, labelled, words, wrap):
    assert read(wrap(model()), batch)[:2] == (inputs, labelled)
    told = read(wrap(model()), batch)[2]
    assert len(told) == bool(words)
    assert all(words in line for line in told)
    table = mps.profile(model(), [batch], mps.sensitivity.KLDivergence(), mps.precisions("w4"), progress=False)
    assert np.isfinite(table.sensitivity).all()


@pytest.mark.parametrize("batch", [(IDS, MASK, LABELS), (IDS, MASK, LABELS, LABELS)])
def test_more_parts_than_the_model_takes(batch):
    with pytest.raises(
        mps.EstimatorError, match=rf"a batch of {len(batch)} parts, where the model takes 1 input \(ids\)"
    ):
        collect([batch], Plain())


def test_one_part_too_few():
    with pytest.raises(
        mps.EstimatorError, match=r"a batch of 2 parts, where the model takes 3 inputs \(ids, mask, scale\)"
    ):
        collect([(IDS, MASK)], Three())


def test_what_is_assumed_holds_for_all_batches_and_their_parts():
    zeros = torch.zeros(8, 4, dtype=torch.long)
    with pytest.warns(UserWarning, match="labels") as told:
        first, second = collect([(IDS, zeros), (IDS, IDS)], Optional())
    assert len(told) == 1
    for batch in (first, second, first_samples(first, 2), *split([first], {"a": 0.5, "b": 0.5}, 0)["a"]):
        assert targets_of(arranged(batch, Optional())).shape == (samples(batch), 4)


def test_a_metric_is_given_the_batch_as_it_was():
    seen = []

    def metric(model, batch):
        seen.append(batch)
        return float(model(*batch).mean())

    mps.evaluate(Two(), [Pair(IDS, MASK)], mps.Plan({"head": mps.Precision("4")}), metric=metric)
    assert all(type(batch) is Pair for batch in seen)
    assert len(seen) == 2


def test_how_a_batch_is_read_is_in_the_result():
    kurtosis, options = mps.sensitivity.Kurtosis(), mps.precisions("w4")
    table = mps.profile(Two(), [(IDS, MASK, LABELS)], kurtosis, options, progress=False)
    assert table.origin["batch"] == {"inputs": [0, 1], "labels": 2}
    assert "batch" not in mps.profile(Plain(), [(IDS, LABELS)], kurtosis, options, progress=False).origin


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, tree):
        return self.head(tree["a"][1][0]["x"])


@pytest.mark.parametrize("wrap", [lambda tree: tree, lambda tree: (tree, torch.arange(24) % 3)])
def test_a_mapping_that_forward_does_not_know_by_keys_is_its_input(wrap):
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    batch = wrap({"a": ["text", ({"x": x},)]})
    model = Nested()
    assert torch.equal(call(model, batch), model.head(x))
    assert mps.evaluate(model, [batch], mps.Plan({"head": mps.Precision("2")}), progress=False).kl > 0


def test_batches_nested_at_any_depth():
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    batch = ({"tree": {"a": ["text", ({"x": x},)], "n": 3}}, torch.arange(24) % 3)
    assert samples(batch) == 24
    assert first_samples(batch, 2)[0]["tree"]["a"][1][0]["x"].shape == (2, 4)
    result = mps.search(
        Nested(), [batch], mps.Budget(average_bits=4), mps.precisions("w2 w4 w8"), max_passes=12, progress=False
    )
    assert len(result.plan) == 1


def test_containers_keep_their_types():
    from transformers import BatchEncoding
    from transformers.modeling_outputs import BaseModelOutput

    encoding = BatchEncoding({"ids": IDS})
    batch = [
        Pair(IDS, (MASK,)),
        encoding,
        BaseModelOutput(last_hidden_state=IDS),
        Row(IDS, 1, "x"),
        collections.OrderedDict(a=IDS),
    ]
    halved = mapped(batch, lambda leaf: leaf[:3] if isinstance(leaf, torch.Tensor) else leaf)
    assert [type(part) for part in halved] == [type(part) for part in batch]
    assert (
        halved[0].mask[0].shape
        == halved[1]["ids"].shape
        == halved[2].last_hidden_state.shape
        == halved[3].ids.shape
        == (3, 4)
    )
    assert encoding["ids"] is IDS
    assert batch[3].ids is IDS
    assert [type(part) for part in moved(batch, torch.device("meta"))] == [type(part) for part in batch]
    assert encoding["ids"].device.type == "cpu"


@pytest.mark.parametrize(
    ("targets", "labels"),
    [
        ((0, 1, 2, 0) * 2, True),
        ([0, 1, 2, 0] * 2, True),
        (np.arange(8) % 3, True),
        ([torch.tensor(i % 3) for i in range(8)], True),
        (list("abcdefgh"), False),
        (np.array(list("abcdefgh")), False),
        ([{"box": torch.zeros(4)}] * 8, False),
        ([[1], [1, 2]] * 4, False),
        (object(), False),
    ],
)
def test_labels_of_any_kind(targets, labels):
    batch = (IDS, targets)
    assert (targets_of(batch) is not None) == labels
    plan = mps.Plan({"head": mps.Precision("4")})
    measured = mps.evaluate(Plain(), [batch], plan)
    assert (measured.accuracy is not None) == labels
    if not labels:
        with pytest.raises(mps.EstimatorError, match="needs labels") as error:
            mps.search(
                Plain(), [batch] * 8, mps.Budget(average_bits=4), mps.precisions("w4 w8"), metric="loss", progress=False
            )
        assert type(targets).__name__ in str(error.value)


def test_the_hash_of_data_covers_everything():
    x = torch.zeros(2)
    data = [
        x,
        (x, x),
        {"a": x},
        {"b": x},
        (x, "a"),
        (x, "b"),
        (x, 1),
        (x, 1.0),
        (x, np.zeros(2)),
        (x, np.zeros(2, "i4")),
        Pair(x, x + 1),
    ]
    data += [(x, np.array(["a"])), {"a": {"a": x + 1}}, {"a": [x, None]}, (x, True), (x, b"a"), Row(x, x, 2)]
    hashes = [data_fingerprint([batch]) for batch in data]
    assert len(set(hashes)) == len(data)
    assert hashes == [data_fingerprint([batch]) for batch in data]


@pytest.mark.parametrize(
    "batch",
    [SimpleNamespace(x=IDS), "text", ("text", LABELS), {}, (), torch.tensor(3), object(), {"a": torch.tensor(3)}],
)
def test_what_is_no_batch_is_told_in_a_line(batch):
    with pytest.raises(mps.EstimatorError, match="batch"):
        collect([batch], Plain())
