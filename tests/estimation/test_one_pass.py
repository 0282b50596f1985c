"""The sweep against loops over single samples with autograd: models of many kinds, refusals, what is left behind."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mpsearch as mps
from mpsearch.estimation.gradients import head_pass
from mpsearch.models.running import predictions
from mpsearch.sensitivity import (
    DeltaLoss,
    EmpiricalFisher,
    Fisher,
    FisherProjection,
    GaussNewtonTrace,
    GradientImportance,
    HessianAugmented,
    HessianTopEigenvalue,
    KFACDiagonal,
    OutputGradient,
    Taylor,
)

OPTIONS = mps.precisions("w4 w2")
#: Estimators that square or add gradients of single samples, with what they make of them.
BY_SAMPLE = {
    "projection": FisherProjection(1),
    "signed": Taylor(signed=True),
    "norm": EmpiricalFisher(),
    "importance": GradientImportance(),
    "output": OutputGradient(),
}
ALL = (
    *BY_SAMPLE.values(),
    Fisher(),
    GaussNewtonTrace(),
    KFACDiagonal(),
    HessianAugmented(),
)


def error(weight, precision):
    """D: known, without symmetry, twice as large for half the bits."""
    steps = torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape)
    return (torch.cos(1 + 2 * steps) * 0.08 / int(precision.weight)).to(weight.dtype)


def shifted(weight, precision):
    return weight + error(weight, precision)


def profile(model, batches, estimator, loss="cross-entropy", precisions=OPTIONS, **options):
    return mps.profile(model, batches, estimator, precisions, loss=loss, quantizer=shifted, **options)


# ------------------------------------------------------------------------------------------------ models


class Attention(nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x, mask):
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TinyForCausalLM(nn.Module):
    """The name says that labels are shifted. Positions: `row` for each sample, `shared` (T,) or `flat` (1, T)."""

    def __init__(self, tokens=7, width=4, positions="row", tied=False):
        super().__init__()
        self.embed, self.place = nn.Embedding(tokens, width), nn.Embedding(12, width)
        self.attention, self.up = Attention(width), nn.Linear(width, 2 * width)
        self.down, self.head = nn.Linear(2 * width, width), nn.Linear(width, tokens, bias=False)
        self.norm, self.positions = nn.LayerNorm(width), positions
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask=None):
        length = input_ids.shape[1]
        place = torch.arange(length)
        place = {"row": place.expand(input_ids.shape), "flat": place[None], "shared": place}[self.positions]
        x = self.embed(input_ids) + self.place(place)
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, None].bool()
        x = x + self.attention(x, mask)
        return {"logits": self.head(self.norm(x + self.down(F.gelu(self.up(x)))))}


class SequenceFirst(nn.Module):
    """Works on (T, N, C) inside."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.embed(tokens.T)
        return self.head(torch.tanh(self.mix(x).cumsum(0)).mean(0))


class Folded(nn.Module):
    """Works on (N x windows, C) or, with `last`, on (windows x N, C)."""

    def __init__(self, last):
        super().__init__()
        self.first, self.head, self.last = nn.Linear(4, 5), nn.Linear(5, 3), last

    def forward(self, x):
        if self.last:
            y = self.first(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], len(x))).transpose(0, 1)
        else:
            y = self.first(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return self.head(torch.tanh(y).sum(1))


class Twice(nn.Module):
    """One layer called twice, one whose second output is not used."""

    def __init__(self):
        super().__init__()
        self.body, self.side, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = torch.tanh(self.body(x))
        z = self.side(self.body(y))
        self.side(z)
        return self.head(F.relu(z, inplace=True))


class InPlace(nn.Module):
    """Layers of tokens whose outputs, views of a product, are written into."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x):
        y = F.relu(self.second(F.relu(self.first(x), inplace=True)), inplace=True)
        return self.head(y.mean(1))


def hooked():
    """Hooks of the user's own change what goes into a layer and what comes out."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    model[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def cnn(transposed=False):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=4),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(4, 3, 2) if transposed else nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(3, 3),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.bias, 0.0, 1.0)  # rectifiers that let something through
    return model


def text(count, length, labels=True, padded=True):
    ids = torch.randint(0, 7, (count, length))
    mask = torch.ones(count, length, dtype=torch.long)
    if padded:
        mask[0, length - 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if labels:
        batch["labels"] = torch.where(mask.bool(), ids, -100)
        batch["labels"][count - 1, 2] = -100
    return batch


def labelled(*shape, classes=3):
    return torch.randn(shape), torch.randint(0, classes, shape[:1])


def numbered(count, length):
    return torch.randint(0, 7, (count, length)), torch.randint(0, 3, (count,))


MODELS = {
    "convolutions": (cnn, lambda: [labelled(5, 2, 6, 6), labelled(3, 2, 6, 6)]),
    "transposed convolutions": (functools.partial(cnn, transposed=True), lambda: [labelled(5, 2, 6, 6)]),
    "batches of one sample": (cnn, lambda: [labelled(1, 2, 6, 6) for _ in range(3)]),
    "language model": (TinyForCausalLM, lambda: [text(4, 6), text(3, 5)]),
    "language model, as many tokens as samples": (TinyForCausalLM, lambda: [text(5, 5)]),
    "tied embedding": (functools.partial(TinyForCausalLM, tied=True), lambda: [text(4, 6), text(3, 5)]),
    "tied embedding, as many tokens as channels": (
        functools.partial(TinyForCausalLM, 8, 8, tied=True),
        lambda: [text(4, 6)],
    ),
    "shared positions, one sample": (functools.partial(TinyForCausalLM, positions="flat"), lambda: [text(1, 6)]),
    "a layer called twice": (Twice, lambda: [labelled(4, 4), labelled(6, 4)]),
    "sequence first": (SequenceFirst, lambda: [numbered(4, 6), numbered(3, 5)]),
    "sequence first, as many tokens as samples": (SequenceFirst, lambda: [numbered(5, 5), numbered(5, 5)]),
    "sequence first, twice as many tokens": (SequenceFirst, lambda: [numbered(3, 6)]),
    "tokens written into": (InPlace, lambda: [labelled(4, 6, 4), labelled(3, 5, 4)]),
    "hooks of the user": (hooked, lambda: [labelled(4, 4), labelled(3, 4)]),
    "windows in the first dimension": (
        functools.partial(Folded, False),
        lambda: [labelled(4, 6, 4), labelled(4, 4, 4)],
    ),
    "windows before samples": (functools.partial(Folded, True), lambda: [labelled(4, 6, 4), labelled(4, 4, 4)]),
}


def made(name):
    torch.manual_seed(0)
    build, data = MODELS[name]
    return build().eval(), data()


# ------------------------------------------------------------------------------------------------ the truth


def one_of(batch, n):
    if isinstance(batch, dict):
        return {key: value[n : n + 1] for key, value in batch.items()}
    return tuple(value[n : n + 1] for value in batch)


def logits_of(model, batch):
    output = model(**{k: v for k, v in batch.items() if k != "labels"}) if isinstance(batch, dict) else model(batch[0])
    return output["logits"] if isinstance(output, dict) else output


def decided(model, batches):
    """Weights of the decisions, one name each."""
    found = {}
    for layer in mps.layers(model, batches[0]):
        found.setdefault(model.get_submodule(layer.name).weight, layer.name)
    return {name: weight for weight, name in found.items()}


def canonical_error(model, name, precision):
    weight = model.get_submodule(name).weight.detach()
    if isinstance(model.get_submodule(name), nn.ConvTranspose2d):  # the quantizer sees outputs first
        return error(weight.transpose(0, 1), precision).transpose(0, 1)
    return error(weight, precision)


def loop(model, batches):
    """(samples) gradients of each weight, by one backward pass for each sample, and the number of predictions."""
    weights = decided(model, batches)
    found, count = [], 0
    for batch in batches:
        for n in range(len(batch["input_ids"] if isinstance(batch, dict) else batch[0])):
            alone = one_of(batch, n)
            logits, labels, _ = predictions(model, logits_of(model, alone), alone)
            if not len(labels):
                continue
            count += len(labels)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            found.append(
                [torch.zeros_like(w) if g is None else g for w, g in zip(weights.values(), grads, strict=True)]
            )
    return weights, [torch.stack(rows).double() for rows in zip(*found, strict=True)], count


def expected(model, batches, what):
    weights, gradients, count = loop(model, batches)
    out = np.zeros((len(weights), len(OPTIONS)))
    for row, ((name, weight), g) in enumerate(zip(weights.items(), gradients, strict=True)):
        for column, precision in enumerate(OPTIONS):
            change, weight = canonical_error(model, name, precision).double(), weight.detach().double()
            projected = (g * change).flatten(1).sum(1)
            out[row, column] = {
                "projection": lambda p=projected: 0.5 * p.square().sum() / count,
                "signed": lambda p=projected: p.sum() / count,
                "norm": lambda g=g, d=change: 0.5 * g.square().sum() / count * d.square().mean(),
                "importance": lambda g=g, w=weight, d=change: (
                    (g * w).abs().sum() / count * d.square().sum() / w.square().sum()
                ),
            }[what]()
    return out


def scores(table):
    """(units, P): layers of a group added up, in order of their first members."""
    found = {}
    for layer, values in zip(table.layers, table.sensitivity, strict=True):
        key = layer.group or layer.name
        found[key] = found.get(key, 0) + values
    return np.array(list(found.values()))


@pytest.mark.parametrize("name", MODELS)
def test_a_loop_over_samples(name):
    model, batches = made(name)
    wanted = ("projection", "signed", "norm", "importance")
    tables = profile(model, batches, [BY_SAMPLE[what] for what in wanted])
    for what, table in zip(wanted, tables, strict=True):
        truth = expected(model, batches, what)
        assert (truth != 0).all()
        np.testing.assert_allclose(scores(table), truth, rtol=2e-4, atol=1e-9, err_msg=what)


def exact(model, batches, column=0):
    """1/2 D^T F D of each weight, with labels enumerated: u = change of the logits along D, E_p[u^2] - E_p[u]^2 a prediction."""
    found = []
    for name, weight in decided(model, batches).items():
        change, total, count = canonical_error(model, name, OPTIONS[column]), 0.0, 0
        for batch in batches:

            def run(w, batch=batch, name=name):
                def swapped(*args, **keywords):
                    return functional_call(model, {f"{name}.weight": w}, args, keywords)

                return predictions(model, logits_of(swapped, batch), batch)[0]

            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # fused kernels have no jvp
                logits, u = (z.detach().double() for z in jvp(run, (weight.detach(),), (change,)))
            p = logits.softmax(-1)
            total += 0.5 * float(((p * u.square()).sum(-1) - (p * u).sum(-1).square()).sum())
            count += len(logits)
        found.append(total / count)
    return np.array(found)


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("name", ["language model", "sequence first, as many tokens as samples", "convolutions"])
def test_random_outputs_have_the_fisher_information(name):
    model, batches = made(name)
    if isinstance(batches[0], dict):
        batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    truth = exact(model, batches)
    for table in profile(model, batches, [FisherProjection(300), HessianAugmented(300)], loss="kl"):
        assert (abs(table.sensitivity[:, 0] - truth) < 4 * table.sensitivity_se[:, 0]).all()
        np.testing.assert_allclose(table.sensitivity[:, 0], truth, rtol=0.25)


@pytest.mark.parametrize(("positions", "count", "length"), [("shared", 4, 6), ("flat", 4, 6), ("flat", 5, 5)])
def test_positions_that_all_samples_share(positions, count, length):
    """One output for the whole batch: unbiased over random outputs; no gradients of samples for given labels."""
    torch.manual_seed(0)
    model = TinyForCausalLM(positions=positions).eval()
    batches = [text(count, length, labels=False) for _ in range(30)]
    truth = exact(model, batches)
    table = profile(model, batches, FisherProjection(20), loss="kl")
    assert (abs(table.sensitivity[:, 0] - truth) < 4 * table.sensitivity_se[:, 0]).all()
    np.testing.assert_allclose(table.sensitivity[:, 0], truth, rtol=0.25)
    given = [text(count, length)]
    for estimator, loss in (
        (FisherProjection(), "cross-entropy"),
        (EmpiricalFisher(), "kl"),
        (OutputGradient(), "cross-entropy"),
        (GradientImportance(), "kl"),
    ):
        with pytest.raises(mps.EstimatorError, match=r"'place' has an input of shape .* batches of one sample"):
            profile(model, given, estimator, loss=loss)


def test_an_own_loss_where_the_samples_cannot_be_told():
    model, batches = made("sequence first, as many tokens as samples")

    def own(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(mps.EstimatorError, match="cannot be told which rows"):
        profile(model, batches, FisherProjection(), loss=own)
    ones = [one_of(batch, n) for batch in batches for n in range(5)]
    by_name = profile(model, ones, FisherProjection(1)).sensitivity
    np.testing.assert_allclose(profile(model, ones, FisherProjection(1), loss=own).sensitivity, by_name, rtol=1e-5)


def test_telling_samples_from_tokens_is_one_pass_over_one_batch():
    model, batches = made("sequence first, as many tokens as samples")
    assert profile(model, batches, FisherProjection(1)).origin["passes"] == {"forward": 1.0, "backward": 1.5}
    model, batches = made("language model")
    assert profile(model, batches, FisherProjection(1)).origin["passes"] == {"forward": 1.0, "backward": 1.0}


def test_standard_errors_are_those_of_a_ratio():
    """Samples have unequal numbers of predictions (Cochran 1977, section 6.3)."""
    model, batches = made("language model")
    table = profile(model, batches, FisherProjection(1))
    weights, gradients, count = loop(model, batches)
    predicted = []
    for batch in batches:
        labels = batch["labels"][:, 1:]
        kept = (labels != -100) & batch["attention_mask"][:, :-1].bool()
        predicted += kept.sum(1).tolist()
    c = np.array(predicted)
    assert len(set(c)) > 1
    assert c.sum() == count
    for row, (name, g) in enumerate(zip(weights, gradients, strict=True)):
        s = 0.5 * (g * canonical_error(model, name, OPTIONS[0]).double()).flatten(1).sum(1).square().numpy()
        rest = s - s.sum() / c.sum() * c
        se = np.sqrt(len(c) / (len(c) - 1) * (rest**2).sum()) / c.sum()
        assert table.sensitivity_se[row, 0] == pytest.approx(se, rel=1e-3)


# ------------------------------------------------------------------------------------------------ what is refused


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w / w.flatten(1).norm(dim=1)[:, None, None, None], self.bias)


class Borrowed(nn.Module):
    """A weight used by a function besides its layer, or held by another module under another name."""

    class Holder(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.table = weight

        def forward(self, x):
            return F.linear(x, self.table)

    def __init__(self, held):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.again = self.Holder(self.body.weight) if held else lambda x: F.linear(x, self.body.weight)

    def forward(self, x):
        return self.head(self.again(torch.tanh(self.body(x))))


@pytest.mark.parametrize("estimator", ALL, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_weight_that_does_more_than_its_layer_shows(estimator, weighted):
    torch.manual_seed(0)
    if weighted and "token_weights" not in {field.name for field in dataclasses.fields(estimator)}:
        pytest.skip("no token weights")
    if weighted:
        estimator = type(estimator)(token_weights=lambda model, batch: torch.ones(4))
    loss = "cross-entropy" if isinstance(estimator, FisherProjection) else "kl"
    pooled = nn.Sequential(Standardized(2, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(mps.EstimatorError, match=r"layer '0' is .* outside the layer's own forward, or changed there"):
        profile(pooled, [labelled(4, 2, 5, 5)], estimator, loss=loss)
    for held in (False, True):  # what functions read of it is seen
        assert np.isfinite(profile(Borrowed(held), [labelled(4, 4)], estimator, loss=loss).sensitivity).all()


class Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return None


class Behind(nn.Module):
    """A layer behind which something happens."""

    def __init__(self, then, first=None):
        super().__init__()
        self.first, self.head, self.then = first or nn.Linear(4, 4), nn.Linear(4, 3), then

    def forward(self, x):
        return self.head(self.then(self.first(x)))


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def without_gradients(x):
    torch.set_grad_enabled(False)
    return x


@pytest.mark.parametrize("estimator", ALL, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Behind(Undifferentiable.apply), r"no gradient comes back to a Linear of shape \(4, 4\)"),
        (lambda: Behind(without_gradients), "layer 'head' runs without gradients"),
        (lambda: Behind(lambda both: both[0], Pair(4, 4)), "layer 'first' returns a tuple, expected a tensor"),
    ],
    ids=["undifferentiable", "no_grad", "pair"],
)
def test_what_gradients_cannot_see(estimator, model, words):
    torch.manual_seed(0)
    enabled = torch.is_grad_enabled()
    try:
        with pytest.raises(mps.EstimatorError, match=words):
            profile(model(), [labelled(4, 4)], estimator)
    finally:
        torch.set_grad_enabled(enabled)


@pytest.mark.parametrize("estimator", ALL, ids=lambda one: type(one).__name__)
def test_checkpoints_of_activations_change_nothing(estimator):
    class Again(Behind):
        def forward(self, x):
            return self.head(checkpoint(lambda y: torch.tanh(self.first(y)), x, use_reentrant=False))

    tables = []
    for make in (Behind, Again):
        torch.manual_seed(0)
        tables.append(profile(make(torch.tanh), [labelled(4, 4), labelled(3, 4)], estimator).sensitivity)
    assert (tables[0] == tables[1]).all()


def test_gradients_that_cancel_over_the_batch_are_no_reason_to_refuse():
    """Each sample twice, with the labels of either class: at w = 0 their gradients add up to rounding errors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    nn.init.zeros_(model[2].bias)
    nn.init.constant_(model[2].weight, 0.3)
    x = torch.randn(50, 4)
    batch = (torch.cat([x, x.flip(0)]), torch.cat([torch.zeros(50), torch.ones(50)]).long())
    assert (profile(model, [batch], EmpiricalFisher()).sensitivity > 0).any()


def test_missing_labels():
    model = nn.Sequential(nn.Linear(4, 3))
    for estimator in (Taylor(), EmpiricalFisher()):
        with pytest.raises(mps.EstimatorError, match="needs labels"):
            profile(model, [torch.randn(4, 4)], estimator, loss="kl")


def test_estimators_of_the_softmax_take_no_own_loss():
    for estimator in (Fisher(), GaussNewtonTrace()):
        with pytest.raises(mps.EstimatorError, match="own loss"):
            profile(nn.Sequential(nn.Linear(4, 3)), [torch.randn(4, 4)], estimator, loss=lambda m, b: m(b).sum())


class Burst(torch.autograd.Function):
    """The identity, whose gradient is infinite for inputs above 5."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.where(ctx.saved_tensors[0] > 5, torch.inf, g)


class Bursting(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(Burst.apply(self.body(x))))


@pytest.mark.parametrize("estimator", [*ALL, DeltaLoss()], ids=lambda one: type(one).__name__)
def test_gradients_that_are_not_finite_name_layer_and_batch(estimator):
    torch.manual_seed(0)
    model = Bursting()
    calm, wild = labelled(4, 4), labelled(4, 4)
    wild[0][2] *= 1000
    with pytest.raises(mps.EstimatorError, match=r"layer 'body'.* (inf|nan|-inf).*batch 1"):
        profile(model, [calm, wild], estimator, loss="cross-entropy")


def test_outputs_that_are_not_finite_name_the_batch():
    model = nn.Sequential(nn.Linear(4, 3))
    batches = [labelled(4, 4), (torch.full((2, 4), torch.inf), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(mps.EstimatorError, match="not finite in batch 1"):
        profile(model, batches, Fisher())


# ------------------------------------------------------------------------------------------------ weights of tokens


class PerToken(nn.Module):
    """No token sees another."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


WEIGHTED = (FisherProjection, Fisher, OutputGradient, HessianAugmented, GradientImportance, EmpiricalFisher, Taylor)


@pytest.mark.parametrize("kind", [*WEIGHTED, KFACDiagonal], ids=lambda kind: kind.__name__)
def test_equal_weights_of_tokens_change_nothing(kind):
    model, batches = made("language model")
    even = kind(token_weights=lambda model, batch: torch.ones(batch["input_ids"].shape))
    loss = "kl" if kind in (Fisher, HessianAugmented) else "cross-entropy"
    np.testing.assert_array_equal(
        profile(model, batches, even, loss).sensitivity, profile(model, batches, kind(), loss).sensitivity
    )


@pytest.mark.parametrize("kind", WEIGHTED, ids=lambda kind: kind.__name__)
def test_a_token_without_weight_is_left_out(kind):
    torch.manual_seed(0)
    model, x, labels = PerToken(), torch.randn(6, 5, 4), torch.randint(0, 3, (6, 5))
    keep = torch.ones(6, 5)
    keep[:, 2] = 0
    found = profile(model, [(x, labels)], kind(token_weights=lambda model, batch: keep), "cross-entropy")
    if kind is Fisher:  # labels are drawn: they differ where tokens are missing
        assert (found.sensitivity < profile(model, [(x, labels)], kind()).sensitivity).all()
        return
    left_out = torch.where(keep.bool(), labels, -100)
    truth = profile(model, [(x, left_out)], kind(), "cross-entropy")
    np.testing.assert_allclose(found.sensitivity * 30, truth.sensitivity * 24, rtol=1e-5)


@pytest.mark.parametrize("kind", [FisherProjection, Taylor])
def test_weights_of_tokens_against_a_loop(kind):
    """Signals that square take the root, so that a weight of 2 is a token twice in expectation."""
    torch.manual_seed(0)
    model, x, labels = PerToken(), torch.randn(6, 5, 4), torch.randint(0, 3, (6, 5))
    importance = torch.rand(6, 5) + 0.5
    settings = {"signed": True} if kind is Taylor else {"draws": 1}
    found = profile(model, [(x, labels)], kind(token_weights=lambda model, batch: importance, **settings))
    for row, weight in enumerate(decided(model, [(x, labels)]).values()):
        total = 0.0
        for n in range(6):
            losses = F.cross_entropy(model(x[n]), labels[n], reduction="none")
            scale = importance[n] if kind is Taylor else importance[n].sqrt()
            (g,) = torch.autograd.grad((losses * scale).sum(), weight)
            projected = float((g * error(weight.detach(), OPTIONS[0])).sum())
            total += projected if kind is Taylor else 0.5 * projected**2
        assert found.sensitivity[row, 0] == pytest.approx(total / 30, rel=1e-4)


def test_weights_of_tokens_may_run_the_model():
    """As attention weights do (RSQ)."""
    model, batches = made("a layer called twice")

    def confidence(model, batch):
        return model(batch[0]).softmax(-1).amax(1)

    found = profile(model, batches, FisherProjection(1, token_weights=confidence))
    with torch.no_grad():
        known = {id(batch[0]): confidence(model, batch) for batch in batches}
    truth = profile(model, batches, FisherProjection(1, token_weights=lambda model, batch: known[id(batch[0])]))
    np.testing.assert_array_equal(found.sensitivity, truth.sensitivity)
    assert (found.sensitivity > 0).all()


def test_weights_of_tokens_that_do_not_fit():
    model, batches = made("language model")
    wrong = FisherProjection(token_weights=lambda model, batch: torch.ones(2, 3))
    with pytest.raises(mps.EstimatorError, match=r"weights of tokens have shape \(2, 3\), the output of layer"):
        profile(model, batches, wrong)


# ------------------------------------------------------------------------------------------------ runs


def test_one_run_for_several_estimators():
    model, batches = made("convolutions")
    family = (*ALL, FisherProjection(1, seed=5))
    together = profile(model, batches, family)
    for one, table in zip(family, together, strict=True):
        alone = profile(model, batches, one)
        np.testing.assert_array_equal(table.sensitivity, alone.sensitivity)
        np.testing.assert_array_equal(table.sensitivity_se, alone.sensitivity_se)
    # the labels: 1; drawn with seed 0: 1 (Fisher); random outputs: 2
    assert together[0].origin["passes"] == {"forward": 1.0, "backward": 4.0}
    assert together[0].origin["shared_with"] == len(family) - 1


@pytest.mark.parametrize("estimator", [*ALL, DeltaLoss(), HessianTopEigenvalue(3)], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("options", ["w4 w2", "w4a8 w2", "w8 w7 w6 w5 w4 w3 w2"])
def test_the_forecast_of_passes(estimator, options):
    if "a" in options and isinstance(estimator, HessianTopEigenvalue):
        pytest.skip("weights only")
    model, batches = made("convolutions")
    options = mps.precisions(options)
    table = profile(model, batches, estimator, "kl", options)
    decisions = len({layer.group or layer.name for layer in table.layers})
    used, forecast = table.origin["passes"], estimator.cost(len(batches), decisions, len(options))
    assert used["forward"] <= forecast.forward
    assert used["backward"] <= forecast.backward
    if not isinstance(estimator, HessianTopEigenvalue):
        assert used["backward"] == forecast.backward
    if not isinstance(estimator, DeltaLoss):
        assert forecast == estimator.cost(len(batches), decisions, 1)  # whatever the number of precisions


@pytest.mark.parametrize("estimator", [FisherProjection(), Fisher(), GaussNewtonTrace(), KFACDiagonal()])
def test_seeds(estimator):
    model, batches = made("language model")
    first, second = (profile(model, batches, estimator, "kl") for _ in range(2))
    np.testing.assert_array_equal(first.sensitivity, second.sensitivity)
    np.testing.assert_array_equal(first.sensitivity_se, second.sensitivity_se)
    other = profile(model, batches, type(estimator)(seed=1), "kl")
    assert (first.sensitivity != other.sensitivity).any()


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    torch.manual_seed(0)
    model, batches = cnn().train(), [labelled(5, 2, 6, 6), labelled(3, 2, 6, 6)]
    model[0].weight.requires_grad_(False)
    model[3].weight.grad = torch.randn_like(model[3].weight)
    model[10].bias.grad = torch.randn_like(model[10].bias)
    before = [
        (p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()
    ]
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    if fails:
        batches.append((torch.full((2, 2, 6, 6), torch.nan), torch.zeros(2, dtype=torch.long)))
    for estimator in (*ALL, DeltaLoss(), HessianTopEigenvalue(3)):
        if fails:
            with pytest.raises(mps.EstimatorError):
                profile(model, batches, estimator)
        else:
            profile(model, batches, estimator)
    for p, (value, flag, grad) in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.requires_grad is flag
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
    assert all(torch.equal(b, value) for b, value in zip(model.buffers(), buffers, strict=True))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_weights_are_scored():
    model, batches = made("convolutions")
    free = profile(model, batches, FisherProjection()).sensitivity
    model.requires_grad_(False)
    np.testing.assert_array_equal(profile(model, batches, FisherProjection()).sensitivity, free)


def test_a_layer_whose_output_is_not_used():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            self.idle(x)
            return self.head(torch.tanh(self.body(x)))

    torch.manual_seed(0)
    model = Idle()
    for table in profile(model, [labelled(4, 4), labelled(4, 4)], [*ALL, HessianTopEigenvalue(), DeltaLoss()]):
        assert (table.sensitivity[1] == 0).all()
        assert (table.sensitivity[[0, 2]] > 0).all() or "signed=True" in table.origin["estimator"]


def test_excluded_layers_need_no_gradient_and_change_nothing():
    model, batches = made("convolutions")
    whole = profile(model, batches, FisherProjection()).sensitivity
    part = profile(model, batches, FisherProjection(), exclude=["0", "10"]).sensitivity
    np.testing.assert_allclose(part, whole[1:-1], rtol=1e-5)


def test_a_group_is_perturbed_at_once():
    """Its first-order changes are added before they are squared."""
    model, batches = made("convolutions")
    table = profile(model, batches, [FisherProjection(), Fisher()], groups={"both": ["0", "3"]})
    weights, gradients, count = loop(model, batches)
    both = sum(
        (g * canonical_error(model, name, OPTIONS[0]).double()).flatten(1).sum(1)
        for name, g in list(zip(weights, gradients, strict=True))[:2]
    )
    assert scores(table[0])[0, 0] == pytest.approx(float(0.5 * both.square().sum() / count), rel=1e-4)
    apart = profile(model, batches, Fisher()).sensitivity
    np.testing.assert_allclose(scores(table[1])[0], apart[0] + apart[1], rtol=1e-6)


def test_half_precision():
    """bfloat16 rounds activations by 2^-9 each; sums of it must not drift further."""
    model, batches = made("convolutions")
    truth = [table.sensitivity for table in profile(model, batches, ALL)]
    half = [(x.bfloat16(), y) for x, y in batches]
    for one, high, table in zip(ALL, truth, profile(model.bfloat16(), half, ALL), strict=True):
        if isinstance(one, Taylor | Fisher | GaussNewtonTrace):  # cancels; other labels are drawn
            assert np.isfinite(table.sensitivity).all()
        else:
            np.testing.assert_allclose(table.sensitivity, high, rtol=0.25, atol=0.1 * high.max(), err_msg=str(one))


class _Stop(Exception):
    pass


@pytest.mark.parametrize("options", ["w4 w2", "w4a8 w2"])
def test_a_run_goes_on_where_it_stopped(tmp_path, monkeypatch, options):
    """The model fails at the third batch; the second run takes up there and gives the same bits."""
    torch.manual_seed(0)
    model, batches = cnn().eval(), [labelled(3, 2, 6, 6) for _ in range(4)]
    family = [one for one in ALL if not isinstance(one, Fisher | GaussNewtonTrace)]

    def own(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    def broken(context, batch, number):
        if number == 2:
            raise _Stop
        return forward(context, batch, number)

    forward = head_pass.predicted  # type: ignore[attr-defined]
    options = mps.precisions(options)
    whole = profile(model, batches, family, own, options)
    with monkeypatch.context() as patch:
        patch.setattr(head_pass, "predicted", broken)
        with pytest.raises(_Stop):
            profile(model, batches, family, own, options, checkpoint=tmp_path / "run.db")
    resumed = profile(model, batches, family, own, options, checkpoint=tmp_path / "run.db")
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one.sensitivity, other.sensitivity)
        np.testing.assert_array_equal(one.sensitivity_se, other.sensitivity_se)
        assert (one.interactions is None) == (other.interactions is None)
        if one.interactions is not None:
            np.testing.assert_array_equal(one.interactions.value, other.interactions.value)
    assert (
        resumed[0].origin["passes"]["backward"] == whole[0].origin["passes"]["backward"]
    )  # input ranges are looked at again
    assert resumed[0].origin["passes_in_this_run"]["backward"] == whole[0].origin["passes"]["backward"] / 2
