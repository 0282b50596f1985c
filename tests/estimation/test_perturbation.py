"""One perturbation at a time: the table of a naive program, for less work, and nothing lost or left behind."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import mpsearch as mps
from mpsearch.estimation import context, replayed_probes
from mpsearch.models.replay import Trace
from mpsearch.models.running import call, predictions, samples
from mpsearch.quantizers.fake_quantization import input_quantizers, input_ranges
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import (
    SQNR,
    CosineDistance,
    KLDivergence,
    LinearityCoefficients,
    MaskedKL,
    MetricDecoupled,
    OutputMSE,
    Part,
    PathShapley,
    PredictionDifference,
    TaskMetric,
)

DAMAGES = {
    KLDivergence(): lambda z, y, _: kl(z, y),
    PredictionDifference(4.0): lambda z, y, _: kl(z / 4, y / 4),
    OutputMSE(): lambda z, y, _: (z - y).square().mean(1),
    SQNR(): lambda z, y, _: (z - y).square().sum(1) / z.square().sum(1).mean(),
    CosineDistance(): lambda z, y, _: 1 - F.cosine_similarity(z, y, dim=1, eps=0.0),
    TaskMetric("accuracy"): lambda z, y, t: (z.argmax(1) == t).double() - (y.argmax(1) == t).double(),
    TaskMetric(): lambda z, y, t: F.cross_entropy(y, t, reduction="none") - F.cross_entropy(z, t, reduction="none"),
}


def kl(z, y):
    return F.kl_div(y.log_softmax(1), z.log_softmax(1), reduction="none", log_target=True).sum(1)


class Net(nn.Module):
    """A residual network with rectifiers in place, batch norm, and a layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, groups=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        for _ in range(2):
            x = x + self.relu(self.twice(x))
        return self.fc(F.relu_(self.deep(x)).mean((2, 3)))


class Decoder(nn.Module):
    """A causal language model with tied embedding and head, fed by keywords, padded."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        q, k, v = (part(x)[:, None] for part in (self.q, self.k, self.v))
        seen = attention_mask[:, None, None].bool() & torch.ones(x.shape[1], x.shape[1]).tril().bool()
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, attn_mask=seen)[:, 0])
        return {"logits": self.head(x + self.down(F.gelu(self.up(x))))}


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = Net().to(dtype)
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def images(sizes=(5, 2, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(n, 1, 6, 6, generator=generator).to(dtype) for n in sizes]
    return [(x, torch.arange(len(x)) % 3) for x in draws]


def decoder():
    torch.manual_seed(0)
    return Decoder().eval()


def texts(lengths=((4, 4), (2, 5, 3))):
    """Batches of rows of these lengths, padded, labels on every second token."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for rows in lengths:
        tokens = torch.randint(1, 9, (len(rows), max(rows)), generator=generator)
        mask = (torch.arange(max(rows)) < torch.tensor(rows)[:, None]).long()
        labels = torch.where((mask == 1) & (torch.arange(max(rows)) % 2 == 0), tokens.flip(1), -100)
        found.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels})
    return found


def naive(model, batches, damage, options, groups=(), quantizer=None):
    """Mean damage and its standard error: a copy of the model for each cell, run whole on each batch."""
    quantizer = quantizer or RoundToNearest()
    names = [layer.name for layer in mps.layers(model, batches[0], groups=())]
    ranges = input_ranges(model, batches, names)
    units = [next((group for group in groups if name in group), [name]) for name in names]
    value, error = (np.zeros((len(names), len(options))) for _ in range(2))
    for row, unit in enumerate(units):
        for column, option in enumerate(options):
            changed = copy.deepcopy(model)
            with torch.no_grad():
                for weight in {changed.get_submodule(name).weight for name in unit}:
                    if option.quantizes_weight:
                        weight.copy_(quantizer(weight.detach().clone(), option))
                functions = input_quantizers(changed, dict.fromkeys(unit, option), quantizer, ranges)
                for module, function in functions.items():
                    if not isinstance(module, nn.Embedding):  # token numbers are left alone
                        module.register_forward_pre_hook(lambda _, args, function=function: (function(args[0]),))
                sums, counts = [], []
                for batch in batches:
                    z, labels, index = predictions(model, call(model, batch), batch)
                    y, _, _ = predictions(model, call(changed, batch), batch)
                    found = damage(z.double(), y.double(), labels)
                    for sample in range(samples(batch)):
                        if (index == sample).any():
                            sums.append(float(found[index == sample].sum()))
                            counts.append(float((index == sample).sum()))
            mean = value[row, column] = sum(sums) / sum(counts)
            squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
            error[row, column] = math.sqrt(len(sums) / (len(sums) - 1) * squares) / sum(counts)
    share = np.array([1 / len(unit) for unit in units])[:, None]
    return value * share, error * share


def assert_tables(model, batches, estimators, options, *, groups=(), tolerance=1e-6):
    tables = mps.profile(model, batches, estimators, options, groups={f"g{i}": g for i, g in enumerate(groups)})
    for estimator, table in zip(estimators, tables, strict=True):
        value, se = naive(model, batches, DAMAGES[estimator], options, groups)
        scale = abs(value).max()
        np.testing.assert_allclose(
            table.sensitivity, value, rtol=tolerance, atol=tolerance * scale, err_msg=f"{estimator}"
        )
        np.testing.assert_allclose(table.sensitivity_se, se, rtol=1e-4, atol=1e-4 * scale, err_msg=f"{estimator}")
    return tables


OPTIONS = mps.precisions("w2 w4a4 w16a3 w16")


def test_a_naive_program_gives_the_same_tables():
    tables = assert_tables(net(), images(), list(DAMAGES), OPTIONS)
    assert tables[0].origin["passes"]["forward"] < 0.8 * (4 * 3 + 1)
    assert [table.unit for table in tables] == ["nats", *["relative"] * 5, "nats"]


@pytest.mark.parametrize("activation_bytes", [0, 10_000_000])
def test_in_turns_or_all_at_once(monkeypatch, activation_bytes):
    turns = []
    made, run = context.record, replayed_probes._Run.turns  # type: ignore[attr-defined]

    def record(model, batch):
        trace, output = made(model, batch)
        return Trace(trace.calls, trace.readers, trace.flops, activation_bytes, trace.held_bytes), output

    monkeypatch.setattr(context, "record", record)
    monkeypatch.setattr(replayed_probes._Run, "turns", lambda self: turns.append(run(self)) or turns[-1])
    assert_tables(net(), images(), [KLDivergence(), TaskMetric()], mps.precisions("w2 w4a4"))
    assert [len(turn) for turn in turns[0]] == ([1, 1, 1] if activation_bytes == 0 else [3])


def test_groups_are_scored_as_one():
    groups = (["stem", "fc"], ["twice", "deep"])
    tables = assert_tables(net(), images(), [KLDivergence(), OutputMSE()], OPTIONS, groups=groups)
    row = {layer.name: values for layer, values in zip(tables[0].layers, tables[0].sensitivity, strict=True)}
    np.testing.assert_array_equal(row["stem"], row["fc"])


def test_tokens_count_but_not_padding():
    estimators = [KLDivergence(), OutputMSE(), CosineDistance(), TaskMetric()]
    options = mps.precisions("w2 w4a4 w16a4")
    model, batches = decoder(), texts()
    tables = assert_tables(model, batches, estimators, options, groups=(["embed", "head"], ["q", "k", "v"]))
    for batch in batches:  # what stands where the mask is 0 does not matter
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, 3, batch["input_ids"])
    again = mps.profile(model, batches, estimators, options, groups={"g0": ["embed", "head"], "g1": ["q", "k", "v"]})
    for one, other in zip(tables, again, strict=True):
        np.testing.assert_allclose(one.sensitivity[:, 0], other.sensitivity[:, 0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    """Accumulated in float64 from logits in the model's own dtype."""
    assert_tables(net(dtype), images(dtype=dtype), [KLDivergence(), SQNR()], mps.precisions("w2 w3a8"))


def test_shared_runs_cost_the_passes_of_one():
    model, batches = net(), images()
    separate = [mps.profile(model, batches, one, OPTIONS) for one in DAMAGES]
    together = mps.profile(model, batches, list(DAMAGES), OPTIONS)
    for one, other in zip(separate, together, strict=True):
        np.testing.assert_array_equal(one.sensitivity, other.sensitivity)
        np.testing.assert_array_equal(one.sensitivity_se, other.sensitivity_se)
        assert other.origin["passes"] == one.origin["passes"]
        assert other.origin["shared_with"] == len(DAMAGES) - 1


def test_an_estimator_may_be_given_twice():
    one, other = mps.profile(net(), images(), [KLDivergence(), KLDivergence()], OPTIONS)
    np.testing.assert_array_equal(one.sensitivity, other.sensitivity)


@pytest.mark.parametrize(
    "estimator",
    [
        *DAMAGES,
        MaskedKL(),
        LinearityCoefficients(4),
        MetricDecoupled((Part("fc", SQNR()), Part("*", KLDivergence()))),
        PathShapley(2),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_the_forecast_holds(estimator):
    """`cost` is an upper limit, and for weights alone not more than half as much again."""
    for options in (mps.precisions("w2 w3 w4"), OPTIONS):
        passes = mps.profile(net(), images(), estimator, options).origin["passes"]
        cost = estimator.cost(3, 4, len(options))
        assert passes["forward"] <= cost.forward + 1e-9
        assert passes["backward"] <= cost.backward + 1e-9


def test_passes_are_those_that_were_made(monkeypatch):
    """Floating-point operations of every run after the door's two probes, over those of one pass."""
    model, batches = net(), images((4, 4))
    spent = 0

    def count(work):
        def counted(module, x, *rest):
            nonlocal spent
            y = work(module, x, *rest)
            spent += y.numel() * module.weight[0].numel()
            return y

        return counted

    monkeypatch.setattr(nn.Conv2d, "forward", count(nn.Conv2d.forward))
    monkeypatch.setattr(nn.Linear, "forward", count(nn.Linear.forward))
    with torch.no_grad():
        model(batches[0][0])
        one = 2 * spent
        spent = 0
        mps.layers(model, batches[0])
        door = spent + one  # finding the layers; two passes over the first batch
    spent = 0
    table = mps.profile(model, batches, KLDivergence(), mps.precisions("w2 w3 w16"), resources=())
    assert table.origin["passes"]["forward"] == pytest.approx((spent - door) / one, rel=1e-9)


def test_cells_on_the_grid_cost_nothing():
    model, batches = net(), images()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "kernel_size") or isinstance(module, nn.Linear):
                module.weight.copy_(RoundToNearest()(module.weight.detach(), mps.Precision("4")))
    table = mps.profile(model, batches, KLDivergence(), mps.precisions("w4 w16"))
    assert (table.sensitivity == 0).all()
    assert table.origin["passes"]["forward"] <= 2 + 1 / 3 + 1e-9  # the record, the reference, the confirmation


# Models whose calls are not the same each time, or whose modules speak to each other behind their outputs


class Paths(nn.Module):
    """Another branch where the mean of the batch is negative."""

    def __init__(self):
        super().__init__()
        self.first, self.up, self.down, self.last = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        y = torch.tanh(self.first(x))
        y = self.up(self.up(y)) if x.mean() > 0 else F.normalize(self.down(y))
        return self.last(y)


class Loops(nn.Module):
    """As many steps as there are tokens."""

    def __init__(self):
        super().__init__()
        self.step, self.mix, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        state = x.new_zeros(len(x), 6)
        for token in x.unbind(1):
            state = torch.tanh(self.mix(state) + self.step(token))
        return self.last(state)


class Aside(nn.Module):
    """An encoder leaves a tensor on itself that the decoder takes from there."""

    class Encoder(nn.Linear):
        def forward(self, x):
            self.skip = super().forward(x)
            return torch.relu(self.skip)

    def __init__(self):
        super().__init__()
        self.encoder = self.Encoder(6, 6)
        self.middle, self.decoder, self.last = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        y = self.middle(self.encoder(x))
        y = self.decoder(y + self.encoder.skip)
        del self.encoder.skip
        return self.last(y)


class Kept(Aside):
    """The tensor stays there from run to run."""

    def forward(self, x):
        y = self.middle(self.encoder(x))
        return self.last(self.decoder(y + self.encoder.skip))


class Ignored(nn.Module):
    """A module that works in place, and whose output nobody takes."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(6, 6) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.first(x)
        self.relu(y)
        return self.last(self.second(y))


class Strict(nn.Module):
    """Fails where a layer's output is not what it must be."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        y = self.first(x)
        y = self.second(y) if len(x) > 2 else self.second(y.tanh()[:1]).expand(len(x), 6).clone().relu_()
        return self.last(y)


def rows(*shapes):
    generator = torch.Generator().manual_seed(3)
    draws = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x - x.mean() + (0.5 if i % 2 == 0 else -0.5) for i, x in enumerate(draws)]


@pytest.mark.parametrize(
    ("kind", "batches"),
    [
        (Paths, rows((4, 6), (4, 6), (3, 6))),
        (Paths, rows((4, 6), (4, 6), (3, 6))[::-1][:2]),
        (Loops, rows((3, 4, 6), (3, 2, 6), (3, 5, 6))),
        (Aside, rows((4, 6), (3, 6))),
        (Kept, rows((4, 6), (4, 6))),
        (Ignored, rows((4, 6), (3, 6))),
        (Strict, rows((4, 6), (2, 6))),
    ],
)
@pytest.mark.parametrize("activation_bytes", [None, 0, 10_000_000])
def test_right_numbers_whatever_the_model_does(monkeypatch, kind, batches, activation_bytes):
    torch.manual_seed(0)
    model = kind().eval()
    if activation_bytes is not None:
        made = context.record  # type: ignore[attr-defined]

        def record(model, batch):
            trace, output = made(model, batch)
            return Trace(trace.calls, trace.readers, trace.flops, activation_bytes, trace.held_bytes), output

        monkeypatch.setattr(context, "record", record)
    options = mps.precisions("w2 w3")
    model(batches[0])  # attributes that a run leaves behind are there already
    table = mps.profile(model, batches, KLDivergence(), options)
    np.testing.assert_allclose(table.sensitivity, naive(model, batches, DAMAGES[KLDivergence()], options)[0], rtol=1e-6)


# What is refused, and what is left behind


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (KLDivergence(), r"the output with layer 'deep' at w3 is not finite \(batch 1\)"),
        (TaskMetric("accuracy"), r"the output with layer 'deep' at w3 is not finite \(batch 1\)"),
        (
            TaskMetric(lambda z, t: torch.where(z.sum(1) == 0, torch.inf, 0 * z[:, 0]), True),
            r"sensitivity of layer 'fc' at w3 is (-inf|nan), expected a finite number \(TaskMetric\(.*\), batch 0\)",
        ),
    ],
)
def test_what_is_not_finite_is_named(estimator, words):
    model = net()
    nn.init.zeros_(model.fc.bias)
    batches = images()
    batches[1] = (batches[1][0] * 1e30, batches[1][1])

    def quantizer(weight, precision):
        if precision == mps.Precision("2"):
            return weight.clone()
        if weight.ndim == 2:
            return torch.zeros_like(weight)
        return weight * 1e12 if weight.shape[1] == 2 else weight.clone()

    if "deep" not in words:
        batches[1] = images()[1]
    with pytest.raises(mps.EstimatorError, match=words) as caught:
        mps.profile(model, batches, estimator, mps.precisions("w2 w3"), quantizer=quantizer)
    assert "\n" not in str(caught.value)


def test_labels_that_are_missing():
    for estimator in (TaskMetric("accuracy"), MetricDecoupled((Part("*", TaskMetric()),))):
        with pytest.raises(mps.EstimatorError, match="needs labels"):
            mps.profile(net(), [x for x, _ in images()], estimator, OPTIONS)


@pytest.mark.parametrize("stop", [1, 7, 15, 23])
def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch, stop):
    model = net()
    before = {name: (value.clone(), value.data_ptr()) for name, value in model.state_dict().items()}
    attributes = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    calls = 0
    original = nn.Conv2d.forward

    def counted(module, x):
        nonlocal calls
        calls += 1
        if calls == stop + 5:
            raise KeyboardInterrupt
        return original(module, x)

    monkeypatch.setattr(nn.Conv2d, "forward", counted)
    with pytest.raises(KeyboardInterrupt):
        mps.profile(model, images(), [KLDivergence(), OutputMSE()], OPTIONS)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert value.data_ptr() == before[name][1]
    assert attributes == [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


# Memory


class Live(TorchDispatchMode):
    """The most bytes that storages hold which are made inside and alive at one time, temporary ones of an operation aside."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.storages = {key: kept for key, kept in self.storages.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def in_place(weight, precision):
    """Rounds to a grid of sixteenths with one copy and nothing else."""
    return weight.clone().mul_(16).round_().div_(16)


@pytest.mark.parametrize(("wide", "rows"), [(64, 48), (128, 4)])
def test_memory(wide, rows, monkeypatch):
    """Above the model, at most twice the largest layer and the activations of one batch, large or small."""
    monkeypatch.setattr("mpsearch.quantizers.rounded_weights.ROOM_BYTES", 0)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(layer for _ in range(12) for layer in (nn.Linear(wide, wide), nn.ReLU())), nn.Linear(wide, 4)
    )
    batches = [torch.randn(rows, wide) for _ in range(6)]
    largest, activations = 4 * wide * wide, 4 * rows * (24 * wide + 4)
    limit = 2 * largest + activations
    options = mps.precisions("w2 w3 w4")
    with torch.no_grad(), Live() as whole:
        kept = [x := batches[0], *(x := layer(x) for layer in model)]
    assert whole.peak == activations == sum(4 * y.numel() for y in kept[1:])
    with Live() as live:
        mps.profile(model, batches, KLDivergence(), options, quantizer=in_place, resources=())
    assert largest < live.peak <= limit
