"""What a model and the random generators hold is there again, whatever the model does while it is run."""

import collections
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mpsearch as mps
from mpsearch.models.data.snapshot import snapshot
from mpsearch.sensitivity import Fisher, KLDivergence

OPTIONS = mps.precisions("w2 w4")
PLAN = mps.Plan({"body": mps.Precision("4"), "head": mps.Precision("2")})


class Notes:
    """An object of the user's."""

    def __init__(self):
        self.count, self.seen, self.sums, self.inner = 0, [], {"all": torch.zeros(3)}, None


class Noting(nn.Module):
    """Changes all that it holds in every call, but gives the same output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.shapes, self.nested, self.names = [], [{"a": [1, (2, [3])]}], {"x"}
        self.by_name = collections.defaultdict(int)
        self.queue = collections.deque([1, 2, 3], maxlen=3)
        self.plain, self.cells = torch.zeros(3), [torch.zeros(2), np.zeros(2)]
        self.notes, self.count, self.old = Notes(), 0, "here"
        self.generators = [torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)]

    def forward(self, x):
        with torch.no_grad():
            self.calls += 1
            self.plain += 1
            self.cells[0] -= 1
            self.notes.sums["all"].add_(1)
        self.cells[1][:] = 7
        self.shapes.append(tuple(x.shape))
        self.nested[0]["a"][1][1].append(len(self.shapes))
        self.nested[0]["b"] = 1
        self.names.add(len(self.names))
        self.by_name[len(self.by_name)] += 1
        self.queue.append(x.shape)
        self.notes.count += 1
        self.notes.seen.append(x)
        self.notes.inner = Notes()
        self.count, self.new = self.count + 1, x
        if hasattr(self, "old"):
            del self.old
        torch.rand(1, generator=self.generators[0])
        self.generators[1].random()  # type: ignore[attr-defined]
        self.generators[2].random()  # type: ignore[attr-defined]
        return self.head(torch.relu(self.body(x)))


def state(value):
    """All that can be reached, as text; tensors by their values."""
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, collections.defaultdict | collections.OrderedDict | dict):
        return {key: state(part) for key, part in value.items()}
    if isinstance(value, list | tuple | collections.deque):
        return [state(part) for part in value]
    if isinstance(value, nn.Module | Notes):
        return state(vars(value))
    return repr(value)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(10, 4, generator=generator), torch.arange(10) % 3) for _ in range(6)]


DOORS = {
    "profile": lambda model, data: mps.profile(model, data, [KLDivergence(), Fisher()], OPTIONS, progress=False),
    "evaluate": lambda model, data: mps.evaluate(model, data, PLAN, progress=False),
    "measure_plans": lambda model, data: mps.measure_plans(model, data, [PLAN], progress=False),
    "layers": lambda model, data: mps.layers(model, next(iter(data))),
    "search": lambda model, data: mps.search(
        model, data, mps.Budget(average_bits=3), OPTIONS, max_passes=14.0, progress=False
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_forward_changes_in_place_comes_back(door):
    model = Noting()
    model(batches()[0][0])  # with something in everything
    model.old = "here"
    held_objects = [model.shapes, model.nested[0]["a"][1][1], model.plain, model.notes, model.notes.sums["all"]]
    before = copy.deepcopy(state(model))
    DOORS[door](model, batches())
    assert state(model) == before
    now = [model.shapes, model.nested[0]["a"][1][1], model.plain, model.notes, model.notes.sums["all"]]
    assert all(a is b for a, b in zip(held_objects, now, strict=True))


def test_it_comes_back_after_an_exception():
    model = Noting()
    before = copy.deepcopy(state(model))

    def metric(model, batch):
        model(batch[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mps.evaluate(model, batches(), PLAN, metric=metric)
    assert state(model) == before


def test_tensors_that_change_their_shape_and_hold_no_numbers():
    model = nn.Identity()
    model.grown, model.blank = torch.ones(2), torch.full((2,), torch.nan)
    with torch.inference_mode():
        model.inferred = torch.ones(2)
    restore = snapshot(model)
    model.grown.resize_(4).zero_()
    model.blank.zero_()
    with torch.inference_mode():
        model.inferred.zero_()
    restore()
    assert (model.grown.tolist(), model.inferred.tolist()) == ([1, 1], [1, 1])
    assert model.blank.isnan().all()


def test_parts_of_the_process_are_left_alone():
    import logging
    import threading

    model = nn.Identity()
    model.log, model.lock, model.teacher = logging.getLogger("teacher"), threading.Lock(), [nn.Linear(1, 1)]
    restore = snapshot(model)
    handler = logging.NullHandler()
    model.log.addHandler(handler)
    model.teacher[0].note = 1
    restore()
    assert handler in model.log.handlers
    assert model.teacher[0].note == 1


class Shuffled(torch.utils.data.Dataset):
    """Data that is augmented with the global generators."""

    def __len__(self):
        return 60

    def __getitem__(self, place):
        return torch.full((4,), float(place)) + torch.rand(4) + random.random() + np.random.rand(), place % 3  # noqa: NPY002


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("data", ["loader", "shuffled", "augmented"])
def test_loaders_do_not_move_the_global_generators(door, data):
    inputs = torch.cat([x for x, _ in batches()])
    whole = TensorDataset(inputs, torch.arange(len(inputs)) % 3)
    loader = DataLoader(Shuffled() if data == "augmented" else whole, batch_size=10, shuffle=data == "shuffled")
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()  # noqa: NPY002
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    model = Noting()
    torch.manual_seed(5)
    if door == "layers":
        data = batches()
        DOORS[door](model, data)
    else:
        DOORS[door](model, loader)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected  # noqa: NPY002


class Random(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.head, self.kind, self.calls = nn.Linear(4, 4), nn.Linear(4, 3), kind, 0

    def forward(self, x):
        self.calls += 1
        x = self.body(x)
        if self.kind == "dropout":
            x = nn.functional.dropout(x, 0.1)
        elif self.kind == "noise":
            x = x + 1e-2 * torch.randn_like(x)
        elif self.kind == "small outputs":
            return 1e-6 * self.head(nn.functional.dropout(x, 0.1))
        elif self.kind == "memory":
            x = x * self.calls
        return self.head(x)


@pytest.mark.parametrize("door", [door for door in DOORS if door != "layers"])
@pytest.mark.parametrize("kind", ["dropout", "noise", "small outputs", "memory"])
def test_random_models_are_refused_by_every_door(door, kind):
    with pytest.raises(mps.EstimatorError, match="random in evaluation mode"):
        DOORS[door](Random(kind), batches())
