"""Rounded weights: each made once, and the same bits again."""

import gc
import os
import tempfile

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import Precision
from mpsearch.core.formats import NUMBER_FORMATS
from mpsearch.core.layer import Layer
from mpsearch.errors import EstimatorError
from mpsearch.quantizers import QUANTIZERS
from mpsearch.quantizers.fake_quantization import quantized_weight
from mpsearch.quantizers.quantizer import Around
from mpsearch.quantizers.registry import resolve_quantizer
from mpsearch.quantizers.rounded_weights import RoundedWeights, rounded_bytes
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import FisherProjection, KLDivergence, RelativeWeightError

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Counting(Around):
    """Rounds to the nearest and counts how often each weight is rounded at each precision, which it knows by its least number."""

    def __init__(self, coded=True):
        super().__init__(RoundToNearest())
        self.coded, self.calls = coded, {}

    def _count(self, weight, precision):
        key = float(weight.double().sum()), str(precision)
        self.calls[key] = self.calls.get(key, 0) + 1

    def __call__(self, weight, precision):
        if precision.quantizes_weight:
            self._count(weight, precision)
        return self.quantizer(weight, precision)

    def encoded(self, weight, precision):
        if not self.coded:
            return None
        self._count(weight, precision)
        return self.quantizer.encoded(weight, precision)


def same_bits(one, other):
    kind = BITS[one.element_size()]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.view(kind), other.view(kind))


def linear(shape=(24, 256), dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False).to(dtype)
    layer.weight.data = (torch.randn(shape) * torch.linspace(0.01, 3, shape[0])[:, None]).to(dtype)
    layer.weight.data[0] = 0
    return layer


FORMATS = [*(str(bits) for bits in range(1, 16)), *(name for name in NUMBER_FORMATS if name != "16")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_back_has_the_same_bits(name, dtype):
    """Every format, a scale a channel, a group, a short last group, the tensor; with zero-points and without."""
    layer = linear(dtype=dtype)
    for size in (None, 64, 100):
        try:
            precision = Precision(name, "16", size)
            RoundToNearest()(layer.weight.detach(), precision)
        except EstimatorError:  # blocks of another size by definition
            assert size is not None
            continue
        for options in ({}, {"symmetric": False}, {"granularity": "tensor"}):
            quantizer, store = RoundToNearest(scale="max", **options), RoundedWeights(room_bytes=0)
            first = store.value(layer, "fc", precision, quantizer)
            assert same_bits(first, quantizer(layer.weight.detach(), precision))
            assert same_bits(store.value(layer, "fc", precision, quantizer), first)
            told = rounded_bytes(
                Layer("fc", "linear", (24, 256), dtype=str(dtype).removeprefix("torch.")), precision, quantizer
            )
            assert store.file_bytes + (4 if "nvfp4" in name else 0) == told
            bits = precision.weight_bits
            assert told < first.nbytes or bits > 8 or first.element_size() == 1


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_take_their_packed_bytes(bits):
    layer, store = linear(dtype=torch.bfloat16), RoundedWeights(room_bytes=0)
    store.prepare(layer, "fc", Precision(str(bits)), RoundToNearest())
    assert store.file_bytes == 24 * 256 * bits // 8 + 24 * 2


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_and_every_way_to_store_a_weight(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last),
        nn.Flatten(),
        nn.Linear(8, 6),
    )
    batches = [torch.randn(8, 4, 1, 1)]
    quantizer = resolve_quantizer(name, model, batches)
    for place in (0, 1, 3):
        for text in ("w2", "w4", "w8", "w4g3"):
            precision, store = Precision.parse(text), RoundedWeights(room_bytes=0)
            truth = quantized_weight(model[place], str(place), precision, quantizer)
            for _ in range(2):
                value = store.value(model[place], str(place), precision, quantizer)
                assert same_bits(value, truth)
                assert value.stride() == truth.stride() or text == "w4g3"  # cut out of padded groups
                assert value.untyped_storage().nbytes() == value.nbytes


def test_codes_that_do_not_give_the_same_bits_are_not_believed():
    class Wrong(Around):
        def encoded(self, weight, precision):
            codes = self.quantizer.encoded(weight, precision)
            codes.rounded[3, 7] *= 1.5  # off the grid
            return codes

    layer, store = linear(), RoundedWeights(room_bytes=0)
    first = store.value(layer, "fc", Precision("4"), Wrong(RoundToNearest()))
    assert store.file_bytes == first.nbytes
    assert same_bits(store.value(layer, "fc", Precision("4"), Wrong(RoundToNearest())), first)


def test_room_in_memory_comes_first():
    layers, quantizer = [linear((4, 32 * k)) for k in (4, 8, 2)], RoundToNearest()
    store = RoundedWeights(room_bytes=4 * 4 * 32 * 6)
    for layer in layers:
        store.prepare(layer, "fc", Precision("4"), quantizer)
    assert [store.holds(layer, Precision("4")) for layer in layers] == [True, False, True]
    assert store.held_bytes == store.room_bytes
    assert store.file_bytes == 4 * 32 * 8 // 2 + 4 * 4
    assert store.value(layers[0], "fc", Precision("4"), quantizer) is store.value(
        layers[0], "fc", Precision("4"), quantizer
    )


def test_a_weight_that_is_left_as_it_is_takes_nothing():
    layer, store = linear(), RoundedWeights(room_bytes=0)
    assert (
        store.value(layer, "fc", Precision("4"), resolve_quantizer(lambda w, p: w)).data_ptr()
        == layer.weight.data_ptr()
    )
    assert store.value(layer, "fc", Precision("16"), RoundToNearest()).data_ptr() == layer.weight.data_ptr()
    assert store.held_bytes == store.file_bytes == 0


def open_files(folder):
    """Files below a folder that this process has open, also those without a name, and what lies there under a name."""
    found = [name for name in os.listdir(folder) if not name.startswith("torchinductor")]
    for number in os.listdir("/proc/self/fd"):
        try:
            place = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if place.startswith(str(folder)):
            found.append(place)
    return found


@pytest.fixture
def no_room(monkeypatch, tmp_path):
    """All rounded weights go to a file in this folder."""
    monkeypatch.setattr("mpsearch.quantizers.rounded_weights.ROOM_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Linear(8, 16),
            nn.ModuleList(nn.Linear(16, 16) for _ in range(3)),
            nn.Linear(16, 5),
        )

    def forward(self, x):
        x = self.first(x)
        for layer in self.inner:
            x = x + torch.relu(layer(x))
        return self.last(x)


def network():
    torch.manual_seed(1)
    return Residual(), [torch.randn(8, 8) for _ in range(6)]


CELLS = 5 * 3


@pytest.mark.parametrize("coded", [True, False])
@pytest.mark.parametrize("door", ["search", "profile", "measure", "evaluate", "calibration"])
def test_each_cell_is_rounded_once_a_run(door, coded, no_room):
    model, batches = network()
    quantizer, options = Counting(coded), mps.precisions("w2 w3 w4")
    names = [layer.name for layer in mps.layers(model, batches[0])]
    plans = [mps.Plan(dict.fromkeys(names, option)) for option in options]
    if door == "search":
        mps.search(
            model,
            batches,
            mps.Budget(average_bits=3),
            options,
            quantizer=quantizer,
            effort="fast",
            progress=False,
            metric="kl",
        )
    elif door == "profile":
        estimators = [RelativeWeightError(), FisherProjection(), KLDivergence()]
        mps.profile(model, batches, estimators, options, quantizer=quantizer, progress=False, metric="kl")
    elif door == "measure":
        mps.measure_plans(model, batches, plans, quantizer=quantizer, progress=False, metric="kl")
    elif door == "evaluate":
        mps.evaluate(model, batches, plans[0], quantizer=quantizer, progress=False, metric="kl")
    else:
        with mps.Calibration(model, batches, options, quantizer=quantizer, progress=False, metric="kl") as calibration:
            calibration.profile(RelativeWeightError())
            calibration.measure(plans)
            calibration.profile(KLDivergence())
            calibration.evaluate(plans[1])
    assert set(quantizer.calls.values()) == {1}
    assert len(quantizer.calls) == (5 if door == "evaluate" else CELLS)
    assert not open_files(no_room)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_file_is_gone_and_the_model_put_back_whatever_happens(error, no_room):
    model, batches = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    calls = [0]

    def metric(outputs, reference, batch):
        calls[0] += 1
        if calls[0] == 9:
            assert open_files(no_room)
            raise error
        return (outputs - reference).square().mean(-1)

    def broken(module, args):
        if calls[0] >= 8:
            raise error

    options = mps.precisions("w2 w3 w4")
    plans = [
        mps.Plan(dict.fromkeys((layer.name for layer in mps.layers(model, batches[0])), option)) for option in options
    ]
    handle = model.inner[1].register_forward_pre_hook(broken) if error is KeyboardInterrupt else None
    with pytest.raises((error, EstimatorError)):
        mps.measure_plans(model, batches, plans, progress=False, metric=metric)
    if handle is not None:
        handle.remove()
    gc.collect()
    assert calls[0] >= 8
    assert not open_files(no_room)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [parameter.data_ptr() for parameter in model.parameters()] == storages
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_store_that_is_forgotten_takes_its_file_with_it(no_room):
    store = RoundedWeights()
    store.prepare(linear(), "fc", Precision("4"), RoundToNearest())
    assert open_files(no_room)
    del store
    gc.collect()
    assert not open_files(no_room)


@pytest.mark.parametrize("whole_bytes", [0, 1 << 30])  # the last layer is left out, and applied to rows
def test_results_do_not_depend_on_the_room(monkeypatch, whole_bytes):
    model, batches = network()
    options, results = mps.precisions("w2 w3 w4 w2a8"), []
    monkeypatch.setattr("mpsearch.models.head.WHOLE_BYTES", whole_bytes)
    for room in (0, 1 << 30):
        monkeypatch.setattr("mpsearch.quantizers.rounded_weights.ROOM_BYTES", room)
        result = mps.search(
            model, batches, mps.Budget(average_bits=3), options, effort="fast", progress=False, metric="kl"
        )
        tables = [table.sensitivity.tolist() for table in result.tables.values()]
        results.append((dict(result.plan), tables, result.plans.damage.tolist(), result.passes, result.measured))
    assert results[0] == results[1]


class Shared(nn.Module):
    """Reads the weight of a layer that it also calls, and one weight in two layers."""

    def __init__(self):
        super().__init__()
        self.read, self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.relu(nn.functional.linear(self.read(x), self.read.weight))
        return self.two(torch.relu(self.one(x)))


def test_weights_that_are_read_elsewhere_are_there_the_whole_run(no_room):
    torch.manual_seed(0)
    model, batches = Shared(), [torch.randn(16, 8) for _ in range(2)]
    plan = mps.Plan(dict.fromkeys([layer.name for layer in mps.layers(model, batches[0])], Precision("3")))
    quantized = Shared()
    quantized.load_state_dict(model.state_dict())
    for layer in (quantized.read, quantized.one):
        layer.weight.data = RoundToNearest()(layer.weight.data, Precision("3"))
    truth = sum(float((quantized(x) - model(x)).square().mean()) for x in batches) / 2
    found = mps.measure_plans(model, batches, [plan], progress=False, metric="mse")
    assert found.damage[0] == pytest.approx(truth, rel=1e-5)
