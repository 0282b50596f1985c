"""Metrics of outputs of every kind: chosen by what outputs and targets are, told, and the same in measurement, sweep and search."""

import itertools
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.metrics.metric import Comparison
from mpsearch.metrics.own import Own
from mpsearch.metrics.registry import METRICS
from mpsearch.metrics.runs import run
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import FisherProjection, KLDivergence, OutputDamage, OutputMSE, TaskMetric

COMPARISONS = [name for name, metric in METRICS.items() if issubclass(metric, Comparison)]
OPTIONS = mps.precisions("w2 w4")
ASSUMED = pytest.mark.filterwarnings("ignore:measured:UserWarning")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(most, *shape, seed=0):
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))


def mlp(outputs, *end, inputs=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, outputs), *end
    ).eval()


def convolutions(outputs, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, outputs, 1)
    )


class Tokens(nn.Module):
    """A hidden state of each token, or their mean."""

    def __init__(self, *, mean=None):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.down, self.mean = nn.Embedding(20, 6), nn.Linear(6, 12), nn.Linear(12, 6), mean

    def forward(self, input_ids, attention_mask):
        hidden = self.down(torch.tanh(self.up(self.table(input_ids))))
        if self.mean is None:
            return {"last_hidden_state": hidden}
        counted = attention_mask[..., None].float()
        pooled = (hidden * counted).sum(1) / counted.sum(1)
        return pooled / pooled.norm(dim=1, keepdim=True) if self.mean == "length 1" else pooled


class Boxes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.scores, self.boxes = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        hidden = self.body(x).relu()
        return {"logits": self.scores(hidden), "pred_boxes": self.boxes(hidden).sigmoid()}


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = convolutions(2)

    def forward(self, sample, step):
        return {"sample": self.body(sample + step[:, None, None, None])}


def texts(seed=0):
    mask = torch.ones(4, 5, dtype=torch.long)
    mask[:, 3:] = 0
    return {"input_ids": integers(20, 4, 5, seed=seed), "attention_mask": mask}


CASES = {
    "classes": (mlp(4), (draw(6, 5), integers(4, 6)), "kl", "one integer label"),
    "softmax": (mlp(4, nn.Softmax(1)), (draw(6, 5), integers(4, 6)), "kl", "logarithms are taken"),
    "softmax, no labels": (mlp(4, nn.Softmax(1)), draw(6, 5), "kl", "add up to 1"),
    "log softmax, no labels": (mlp(4, nn.LogSoftmax(1)), draw(6, 5), "kl", "logarithms of probabilities"),
    "one hot": (mlp(4), (draw(6, 5), torch.eye(4)[integers(4, 6)]), "kl", "one class of 4"),
    "mixed classes": (mlp(4), (draw(6, 5), draw(6, 4).softmax(1)), "kl", "shares of 4 classes"),
    "several labels": (mlp(4), (draw(6, 5), (draw(6, 4) > 0).float()), "bernoulli-kl", "0 or 1"),
    "several integer labels": (mlp(4), (draw(6, 5), (draw(6, 4) > 0).long()), "bernoulli-kl", "0 or 1"),
    "sigmoid": (mlp(4, nn.Sigmoid()), (draw(6, 5), (draw(6, 4) > 0).float()), "bernoulli-kl", "logits are taken"),
    "binary": (mlp(1), (draw(6, 5), integers(2, 6)), "bernoulli-kl", "0 or 1"),
    "binary floats": (mlp(1), (draw(6, 5), integers(2, 6, 1).float()), "bernoulli-kl", "0 or 1"),
    "regression": (mlp(1), (draw(6, 5), draw(6)), "relative-error", "floats of shape (6,)"),
    "several numbers": (mlp(4), (draw(6, 5), draw(6, 4)), "relative-error", "floats"),
    "counts": (mlp(1), (draw(6, 5), integers(9, 6)), "relative-error", "integers"),
    "one output, no targets": (mlp(1), draw(6, 5), "relative-error", "assumed since the output is one number"),
    "depth": (convolutions(1), (draw(3, 2, 5, 5), draw(3, 1, 5, 5)), "relative-error", "floats"),
    "image, no targets": (convolutions(3), draw(3, 2, 5, 5), "relative-error", "assumed since there are no labels"),
    "segmentation": (convolutions(3), (draw(3, 2, 5, 5), integers(3, 3, 5, 5)), "kl", "one integer label"),
    "mask": (convolutions(1), (draw(3, 2, 5, 5), (draw(3, 1, 5, 5) > 0).float()), "bernoulli-kl", "0 or 1"),
    "denoiser": (Denoiser(), {"sample": draw(3, 2, 5, 5), "step": draw(3)}, "relative-error", "assumed"),
    "autoencoder": (mlp(5), (draw(6, 5), draw(6, 5)), "relative-error", "floats"),
    "autoencoder, no targets": (mlp(20, inputs=20), draw(6, 20), "relative-error", "shape of the input"),
    "hidden states": (Tokens(), texts(), "relative-error", "an embedding"),
    "sentence": (Tokens(mean="plain"), texts(), "relative-error", "assumed since there are no labels"),
    "sentence of length 1": (Tokens(mean="length 1"), texts(), "relative-error", "vector of length 1"),
    "boxes": (Boxes(), (draw(6, 5), integers(4, 6)), "kl", "not measured: pred_boxes"),
    "scores or not": (mlp(4), draw(6, 5), "kl", "assumed since there are no labels"),
}  # fmt: skip


def all_at(model, precision):
    return mps.Plan(
        dict.fromkeys((n for n, m in model.named_modules() if hasattr(m, "weight")), mps.Precision(precision))
    )


@pytest.mark.parametrize("name", CASES)
def test_the_default_is_what_outputs_and_targets_are_and_is_told(name):
    model, batch, metric, reason = CASES[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = mps.evaluate(model, [batch], all_at(model, "3"), progress=False)
        table = mps.profile(model, [batch], OutputDamage(), OPTIONS, progress=False)
    assert found.measured.startswith(f"measured: {metric} [")
    assert reason in found.measured
    assert table.origin["measured"] == found.measured
    assert table.unit == METRICS[metric].unit
    assert (found.metric_name or "kl") == metric
    assert math.isnan(found.kl) == (metric != "kl")
    told = [one for one in caught if str(one.message) == found.measured]
    assert len(told) == (
        2 if "assumed" in reason or "assumed" in found.measured or "not measured" in found.measured else 0
    )
    assert {Path(one.filename).name for one in told} <= {Path(__file__).name}


@pytest.mark.parametrize(("end", "labels"), [(nn.Softmax(1), integers(4, 6)), (nn.Sigmoid(), (draw(6, 4) > 0).float())])
def test_a_network_that_ends_in_probabilities_is_measured_as_one_that_ends_in_logits(end, labels):
    plain, ended = mlp(4), mlp(4, end)
    ours, theirs = (mps.evaluate(model, [(draw(6, 5), labels)], all_at(plain, "2")) for model in (ended, plain))
    for name in ("kl", "metric", "loss", "accuracy"):
        pair = [getattr(one, name) for one in (ours, theirs)]
        assert pair == [None, None] or pair[0] == pytest.approx(pair[1], rel=1e-4, nan_ok=True)
    tables = [mps.profile(m, [(draw(6, 5), labels)], FisherProjection(), OPTIONS).sensitivity for m in (ended, plain)]
    np.testing.assert_allclose(tables[0], tables[1], rtol=1e-3)


def plainly(name, before, after):
    """By loops over samples; (B, C) numbers."""
    noise, signal = ((after - before) ** 2).sum(1), (before**2).sum(1)
    if name == "mse":
        return float((noise / before.shape[1]).mean())
    if name == "relative-error":
        return float(noise.sum() / signal.sum())
    if name == "psnr":
        peaks = [float(row.max() - row.min()) ** 2 for row in before]
        return -10 * math.log10(float(noise.sum()) / (before.shape[1] * sum(peaks)))
    if name == "cosine":
        return float(np.mean([1 - float(a @ b / a.norm() / b.norm()) for a, b in zip(before, after, strict=True)]))
    if name == "kl":
        p, q = before.softmax(1), after.softmax(1)
        return float((p * (p / q).log()).sum(1).mean())
    p, q = before.sigmoid(), after.sigmoid()
    return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean())


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_numbers_of_a_metric_by_loops_over_samples(name):
    model, batches = mlp(4).double(), [draw(6, 5).double(), draw(3, 5, seed=1).double()]
    plan = all_at(model, "3")
    found = mps.evaluate(model, batches, plan, metric=name)
    damages = mps.measure_plans(model, batches, [plan], metric=name)
    x = torch.cat(batches)
    quantized = mlp(4).double()
    with torch.no_grad():
        for layer in quantized[::2]:
            layer.weight.copy_(RoundToNearest()(layer.weight, mps.Precision("3")))
        before, after = model(x), quantized(x)
    value = found.kl if name == "kl" else found.metric
    assert value == pytest.approx(plainly(name, before, after), rel=1e-6)
    assert damages.unit == METRICS[name].unit
    assert METRICS[name]().shown(float(damages.damage[0])) == pytest.approx(value, rel=1e-9)


def test_the_standard_error_of_a_ratio():
    """Cochran 1977, section 6.3, sample by sample."""
    model, x = mlp(3).double(), draw(40, 5).double()
    plan = all_at(model, "2")
    found = mps.evaluate(model, x.split(7), plan, metric="relative-error")
    each = [mps.evaluate(model, [one[None]], plan, metric="mse").metric * 3 for one in x]
    with torch.no_grad():
        signal = model(x).square().sum(1).numpy()
    ratio = sum(each) / signal.sum()
    residual = np.array(each) - ratio * signal
    assert found.metric == pytest.approx(ratio, rel=1e-9)
    assert found.metric_se == pytest.approx(math.sqrt(40 / 39 * (residual**2).sum()) / signal.sum(), rel=1e-6)


@pytest.mark.parametrize(
    ("metric", "measured"), [("mse", OutputMSE()), ("mse", OutputDamage()), ("relative-error", OutputDamage())]
)
def test_the_projection_of_a_linear_model_is_the_measured_error_exactly(metric, measured):
    model = nn.Sequential(nn.Linear(5, 6, bias=False), nn.Linear(6, 4)).double()
    batches = [draw(6, 5).double(), draw(3, 5, seed=1).double()]
    tables = [mps.profile(model, batches, one, OPTIONS, metric=metric) for one in (FisherProjection(4), measured)]
    np.testing.assert_allclose(tables[0].sensitivity, tables[1].sensitivity, rtol=1e-9)
    assert tables[0].unit == metric.replace("-", " ")


@pytest.mark.parametrize("name", [name for name in COMPARISONS if name != "kl"])
def test_the_projection_is_the_dense_gauss_newton_form(name):
    """1/2 (J D)^T H (J D) over the sum of weights, J by differences along D, H by the dense Hessian of the summed damage."""
    metric, model, x = METRICS[name](), mlp(4).double(), draw(3, 5).double()
    table = mps.profile(model, [x], FisherProjection(4), OPTIONS, metric=name)
    found = run(model, x)
    reference = found.rows.detach()

    def summed(rows):
        return metric.terms(reference, rows, found.index, 3)[0].sum()  # type: ignore[attr-defined]

    # a hair beside the reference, where the angle's derivative is not defined
    hessian = torch.autograd.functional.hessian(summed, reference * (1 + 1e-9 * draw(3, 4).double())).reshape(12, 12)
    weight = metric.terms(reference, reference, found.index, 3)[1].sum()  # type: ignore[attr-defined]
    quantize = RoundToNearest()
    for row, layer in enumerate(model[::2]):
        for column, option in enumerate(OPTIONS):
            change = quantize(layer.weight.detach(), option) - layer.weight.detach()
            with torch.no_grad():
                layer.weight += 1e-6 * change
                up = model(x)
                layer.weight -= 2e-6 * change
                down = model(x)
                layer.weight += 1e-6 * change
            moved = ((up - down) / 2e-6).flatten()
            expected = float(0.5 * moved @ hessian @ moved / weight)
            assert table.sensitivity[row, column] == pytest.approx(expected, rel=1e-4)


def test_a_common_shift_of_all_outputs_counts_where_targets_are_numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    batch = (draw(8, 4), draw(8, 4))
    table = mps.profile(
        model, [batch], [FisherProjection(4), OutputDamage()], OPTIONS[:1], quantizer=lambda w, p: w + 1.0
    )
    assert all(float(one.sensitivity[0, 0]) > 1 for one in table)
    with pytest.warns(
        UserWarning,
        match=r"KLDivergence\(\) takes a KL over a softmax, which does not see what all outputs have in common",
    ):
        blind = mps.profile(model, [batch], KLDivergence(), OPTIONS[:1], quantizer=lambda w, p: w + 1.0)
    assert float(blind.sensitivity[0, 0]) < 1e-10


def test_padding_does_not_count():
    model, batch = Tokens(), texts()
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 3)}
    plan = all_at(model, "2")
    assert mps.evaluate(model, [other], plan).metric == mps.evaluate(model, [batch], plan).metric


@pytest.mark.parametrize("name", ["regression", "several labels", "depth"])
def test_the_loss_by_what_the_targets_are(name):
    model, batch, _, _ = CASES[name]
    found = mps.evaluate(model, [batch], all_at(model, "2"))
    with torch.no_grad():
        y, target = model(batch[0]), batch[1]
        expected = {
            "regression": lambda: nn.functional.mse_loss(y[:, 0], target),
            "several labels": lambda: nn.functional.binary_cross_entropy_with_logits(y, target) * 4,
            "depth": lambda: nn.functional.mse_loss(y, target),
        }[name]()
    assert found.reference.loss == pytest.approx(float(expected), rel=1e-5)
    if name == "several labels":
        assert found.reference.accuracy == pytest.approx(float(((y > 0) == (target > 0.5)).float().mean()))


@ASSUMED
def test_own_metrics_are_told_apart_by_their_parameters():
    model, batch = Boxes(), draw(6, 5)
    plan = all_at(model, "2")

    def of_boxes(output, reference, batch, scale=1.0):
        assert set(output) == {"logits", "pred_boxes"}
        return scale * (output["pred_boxes"] - reference["pred_boxes"]).abs().mean(1)

    def of_model(model, batch):
        return float(model(batch)["pred_boxes"].mean())

    with torch.no_grad():
        expected = float(model(batch)["pred_boxes"].mean())
    each = mps.evaluate(model, [batch], plan, metric=of_boxes)
    whole = mps.evaluate(model, [batch], plan, metric=lambda y, y0, b: of_boxes(y, y0, b).mean())
    assert each.metric == pytest.approx(whole.metric)
    assert each.metric > each.reference.metric == 0
    assert each.metric_se > 0
    assert math.isnan(whole.metric_se)
    assert mps.evaluate(model, [batch], plan, metric=of_model).reference.metric == pytest.approx(expected)
    assert mps.measure_plans(model, [batch], [plan], metric=of_boxes).damage[0] == pytest.approx(each.metric)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: 0.0, r"needs the parameters \(x\), expected 2, \(model, batch\), or 3"),
        (lambda *parts: 0.0, "none that can be told"),
        (lambda a, b, c, d: 0.0, r"\(a, b, c, d\)"),
        (lambda a, b, *, c: 0.0, r"\(a, b, c\)"),
    ],
)
def test_a_metric_of_other_parameters_is_refused(function, words):
    with pytest.raises(mps.EstimatorError, match=words):
        Own(function)
    with pytest.raises(mps.EstimatorError, match=words):
        mps.evaluate(mlp(4), [draw(6, 5)], all_at(mlp(4), "2"), metric=function)


@pytest.mark.parametrize(
    ("model", "batch", "options", "words"),
    [
        (mlp(4), (draw(6, 5), draw(6, 4)), {"metric": "accuracy"}, "there is no accuracy: the targets are floats"),
        (mlp(4), (draw(6, 5), draw(6, 3)), {"metric": "loss"}, "do not fit the output"),
        (mlp(1), (draw(6, 5), draw(6)), {"metric": "kl"}, "one output"),
        (mlp(4), (draw(6, 5), integers(4, 6)), {"metric": "relativ-error"}, "did you mean 'relative-error'"),
        (nn.Sequential(nn.Linear(5, 4), nn.Threshold(1e9, 0.0)), draw(6, 5), {"metric": "psnr"}, "all 0"),
        (nn.Sequential(nn.Linear(5, 1)), draw(6, 5), {"metric": "psnr"}, "no peak for psnr"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(model, batch, options, words):
    with pytest.raises(mps.EstimatorError, match=words) as caught:
        mps.evaluate(model, [batch], all_at(model, "2"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [lambda y: torch.complex(y, y), lambda y: y > 0])
def test_outputs_that_are_no_real_numbers_are_refused_in_one_line(change):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp(4)

        def forward(self, x):
            return change(self.body(x))

    with pytest.raises(
        mps.EstimatorError, match=r"the model returned torch\.(complex64|bool), expected floating-point"
    ):
        mps.search(Changed(), [draw(16, 5)] * 4, mps.Budget(average_bits=4), OPTIONS)


class Residual(nn.Module):
    """Twice as large images: what is added to the enlarged input."""

    def __init__(self):
        super().__init__()
        self.body = convolutions(8)
        with torch.no_grad():
            self.body[0].weight *= 3
            self.body[4].weight *= 0.3

    def forward(self, x):
        return nn.functional.pixel_shuffle(self.body(x), 2) + nn.functional.interpolate(x, scale_factor=2)


SEARCHED = {
    "super-resolution": (Residual(), [(draw(6, 2, 4, 4, seed=s), draw(6, 2, 8, 8, seed=s)) for s in range(10)]),
    "depth": (convolutions(1), [(draw(6, 2, 4, 4, seed=s), draw(6, 1, 4, 4, seed=s)) for s in range(10)]),
    "several labels": (mlp(6), [(draw(8, 5, seed=s), (draw(8, 6, seed=s) > 0).float()) for s in range(10)]),
    "embedding": (Tokens(), [texts(seed=s) for s in range(20)]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "effort"), [*itertools.product(SEARCHED, ["default"]), ("super-resolution", "fast")])
def test_a_search_finds_a_plan_near_the_best_of_all(name, effort):
    model, batches = SEARCHED[name]
    options = mps.precisions("w2 w4 w8")
    layers = mps.layers(model, batches[0])
    result = mps.search(model, batches, mps.Budget(average_bits=3.5), options, layers=layers, effort=effort)
    sizes = np.array([layer.numel for layer in layers])
    plans = [
        mps.Plan(dict(zip((layer.name for layer in layers), chosen, strict=True)))
        for chosen in itertools.product(options, repeat=len(layers))
        if sizes @ [option.weight_bits for option in chosen] <= 3.5 * sizes.sum()
    ]
    measured = mps.measure_plans(model, batches, [result.plan, *plans])
    assert measured.damage[0] <= 1.2 * measured.damage[1:].min()
    unit = {"several labels": "nats"}.get(name, "relative error")
    assert result.plans.unit == result.tables["posterior"].unit == measured.unit == unit
    assert f" {unit}" in result.verdict or "best plan found" in result.verdict
    assert result.settings["measured"] in str(result)
    assert ("KL" in str(result).split("\n")[2]) is False


def test_a_result_in_another_unit_is_saved_and_loaded(tmp_path):
    model, batches = SEARCHED["depth"]
    result = mps.search(model, batches, mps.Budget(average_bits=3), mps.precisions("w2 w4"), effort="fast")
    result.save(tmp_path / "out")
    again = mps.SearchResult.load(tmp_path / "out")
    assert str(again) == str(result)
    assert again.plans.unit == "relative error"
    assert again.measured.metric_name == "relative-error"
    assert "relative error" in result._repr_html_()
    result.report(tmp_path / "page.html")
    assert result.settings["measured"] in (tmp_path / "page.html").read_text().replace("&#x27;", "'")


@pytest.mark.parametrize("given", [{}, {"loss": lambda model, batch: (model(batch[0]) - batch[1]).abs().mean()}])
def test_a_search_by_the_loss_of_numbers(given):
    model, batches = SEARCHED["depth"]
    result = mps.search(
        model, batches, mps.Budget(average_bits=3), mps.precisions("w2 w4"), metric="loss", effort="fast", **given
    )
    assert result.measured.loss > 0
    assert result.plans.unit == ("loss" if given else "mse")
    assert result.tables["fisher-projection"].unit == "relative error"
    assert "tables by relative-error" in result.settings["measured"]


def test_two_names_of_what_is_measured_are_one_too_many():
    with pytest.raises(mps.EstimatorError, match="at once"):
        mps.profile(mlp(4), [draw(6, 5)], OutputDamage(), OPTIONS, metric="mse", loss="kl")
    with pytest.raises(mps.EstimatorError, match="loss= is for metric='loss'"):
        mps.search(mlp(4), [draw(16, 5)], mps.Budget(average_bits=4), OPTIONS, loss=lambda model, batch: 0.0)


def test_labels_that_are_no_classes_are_none_for_the_cross_entropy():
    model, batch, _, _ = CASES["several numbers"]
    with pytest.raises(mps.EstimatorError, match="needs one integer label a prediction"):
        mps.profile(model, [batch], TaskMetric(), OPTIONS)


def test_no_right_answer_is_an_accuracy_of_zero():
    model, x = mlp(4), draw(6, 5)
    with torch.no_grad():
        wrong = (model(x).argmax(1) + 1) % 4
    assert str(mps.evaluate(model, [(x, wrong)], all_at(model, "8")).reference.accuracy) == "0.0"
