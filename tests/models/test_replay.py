"""Re-running a part of a model: the same output from every entry, and nothing done that need not be done."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.models.replay import Resumption, record
from mpsearch.models.running import call


class Residual(nn.Module):
    """A block with a functional or in-place rectifier and an in-place sum."""

    def __init__(self, inplace):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=inplace)
        self.inplace = inplace

    def forward(self, x):
        y = self.conv2(self.relu(self.norm(self.conv1(x))))
        if self.inplace:
            y += x
            return self.relu(y)
        return F.relu(y + x)


def residual(inplace):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(inplace=inplace),
        *(Residual(inplace) for _ in range(3)),
        nn.Flatten(),
        nn.Linear(4 * 36, 3),
    )


class UNet(nn.Module):
    """The outputs of both early layers are read again by late ones."""

    def __init__(self):
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = torch.relu(self.down1(x))
        b = torch.relu(self.down2(F.max_pool2d(a, 2)))
        y = self.up2(torch.cat([self.middle(b), b], 1))
        return self.up1(torch.cat([F.interpolate(y, scale_factor=2), a], 1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Token numbers in, a dict out; the head shares its weight with the embedding, and is no module."""

    def __init__(self, functional):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Attention() for _ in range(3))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.functional = functional

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": F.linear(x, self.embed.weight) if self.functional else self.head(x), "hidden": x}


class Twice(nn.Module):
    """One layer called three times, once inside another call, and outputs in tuples."""

    class Pair(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.other = nn.Linear(6, 6)

        def forward(self, x, *, scale):
            y = self.inner(x)
            return y * scale, {"other": self.other(y)}

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.pair = self.Pair(self.first)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        y, more = self.pair(self.first(x), scale=0.5)
        return self.last(self.first(y + more["other"])), y


class Wrapped(nn.Module):
    """Modules whose `forward` is an attribute of their own, as quantization and offloading tools leave behind."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
        for layer in self.layers[:2]:  # type: ignore[attr-defined]
            original = layer.forward
            layer.forward = lambda x, original=original: torch.tanh(original(x))

    def forward(self, x):
        return self.layers(x)


class Recursive(nn.Module):
    """A module that calls itself."""

    def __init__(self):
        super().__init__()
        self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, depth=2):
        y = torch.tanh(self.step(x))
        if depth:
            y = y + self(y, depth - 1)
            y = self.step(y)
        return self.head(y) if depth == 2 else y


def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))


ROWS, IMAGES, TOKENS = (5, 6), (2, 1, 6, 6), {"input_ids": torch.arange(10).reshape(2, 5)}
MODELS = {
    "plain": (plain, ROWS),
    "residual": (lambda: residual(False), IMAGES),
    "residual in place": (lambda: residual(True), IMAGES),
    "u-net": (UNet, IMAGES),
    "transformer": (lambda: Transformer(False), TOKENS),
    "transformer with a functional head": (lambda: Transformer(True), TOKENS),
    "fused encoder": (encoder, (2, 4, 6)),
    "called twice": (Twice, ROWS),
    "own forward": (Wrapped, ROWS),
    "recursive": (Recursive, ROWS),
}


def made(name):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    batch = shape if isinstance(shape, dict) else torch.randn(shape)
    return build().eval(), batch


def state(model):
    """Everything that hangs on the modules."""
    return [{key: value for key, value in vars(module).items() if "hooks" not in key} for module in model.modules()]


class Count:
    """Counts the times that each module works: a function of the module's class, so that replaced forwards are not seen."""

    def __init__(self, model):
        self.model = model
        self.runs = {}

    def __enter__(self):
        self.originals = {}
        for cls in {type(module) for module in self.model.modules()}:
            self.originals[cls] = cls.forward

            def counted(module, *args, original=cls.forward, **kwargs):
                self.runs[module] = self.runs.get(module, 0) + 1
                return original(module, *args, **kwargs)

            cls.forward = counted
        return self

    def __exit__(self, *_):
        for cls, original in self.originals.items():
            cls.forward = original


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_entry_gives_the_output_of_a_whole_run(name):
    model, batch = made(name)
    expected = call(model, batch)
    before = state(model)
    trace, recorded = record(model, batch)
    assert torch.equal(recorded, expected)
    one_by_one = Resumption(model, batch, trace)
    for entry in sorted(range(len(trace.calls)), key=lambda i: trace.calls[i].start):
        one_by_one.advance(entry)
        at_once = Resumption(model, batch, trace)
        at_once.advance(entry)
        for held in (one_by_one, at_once):
            for _ in range(2):  # a run must leave what is held as it was
                torch.testing.assert_close(held.run(), expected, rtol=1e-6, atol=1e-6)
    assert state(model) == before


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_changed_weight_gives_what_a_whole_run_gives(name):
    model, batch = made(name)
    trace, expected = record(model, batch)
    layers = [module for module in model.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]
    found = []
    for module in layers:
        held = Resumption(model, batch, trace)
        held.advance(trace.entry([module], [module.weight]))
        module.weight.mul_(1.5)
        partly, whole = held.run(), call(model, batch)
        torch.testing.assert_close(partly, whole, rtol=1e-6, atol=1e-6)
        found.append(not torch.equal(whole, expected))
        module.weight.div_(1.5)
    assert all(found)


@torch.no_grad()
def test_earlier_calls_are_not_made():
    model, batch = made("residual")
    trace, _ = record(model, batch)
    block = model[3]
    held = Resumption(model, batch, trace)
    held.advance(trace.entry([block.conv2], [block.conv2.weight]))
    with Count(model) as count:
        held.run()
    assert count.runs == {
        model: 1,
        block: 1,
        block.conv2: 1,
        model[4]: 1,
        **dict.fromkeys(model[4].children(), 1),
        model[5]: 1,
        model[6]: 1,
    }
    with Count(model) as count:  # going on costs what lies between
        held.advance(trace.entry([model[4].conv1], []))
    assert [count.runs.get(module, 0) for module in (model[2], block, block.conv1, block.conv2, model[4].conv1)] == [
        0,
        1,
        0,
        1,
        0,
    ]


@torch.no_grad()
def test_shares_add_up_to_the_work():
    model = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(4, 5))  # 60, 40, 20 multiplications
    trace, _ = record(model, torch.ones(2, 6))
    shares = [trace.share(trace.entry([layer], [layer.weight])) for layer in model]
    assert shares == pytest.approx([1, 1 / 2, 1 / 6])
    assert trace.flops == 2 * 2 * 120
    assert trace.activation_bytes == 4 * 2 * (10 + 4 + 5)
    assert trace.held_bytes == 4 * 2 * (10 + 5)  # the first output while the second is computed, and the result


@torch.no_grad()
def test_a_layer_that_is_never_called_means_a_whole_run():
    model = plain()
    model.spare = nn.Linear(3, 3)
    model.forward = lambda x: nn.Sequential(*list(model)[:5])(x)
    trace, _ = record(model, torch.ones(2, 6))
    assert trace.entry([model.spare], [model.spare.weight]) == 0


@torch.no_grad()
def test_only_what_is_read_later_is_held():
    model, batch = made("residual")
    trace, _ = record(model, batch)
    held = Resumption(model, batch, trace)
    block = model[4]
    for part in (model[0], model[2].conv2, model[3].conv2, block.conv2):
        held.advance(trace.entry([part], []))
    found = {trace.calls[index].module: output for index, output in held.outputs.items()}
    assert set(found) == {*model[:4], block.conv1, block.norm, block.relu}
    real = {module for module, output in found.items() if output.untyped_storage().nbytes() > output.element_size()}
    assert real == {model[3], block.relu}  # the shortcut, and the input of the entry
    assert all(output.shape == (2, 4, 6, 6) for output in found.values())


class Stop(nn.Module):
    """Raises when told to."""

    error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [ValueError("stop"), KeyboardInterrupt()])
@pytest.mark.parametrize("work", ["record", "advance", "run"])
@torch.no_grad()
def test_the_model_is_as_it_was_after_an_interrupt(error, work):
    torch.manual_seed(0)
    stop = Stop()
    model = nn.Sequential(Wrapped(), stop, nn.Linear(3, 4), nn.Linear(4, 3)).eval()
    batch = torch.randn(2, 6)
    before = state(model)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    trace, expected = record(model, batch)
    held = Resumption(model, batch, trace)
    if work == "run":
        held.advance(trace.entry([model[0].layers[1]], []))
    works = {
        "record": lambda: record(model, batch),
        "advance": lambda: held.advance(trace.entry([model[3]], [])),
        "run": held.run,
    }
    stop.error = error
    with pytest.raises((type(error), mps.EstimatorError)):
        works[work]()
    del stop.error
    assert state(model) == before
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.equal(held.run(), expected)  # what was held is still whole


@torch.no_grad()
def test_hooks_of_the_user_are_seen_by_both():
    model, batch = made("plain")
    model[2].register_forward_hook(lambda module, args, output: output * 2)
    trace, expected = record(model, batch)
    held = Resumption(model, batch, trace)
    held.advance(trace.entry([model[4]], []))
    torch.testing.assert_close(held.run(), expected, rtol=0, atol=0)
    assert torch.equal(call(model, batch), expected)


@torch.no_grad()
def test_outputs_of_any_kind_pass_through():
    """Numbers, None, locks: only tensors are looked at."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 6)
            self.lock = threading.Lock()

        def forward(self, x):
            return [self.fc(x), None, 3, self.lock]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.fc = Odd(), nn.Linear(6, 3)

        def forward(self, x):
            y, nothing, three, lock = self.odd(x)
            assert nothing is None
            assert three == 3
            assert lock is self.odd.lock
            return self.fc(y)

    model, batch = Net(), torch.ones(2, 6)
    trace, expected = record(model, batch)
    held = Resumption(model, batch, trace)
    held.advance(trace.entry([model.fc], []))
    assert torch.equal(held.run(), expected)
