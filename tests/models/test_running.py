"""How a model is run, and that it comes back as it was."""

import collections
import itertools
import math
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.models.running import call, check_values, predictions, preserved
from mpsearch.sensitivity import EmpiricalFisher, Fisher, FisherProjection, KLDivergence, OutputMSE

OPTIONS = mps.precisions("w2 w4a8 w16")
RUNS = itertools.count()


class Two(nn.Module):
    """Two layers; subclasses change what happens around them."""

    def __init__(self, outputs=3):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, outputs)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class Remembers(Two):
    """Writes into its buffers, dicts and attributes, and hooks itself, as models of transformers do that capture outputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", None)
        self.register_buffer("total", torch.zeros(6))
        self.runs, self.seen = 0, {}

    def forward(self, x):
        if "hooked" not in vars(self):
            self.hooked = True
            self.a.register_forward_hook(lambda *_: None)
        self.steps = self.steps + 1  # type: ignore[has-type]
        self.last = x
        self.total += x.sum(0)
        self.runs += 1
        self.seen[self.runs] = x
        return super().forward(x)


def data(count=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 6, generator=generator) for _ in range(count)]


def state(model):
    """All that a caller could notice, as values."""
    return {
        name: (
            {key: value for key, value in vars(module).items() if not isinstance(value, dict)},
            {key: list(value.items()) for key, value in vars(module).items() if isinstance(value, dict)},
            {key: None if value is None else value.clone() for key, value in module._buffers.items()},
        )
        for name, module in model.named_modules()
    }


def assert_same(before, after):
    for name, (attributes, contents, buffers) in before.items():
        now_attributes, now_contents, now_buffers = after[name]
        assert attributes == now_attributes, name
        assert contents.keys() == now_contents.keys(), name
        for key, items in contents.items():
            assert [k for k, _ in items] == [k for k, _ in now_contents[key]], (name, key)
            assert all(x is y for (_, x), (_, y) in zip(items, now_contents[key], strict=True)), (name, key)
        for key, value in buffers.items():
            assert now_buffers[key] is value is None or torch.equal(now_buffers[key], value), (name, key)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_what_the_model_writes_is_taken_back(error):
    model = Remembers()
    before = state(model)

    def quantizer(weight, precision):
        if error is not None:
            raise error("stop")
        return weight + 0.1

    try:
        mps.profile(model, data(), KLDivergence(), OPTIONS, quantizer=quantizer, progress=False)
    except (ValueError, KeyboardInterrupt):
        assert error is not None
    assert_same(before, state(model))


def test_ordered_contents_come_back_in_order():
    model = Two()
    model.order = collections.OrderedDict(a=1, b=2)
    with preserved(model):
        model.order.move_to_end("a")
        model.order["c"] = 3
    assert list(model.order) == ["a", "b"]


@pytest.mark.parametrize("whole", [True, False], ids=["wrapped", "in place"])
def test_compiled_models_run_as_they_are_written(whole):
    """Nothing is compiled, and the scores are those of the model itself."""
    compiled = 0

    def backend(graph, _):
        nonlocal compiled
        compiled += 1
        return graph.forward

    model, plain = Two(), Two()
    if whole:
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    tables = [
        mps.profile(one, data(), FisherProjection(), OPTIONS, progress=False).sensitivity for one in (model, plain)
    ]
    assert compiled == 0
    assert (tables[0] == tables[1]).all()
    model(data()[0])
    assert compiled  # afterwards it is a compiled model again


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 3, device="meta")), "'1.weight' is on the meta device"),
        (nn.Sequential(nn.LazyLinear(3)), "'0.weight' has no shape yet: run the model once"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_parameters_without_values_are_refused(model, words):
    for door in (
        lambda: check_values(model),
        lambda: mps.layers(model, data()[0]),
        lambda: mps.profile(model, data(), KLDivergence(), OPTIONS),
        lambda: mps.evaluate(model, data(), mps.Plan({"0": OPTIONS[0]})),
    ):
        with pytest.raises(mps.EstimatorError, match=words):
            door()


def test_an_exported_program_is_refused():
    program = torch.export.export(Two(), (data()[0],)).module()
    with pytest.raises(mps.EstimatorError, match="has no evaluation mode"):
        mps.layers(program, data()[0])


class Ends(Two):
    """Ends in a function of the logits."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, x):
        return self.end(super().forward(x))


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (lambda y: y.argmax(-1), r"returned torch.int64, expected floating-point numbers"),
        (lambda y: y.mean(), "returned a single number, expected an output for each sample"),
        (lambda y: y[:, :1], "gives one number a prediction"),
        (lambda y: y[:, 0], "gives one number a prediction"),
        (
            lambda y: y[: 2 + next(RUNS) % 2],
            r"return \([23], 3\) and \([23], 3\): the model is random",
        ),
    ],
    ids=["classes", "loss", "regression", "scalar", "random"],
)
@pytest.mark.parametrize("estimator", [KLDivergence(), Fisher()])
def test_outputs_that_cannot_be_scored_are_one_clear_line(end, words, estimator):
    asked = {}
    if (
        isinstance(estimator, Fisher) and "one number" in words
    ):  # which takes the metric that fits, unless it is asked for the KL
        asked, words = {"metric": "kl"}, "one output .* so its KL is always 0"
    torch.manual_seed(0)
    with pytest.raises(mps.EstimatorError, match=words) as caught:
        mps.profile(Ends(end), data(), estimator, OPTIONS, progress=False, **asked)
    assert "\n" not in str(caught.value)


def test_one_number_a_prediction_is_measured_by_what_it_is():
    """Regression: the mean square by hand, a loss of one's own, and no KL."""
    model = Two(outputs=1)
    x, y = data()
    batches = [(x, y[:, :1])]
    plan = mps.Plan({"b": OPTIONS[0]})
    table = mps.profile(model, batches, OutputMSE(), OPTIONS, progress=False)
    assert (table.sensitivity[:, 0] > 0).all()

    def loss(m, batch):
        return F.mse_loss(m(batch[0]), batch[1])

    assert (
        mps.profile(model, batches, EmpiricalFisher(), OPTIONS, loss=loss, progress=False).sensitivity[:, 0] > 0
    ).all()
    found = mps.evaluate(model, batches, plan, loss=loss, progress=False)
    assert found.kl != found.kl
    assert found.loss != found.reference.loss
    assert found.reference.loss == pytest.approx(float(loss(model, batches[0]).detach()))


def test_a_failing_model_is_one_line():
    class Fails(Two):
        def forward(self, x):
            raise ValueError("first\nsecond")

    with pytest.raises(mps.EstimatorError, match=r"shape \(5, 6\): ValueError: first$"):
        call(Fails(), data()[0])


class Translator(nn.Module):
    """An encoder and a decoder whose tokens come from the labels, one place later."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def prepare_decoder_input_ids_from_labels(self, labels):
        return labels.roll(1, -1)

    def forward(self, input_ids, decoder_input_ids, attention_mask=None, decoder_attention_mask=None):
        return self.head(self.table(decoder_input_ids) + self.table(input_ids).mean(1, keepdim=True))


def test_a_decoder_is_given_the_labels_one_place_later():
    model, source, labels = Translator(), torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6]])
    given = {"input_ids": source, "decoder_input_ids": torch.tensor([[6, 4, 5]])}
    assert torch.equal(call(model, {"input_ids": source, "labels": labels}), call(model, given))


def test_predictions_of_a_decoder_count_by_its_own_mask():
    model, logits = Translator(), torch.zeros(1, 3, 9)
    mask = torch.tensor([[1, 0, 0]])
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "decoder_input_ids": torch.tensor([[4, 5, 6]])}
    assert len(predictions(model, logits, {**batch, "attention_mask": mask})[0]) == 3
    assert len(predictions(model, logits, {**batch, "decoder_attention_mask": mask})[0]) == 1


def quantized_by_torchao(layer):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())


def made_in_inference_mode(layer):
    with torch.inference_mode():
        layer.weight = nn.Parameter(torch.randn(32, 32), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (quantized_by_torchao, "'0.weight' is a Int8Tensor, quantized or spread over devices already"),
        (made_in_inference_mode, "'0.weight' was made inside torch.inference_mode"),
        (lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.to_sparse())), "stored as torch.sparse_coo"),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.to_sparse_csr())),
            "stored as torch.sparse_csr",
        ),
        (lambda layer: layer.weight.data.fill_(math.nan), "'0.weight' holds 1024 nan"),
        (lambda layer: layer.bias.data[:2].fill_(math.inf), "'0.bias' holds 2 infinity"),
    ],
)
@pytest.mark.parametrize("door", ["profile", "fisher", "evaluate", "search"])
def test_weights_that_cannot_be_rounded_are_named_and_the_model_is_left_as_it_was(change, words, door):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3)).train()
    change(model[0])
    before = dict(model.named_parameters())
    batches = [torch.randn(8, 32)] * 3
    options = mps.precisions("w4 w8")
    doors = {
        "profile": lambda: mps.profile(model, batches, KLDivergence(), options, progress=False),
        "fisher": lambda: mps.profile(model, batches, Fisher(), options, progress=False),
        "evaluate": lambda: mps.evaluate(model, batches, mps.Plan({"0": mps.Precision("4")}), progress=False),
        "search": lambda: mps.search(model, batches, mps.Budget(average_bits=4), options, progress=False),
    }
    with pytest.raises(mps.EstimatorError, match=re.escape(words)):
        doors[door]()
    assert model.training
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("estimator", [mps.sensitivity.Fisher(), mps.sensitivity.KLDivergence()])
def test_inference_mode_around_a_door_changes_nothing(estimator):
    model, options = nn.Sequential(nn.Linear(4, 3)), mps.precisions("w4")
    expected = mps.profile(model, [torch.ones(2, 4)], estimator, options, progress=False).sensitivity
    with torch.inference_mode():
        batches = [torch.ones(2, 4)]
        assert (mps.profile(model, batches, estimator, options, progress=False).sensitivity == expected).all()
    assert (mps.profile(model, batches, estimator, options, progress=False).sensitivity == expected).all()


def test_a_sparse_buffer_is_no_hindrance():
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_buffer("adjacency", torch.eye(3).to_sparse())
    table = mps.profile(model, [torch.ones(2, 4)], mps.sensitivity.Fisher(), mps.precisions("w4"), progress=False)
    assert np.isfinite(table.sensitivity).all()


def test_a_loss_that_fails_is_told_in_a_line():
    def loss(model, batch):
        raise ValueError("two\nlines")

    with pytest.raises(
        mps.EstimatorError, match=r"the loss fails, expected loss\(model, batch\).* ValueError: two lines"
    ):
        mps.profile(
            nn.Sequential(nn.Linear(4, 3)),
            [torch.ones(2, 4)],
            mps.sensitivity.HessianTrace(),
            mps.precisions("w4"),
            loss=loss,
        )
