"""The door `profile`: what it checks, what it adds, and the model as it was."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.estimation.estimator import Estimate
from mpsearch.sensitivity import ESTIMATORS, HessianTrace, KLDivergence


class Net(nn.Module):
    """Convolution, batch norm, dropout, depthwise convolution, linear."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 4, 3, groups=4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(self.drop(self.deep(x).mean((2, 3))))


def net():
    torch.manual_seed(0)
    return Net()


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 1, 5, 5, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])) for _ in range(count)]


OPTIONS = mps.precisions("w2 w4a8 w16")


def everything(model):
    """All that a caller could notice."""
    return {
        "parameters": [(name, p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        "storage": [p.data_ptr() for p in model.parameters()],
        "buffers": [(name, b.clone()) for name, b in model.named_buffers()],
        "training": [(name, m.training) for name, m in model.named_modules()],
        "attributes": [(name, sorted(vars(m))) for name, m in model.named_modules()],
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in model.named_modules()
        ],
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),  # noqa: NPY002
    }


def assert_same(before, after):
    for key in ("storage", "training", "attributes", "hooks"):
        assert before[key] == after[key], key
    for (name, value, grad_flag, grad), (_, other, other_flag, other_grad) in zip(
        before["parameters"], after["parameters"], strict=True
    ):
        assert torch.equal(value.view(torch.int32), other.view(torch.int32)), name
        assert grad_flag == other_flag, name
        assert grad is other_grad, name
    for (name, value), (_, other) in zip(before["buffers"], after["buffers"], strict=True):
        assert torch.equal(value, other), name
    assert before["random"][0] == after["random"][0]
    assert before["random"][1] == after["random"][1]
    assert torch.equal(before["random"][2], after["random"][2])


def marked():
    """A model in a state of its own: mixed flags, a gradient, a hook."""
    model = net()
    model.train()
    model.norm.eval()
    model.fc.weight.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.fc.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_model_comes_back_as_it_was(name):
    model = marked()
    before = everything(model)
    try:
        mps.profile(model, batches(), ESTIMATORS[name](), OPTIONS)
    except mps.EstimatorError as error:  # some need settings of their own: they must restore it too
        assert "\n" not in str(error)  # noqa: PT017
    assert_same(before, everything(model))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("estimator", [HessianTrace(2), KLDivergence()])
@pytest.mark.parametrize("call", [1, 4, 9])
def test_also_after_an_exception_or_an_interrupt(monkeypatch, error, estimator, call):
    model = marked()
    before = everything(model)
    count = 0

    def quantizer(weight, precision):
        nonlocal count
        count += 1
        if count >= call:
            raise error("stop")
        torch.rand(3)
        return weight + 0.1

    with pytest.raises(error):
        mps.profile(model, batches(), estimator, mps.precisions("w2 w4a8 w8"), quantizer=quantizer)
    assert_same(before, everything(model))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_evaluate_restores_it_too(error):
    model = marked()
    before = everything(model)
    plan = mps.Plan({"conv": mps.Precision("2", "4"), "fc": mps.Precision("3")})
    mps.evaluate(model, batches(), plan)
    assert_same(before, everything(model))
    seen = []

    def metric(m, batch):
        seen.append(m.conv.weight.clone())
        if len(seen) == 2:
            raise error("stop")
        return 0.0

    with pytest.raises(mps.EstimatorError if error is ValueError else error, match="stop"):
        mps.evaluate(model, batches(), plan, metric=metric)
    assert not torch.equal(*seen)  # it was quantized at that moment
    assert_same(before, everything(model))


def test_an_estimator_that_changes_the_model_is_caught():
    class Vandal:
        def estimate(self, context):
            with torch.no_grad():
                context.model.fc.bias.add_(1)
            return Estimate(np.zeros((3, 3)))

    with pytest.raises(mps.EstimatorError, match="changed the model's parameters"):
        mps.profile(net(), batches(), Vandal(), OPTIONS)


def test_what_an_estimator_writes_beside_the_parameters_is_taken_back():
    class Scribbler:
        def estimate(self, context):
            context.model.fc.note = 1
            context.model.norm.momentum = None
            context.model.conv.register_forward_hook(lambda *_: None)
            return Estimate(np.zeros((3, 3)), unit="relative")

    model = marked()
    before = everything(model)
    mps.profile(model, batches(), Scribbler(), OPTIONS)
    assert_same(before, everything(model))
    assert model.norm.momentum == 0.1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((2, 3)), r"shape \(2, 3\), expected \(3, 3\)"),
        (np.array([[0, 0, 0], [0, np.inf, 0], [0, 0, 0]]), "sensitivity of layer 'deep' at w4a8 is inf"),
    ],
)
def test_what_an_estimator_returns_is_checked(values, words):
    class Wrong:
        def estimate(self, context):
            return Estimate(values)

    with pytest.raises(mps.EstimatorError, match=words):
        mps.profile(net(), batches(), Wrong(), OPTIONS)


def test_the_table_says_where_it_comes_from():
    table = mps.profile(net(), batches(), KLDivergence(), OPTIONS)
    assert [layer.name for layer in table.layers] == ["conv", "deep", "fc"]
    assert table.unit == "nats"
    assert table.resources == ("memory_bytes", "bitops")
    assert table.origin["estimator"] == "KLDivergence()"
    assert 3 < table.origin["passes"]["forward"] < 1 + 1 + 1 / 3 + 3 * 2  # w2 and w4a8 of three layers, partly re-run
    assert table.origin["peak_memory_bytes"] is None or table.origin["peak_memory_bytes"] >= 0
    assert table.origin["shared_with"] == 0
    assert (table.sensitivity[:, 2] == 0).all()  # w16 is the model itself
    assert (table.sensitivity[:, 0] > 0).all()


def test_a_list_of_estimators_gives_a_list_of_tables():
    tables = mps.profile(net(), batches(), [KLDivergence(), HessianTrace(2)], OPTIONS)
    assert [table.origin["estimator"] for table in tables] == [
        "KLDivergence()",
        "HessianTrace(num_samples=2, seed=0, method='hutchinson')",
    ]
    assert tables[0] == CostTable_without_time(tables[0], mps.profile(net(), batches(), KLDivergence(), OPTIONS))


def CostTable_without_time(like, table):
    return mps.CostTable(**{**table.__dict__, "origin": like.origin})


def test_data_that_can_be_read_only_once_is_read_once():
    generator = iter(batches())
    first = mps.profile(net(), generator, KLDivergence(), OPTIONS)
    second = mps.profile(net(), batches(), KLDivergence(), OPTIONS)
    np.testing.assert_array_equal(first.sensitivity, second.sensitivity)
    with pytest.raises(mps.EstimatorError, match="already used up"):
        mps.profile(net(), generator, KLDivergence(), OPTIONS)


class Random(Net):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"batches": []}, mps.EstimatorError, "the data set is empty"),
        ({"batches": torch.ones(1, 1, 5, 5)}, mps.EstimatorError, r"write \[batch\]"),
        (
            {"batches": [(torch.ones(0, 1, 5, 5), torch.ones(0))]},
            mps.EstimatorError,
            "batch 0 has no samples",
        ),
        ({"batches": [(1, 2, 3)]}, mps.EstimatorError, "a batch of 3 parts"),
        ({"batches": [torch.ones(2, 3, 5, 5)]}, mps.EstimatorError, r"fails on a batch of shape \(2, 3, 5, 5\)"),
        ({"model": nn.Sequential(nn.ReLU())}, mps.TableError, "quantizable"),
        ({"model": Random()}, mps.EstimatorError, "random in evaluation mode"),
        ({"precisions": ()}, mps.TableError, "no precisions"),
        ({"precisions": ["w4"]}, mps.TableError, "write mps.precisions"),
        ({"layers": [mps.Layer("conf")]}, mps.TableError, "did you mean 'conv'"),
        ({"layers": [mps.Layer("drop")]}, mps.TableError, "without a weight"),
        ({"resources": ("memory",)}, mps.TableError, "did you mean 'memory_bytes'"),
        ({"loss": "cross-entropy", "batches": [torch.ones(2, 1, 5, 5)]}, mps.EstimatorError, "needs labels"),
        ({"quantizer": lambda w, p: w[:1]}, mps.EstimatorError, "the quantizer returned"),
        ({"quantizer": lambda w, p: w / 0}, mps.EstimatorError, "not finite for layer 'conv' at w2"),
        ({"quantizer": lambda w, p: w.double()}, mps.EstimatorError, "float64"),
    ],
)
def test_bad_input_is_one_clear_line(change, error, words):
    arguments = {
        "model": net(),
        "batches": batches(),
        "estimator": HessianTrace(2),
        "precisions": OPTIONS,
        **change,
    }
    with pytest.raises(error, match=words) as caught:
        mps.profile(**arguments)
    assert "\n" not in str(caught.value)


def test_dropout_in_training_mode_does_no_harm():
    """Evaluation mode is set for the duration, so that the numbers are those of the model that ships."""
    model = net().train()
    np.testing.assert_array_equal(
        mps.profile(model, batches(), KLDivergence(), OPTIONS).sensitivity,
        mps.profile(copy.deepcopy(model).eval(), batches(), KLDivergence(), OPTIONS).sensitivity,
    )
    assert model.training


def test_a_resource_of_ones_own():
    table = mps.profile(
        net(),
        batches(),
        KLDivergence(),
        OPTIONS,
        resources={"energy_j": lambda model, layers, options: np.ones((3, 3))},
    )
    assert table.usage["energy_j"].tolist() == [[1, 1, 1]] * 3
    with pytest.raises(mps.TableError, match="energy_j has shape"):
        mps.profile(net(), batches(), KLDivergence(), OPTIONS, resources={"energy_j": lambda *_: np.ones(3)})


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))


def test_tied_layers_are_one_unit_and_a_dict_is_a_batch():
    torch.manual_seed(0)
    model = Tied()
    batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}
    table = mps.profile(model, [batch], KLDivergence(), mps.precisions("w2 w8"))
    assert table.layers[0].group == table.layers[1].group != ""
    plan = mps.Plan({layer.name: mps.Precision("2") for layer in table.layers})
    measured = mps.evaluate(model, [batch], plan)
    assert table.sensitivity[:, 0].sum() == pytest.approx(measured.kl, rel=1e-12)
    with pytest.raises(mps.PlanError, match="share a weight"):
        mps.evaluate(model, [batch], mps.Plan({"embed": mps.Precision("2"), "head": mps.Precision("4")}))


class TwoEnds(nn.Module):
    """Two heads, one of which is compared; the body can be cut off from gradients."""

    def __init__(self, cut=False):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.boxes, self.cut = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2), cut

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return {"logits": self.head(x.detach() if self.cut else x), "boxes": self.boxes(x)}


@pytest.mark.parametrize("estimator", [KLDivergence(), ESTIMATORS["fisher-projection"]()])
def test_layers_that_the_loss_does_not_see_are_told(estimator):
    data = [torch.randn(5, 4, generator=torch.Generator().manual_seed(0))]
    with pytest.warns(UserWarning, match="the loss does not depend on boxes: plans give them the fewest bits"):
        table = mps.profile(TwoEnds(), data, estimator, OPTIONS, progress=False)
    assert (table.sensitivity[2] == 0).all()


def test_gradients_that_are_cut_off_are_told():
    data = [torch.randn(5, 4, generator=torch.Generator().manual_seed(0))]
    with pytest.warns(UserWarning, match="the loss does not depend on body, boxes"):
        mps.profile(TwoEnds(cut=True), data, ESTIMATORS["fisher-projection"](), OPTIONS, progress=False)


@pytest.mark.filterwarnings("error")
def test_weights_that_lie_on_their_grid_already_are_no_surprise():
    model = nn.Sequential(nn.Linear(4, 3))
    table = mps.profile(
        model,
        [torch.randn(5, 4)],
        KLDivergence(),
        OPTIONS[::2],
        metric="kl",
        quantizer=lambda w, p: w,
        resources=(),
        progress=False,
    )
    assert (table.sensitivity == 0).all()
