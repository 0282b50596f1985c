"""The layer that makes the output is left out of runs: hidden states are held, and logits are made a few rows at a time."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.calibration import plan_runs
from mpsearch.estimation.gradients import hidden_gradients
from mpsearch.estimation.surrogate import OutputShifts
from mpsearch.metrics.registry import METRICS
from mpsearch.metrics.runs import run
from mpsearch.models.data.splitting import first_samples
from mpsearch.models.head import OutputLayer, output_layer
from mpsearch.models.hugging_face import model_of
from mpsearch.models.peak_memory import live_bytes
from mpsearch.models.running import output_of, preserved
from mpsearch.models.streaming.offloading import replaced
from mpsearch.quantizers.fake_quantization import inputs
from mpsearch.sensitivity import (
    SQNR,
    CosineDistance,
    EmpiricalFisher,
    Fisher,
    FisherProjection,
    GaussNewtonTrace,
    GradientImportance,
    HessianAugmented,
    KLDivergence,
    LinearityCoefficients,
    MaskedKL,
    OutputDamage,
    OutputGradient,
    OutputMSE,
    PredictionDifference,
    TaskMetric,
    Taylor,
)

VOCABULARY, WINDOW = 512, 64
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": WINDOW}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": WINDOW}
OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 16}

#: Class and configuration -> name of the layer that makes the output; None where something follows it.
MODELS = {
    ("LlamaForCausalLM", "LlamaConfig"): (GROUPED, "lm_head"),
    ("Qwen3ForCausalLM", "Qwen3Config"): ({**GROUPED, "head_dim": 4, "tie_word_embeddings": True}, "lm_head"),
    ("GPT2LMHeadModel", "GPT2Config"): (GPT2, "lm_head"),
    ("OPTForCausalLM", "OPTConfig"): ({**OPT, "max_position_embeddings": WINDOW}, "lm_head"),
    ("BertForMaskedLM", "BertConfig"): (SIZES, "cls.predictions.decoder"),
    ("Gemma2ForCausalLM", "Gemma2Config"): ({**GROUPED, "head_dim": 4}, None),
}


class Text(nn.Module):
    """A model of tokens with a wide output, and a label for each token."""

    def __init__(self, classes: int = VOCABULARY, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, classes, bias=bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.head(torch.tanh(self.body(self.table(input_ids))))}


def integers(most, *shape, seed=0):
    return torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))


def data(count=2, samples=8, window=WINDOW):
    """Batches of which some positions are padding, and some labels do not count."""
    batches = []
    for number in range(count):
        tokens = integers(50, samples, window, seed=number)
        mask, labels = torch.ones_like(tokens), integers(VOCABULARY, samples, window, seed=number + 9)
        mask[0, window // 2 :] = 0
        labels[1, :3] = -100
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": labels})
    return batches


@pytest.fixture
def pieces(monkeypatch):
    """Limits so low that small models have large outputs."""
    monkeypatch.setattr("mpsearch.models.head.WHOLE_BYTES", 2**14)
    monkeypatch.setattr("mpsearch.metrics.runs._NUMBERS", 2**15)


def found(model, batch):
    with preserved(model, batch), torch.no_grad():
        example = first_samples(batch, 2)
        return output_layer(model, [batch], output_of(model, example), example)


@pytest.mark.parametrize("names", MODELS, ids=[one for one, _ in MODELS])
def test_the_layer_of_models_of_transformers(names, pieces):
    transformers = pytest.importorskip("transformers")
    sizes, expected = MODELS[names]
    torch.manual_seed(0)
    config = getattr(transformers, names[1])(vocab_size=VOCABULARY, **sizes)
    model = getattr(transformers, names[0])(config).eval()
    batch = {"input_ids": integers(50, 4, WINDOW), "labels": integers(50, 4, WINDOW, seed=1)}
    if expected is None:
        with pytest.warns(mps.MpsearchWarning, match=r"logits of a whole batch are held: 524,288 bytes"):
            assert found(model, batch) is None
        return
    layer = found(model, batch)
    assert layer is not None
    assert layer.module is model.get_submodule(expected)
    with torch.no_grad():
        plain, piecewise = run(model, batch), run(model, batch, layer)
    assert piecewise.head is not None
    assert piecewise.held.shape == (len(plain.rows), 16)
    assert piecewise.width == VOCABULARY
    assert piecewise.shape == plain.shape
    assert "forward" not in vars(layer.module)
    parts = list(piecewise.pieces())
    assert len(parts) > 3
    for name in ("labels", "index"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(plain, name))
    torch.testing.assert_close(torch.cat([part.rows for part in parts]), plain.rows, rtol=1e-5, atol=1e-6)


class Ended(Text):
    """Something follows the layer, or the layer is called twice."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, input_ids, attention_mask=None):
        logits = super().forward(input_ids)["logits"]
        if self.end == "capped":
            return 30 * torch.tanh(logits / 30)
        if self.end == "another dtype":
            return logits.double()
        if self.end == "read again":
            return {"logits": logits, "best": self.table(logits.argmax(-1) % 50)}
        if self.end == "not linear":
            return logits.relu_()
        return logits[..., :400]


@pytest.mark.parametrize("end", ["capped", "another dtype", "not linear", "cut"])
def test_what_follows_the_layer_is_told_with_its_bytes(end, pieces):
    with pytest.warns(mps.MpsearchWarning, match=r"whole batch are held: [0-9,]+ bytes"):
        assert found(Ended(end), data()[0]) is None


def test_what_else_is_made_of_the_logits_is_not_what_counts(pieces):
    assert found(Ended("read again"), data()[0]) is not None


def test_a_hook_that_changes_the_output_follows_the_layer(pieces):
    model = Text()
    model.head.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.warns(mps.MpsearchWarning, match="logits of a whole batch"):
        assert found(model, data()[0]) is None


def test_small_outputs_are_left_as_they_are():
    model, batch = Text(), data()[0]
    assert found(model, batch) is None
    with torch.no_grad():
        whole = run(model, batch, OutputLayer(model.head))
        assert whole.head is None
        assert torch.equal(whole.rows, run(model, batch).rows)


@pytest.mark.parametrize("bias", [False, True])
def test_a_run_keeps_the_weights_and_the_inputs_that_it_had(bias, pieces):
    """The head of the reference is the unquantized one while a plan is in the model, whose own is the plan's."""
    model, batch = Text(bias=bias).eval(), data()[0]
    layer = OutputLayer(model.head)
    with torch.no_grad():
        before, plain = run(model, batch, layer), run(model, batch).rows
        new = {model.head.weight: model.head.weight.detach().round(decimals=1)}
        with replaced(new), inputs({model.head: lambda x: x.round(decimals=1)}):
            after, expected = run(model, batch, layer), run(model, batch).rows
            torch.testing.assert_close(before.rows, plain)
    torch.testing.assert_close(after.rows, expected)
    assert (plain - expected).abs().max() > 0.01
    assert model.head.weight.data_ptr() == before.head.weight.data_ptr()


PLANS = [mps.Plan(dict.fromkeys(("table", "body", "head"), mps.precisions(one)[0])) for one in ("w2", "w4", "w8a8")]


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in ("bernoulli-kl",)])
def test_measured_in_pieces_as_at_once(metric, monkeypatch):
    """Metrics that are taken row by row, and those that are given all rows."""
    batches = data()
    if metric in ("mse", "relative-error", "psnr", "cosine", "kl"):
        batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]

    def measured():
        plans = mps.measure_plans(Text().eval(), batches, PLANS, metric=metric, progress=False)
        one = mps.evaluate(Text().eval(), batches, PLANS[0], metric=metric, progress=False)
        facts = [one.kl, one.kl_se, one.loss, one.loss_se, one.accuracy, one.metric, one.metric_se, one.reference.loss]
        return [*plans.damage, *plans.damage_se, *(fact for fact in facts if fact is not None)], one.num_samples

    expected, samples = measured()
    monkeypatch.setattr("mpsearch.models.head.WHOLE_BYTES", 2**14)
    monkeypatch.setattr("mpsearch.metrics.runs._NUMBERS", 2**15)
    pieces, again = measured()
    np.testing.assert_allclose(pieces, expected, rtol=2e-5, atol=1e-9)
    assert samples == again


def test_searches_in_pieces_end_as_at_once(monkeypatch):
    batches, options = data(6), mps.precisions("w2 w3 w4 w8")

    def searched():
        return mps.search(Text().eval(), batches, mps.Budget(average_bits=3), options, effort="fast", progress=False)

    expected = searched()
    monkeypatch.setattr("mpsearch.models.head.WHOLE_BYTES", 2**14)
    monkeypatch.setattr("mpsearch.metrics.runs._NUMBERS", 2**15)
    found = searched()
    assert dict(found.plan) == dict(expected.plan)
    np.testing.assert_allclose(found.plans.damage, expected.plans.damage, rtol=2e-5, atol=1e-9)


def test_the_report_of_a_search_holds_no_logits(pieces, monkeypatch):
    layers = []
    runs = plan_runs.unquantized_run

    def noted(model, batch, reader, place, layer=None):
        layers.append(layer)
        return runs(model, batch, reader, place, layer)

    monkeypatch.setattr(plan_runs, "unquantized_run", noted)  # plans of the search itself have another door to it
    batches, options = data(6), mps.precisions("w2 w3 w4 w8")
    mps.search(Text().eval(), batches, mps.Budget(average_bits=3), options, effort="fast", progress=False)
    assert layers
    assert None not in layers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_in_the_last_piece(bad, pieces):
    model = Text(bias=True).eval()
    calls = itertools.count()

    def late(weight, precision):
        next(calls)
        return torch.where(torch.arange(len(weight))[:, None] == len(weight) - 1, 3e38, weight)

    batches = data(1)
    with pytest.raises(mps.EstimatorError, match="not finite"):
        mps.measure_plans(model, batches, [PLANS[0]], quantizer=late, progress=False)
    assert next(calls) > 0
    model.head.bias.data[-1] = bad
    with pytest.raises(mps.EstimatorError, match="not finite"):
        mps.measure_plans(model, batches, [PLANS[0]], progress=False)


ESTIMATORS = [
    KLDivergence(),
    MaskedKL(),
    CosineDistance(),
    OutputMSE(),
    OutputDamage(),
    PredictionDifference(),
    LinearityCoefficients(),
    TaskMetric("accuracy"),
    TaskMetric(lambda logits, labels: logits.double().square().mean()),
    SQNR(),
]


def test_perturbations_in_pieces_as_at_once(monkeypatch):
    """Estimators that take rows in pieces, and those that take them all; the shifts that an observer sees."""
    batches = data()

    def profiled():
        shifts = OutputShifts()
        with mps.Calibration(Text().eval(), batches, mps.precisions("w2 w4 w3a8"), metric="kl") as calibration:
            tables = calibration.profile(ESTIMATORS, observers=[shifts])
            return tables, shifts.surrogate(3, calibration.precisions)

    expected, whole = profiled()
    monkeypatch.setattr("mpsearch.models.head.WHOLE_BYTES", 2**14)
    monkeypatch.setattr("mpsearch.metrics.runs._NUMBERS", 2**13)
    found, pieces = profiled()
    for table, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(table.sensitivity, other.sensitivity, rtol=2e-5, atol=1e-9)
        np.testing.assert_allclose(table.sensitivity_se, other.sensitivity_se, rtol=2e-4, atol=1e-9)
        assert table.origin["passes"] == other.origin["passes"]
    np.testing.assert_allclose(pieces.log_p, whole.log_p, atol=1e-5)
    np.testing.assert_allclose(pieces.shifts, whole.shifts, atol=1e-4)


def peak_of(classes, samples, work, monkeypatch, whole=False):
    """The most that is alive at once while a prepared model is run, beside its plans."""
    monkeypatch.setattr("mpsearch.models.head.WHOLE_BYTES", 2**60 if whole else 2**17)
    monkeypatch.setattr("mpsearch.metrics.runs._NUMBERS", 2**14)
    monkeypatch.setattr("mpsearch.metrics.pieces._NUMBERS", 2**14)
    model = Text(classes).eval()
    batches = [{"input_ids": integers(50, samples, WINDOW)}]
    few = first_samples(batches[0], 1)
    options = mps.precisions("w2 w4")
    with mps.Calibration(
        model, batches, options, example=few, metric="kl", quantizer="rtn-max", progress=False
    ) as calibration:
        assert (calibration.output_layer is None) == whole
        calibration.measure(PLANS, [few])  # ranges of inputs are known from here on, and costs
        assert len(calibration.base.layers) == 3
        with live_bytes() as live:
            work(calibration, batches)
    return live.bytes


WORK = {
    "evaluate": lambda calibration, batches: calibration.evaluate(PLANS[0], batches),
    "sweep": lambda calibration, batches: calibration.profile(FisherProjection()),
    "divergence": lambda calibration, batches: calibration.profile(KLDivergence(), observers=[OutputShifts()]),
    "measure plans": lambda calibration, batches: calibration.measure(PLANS, batches),
}


@pytest.mark.parametrize("name", WORK)
def test_memory_does_not_grow_with_logits(name, monkeypatch):
    """With classes grow the plans of the last layer, with samples the hidden states; logits taken whole are seen."""
    fewest = peak_of(256, 16, WORK[name], monkeypatch)
    classes = peak_of(1024, 16, WORK[name], monkeypatch)
    samples = peak_of(1024, 64, WORK[name], monkeypatch)
    assert classes - fewest < 3 * 8 * 4 * (1024 - 256) + 2**19
    assert samples - classes < 48 * WINDOW * 8 * 4 * 8
    logits_bytes = 16 * WINDOW * 1024 * 4
    assert max(fewest, classes) < logits_bytes / 2
    assert peak_of(1024, 16, WORK[name], monkeypatch, whole=True) > 2 * logits_bytes


def test_an_offloaded_model_is_measured_as_the_resident_one(pieces, tmp_path):
    """The head is read where the layer holds its values."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, **{**GROUPED, "num_hidden_layers": 2})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    found, swept = [], []
    for streamed in (False, True):
        model = model_of(tmp_path, streamed=streamed)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        plans = [mps.Plan(dict.fromkeys(names, mps.Precision(bits))) for bits in ("2", "4")]
        found.append(mps.measure_plans(model, data(), plans, progress=False).damage)
        swept.append(
            mps.profile(model, data(), FisherProjection(), mps.precisions("w2 w4"), progress=False).sensitivity
        )
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(*swept, rtol=1e-6)


SWEPT = [
    FisherProjection(draws=2),
    FisherProjection(),
    HessianAugmented(),
    OutputGradient(),
    Fisher(),
    EmpiricalFisher(),
    GradientImportance(),
    GaussNewtonTrace(),
    Taylor(),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_sweeps_in_pieces_as_at_once(tied, labels, monkeypatch):
    """Gradients behind the head and of the head itself, weights and inputs quantized; what cannot be taken in pieces is taken whole."""
    batches = [{key: value for key, value in batch.items() if labels or key != "labels"} for batch in data()]
    estimators = [one for one in SWEPT if labels or not isinstance(one, EmpiricalFisher | GradientImportance | Taylor)]
    made: list[bool] = []
    plain = hidden_gradients.hidden_gradients

    def counted(*args):
        made.append(True)
        return plain(*args)

    monkeypatch.setattr("mpsearch.estimation.gradients.head_pass.hidden_gradients", counted)

    def swept(several):
        model = Text(bias=True).eval()
        if tied:
            model.table = nn.Embedding(VOCABULARY, 8)
            model.table.weight = model.head.weight
        options = mps.precisions("w2 w4 w3a8")
        with mps.Calibration(model, batches, options, metric=None if labels else "kl", progress=False) as calibration:
            return [calibration.profile(several), calibration.profile(several[0])]

    for several in ([FisherProjection()], estimators):
        monkeypatch.setattr("mpsearch.models.head.WHOLE_BYTES", 2**26)
        expected = swept(several)
        assert not made
        monkeypatch.setattr("mpsearch.models.head.WHOLE_BYTES", 2**14)
        monkeypatch.setattr("mpsearch.metrics.runs._NUMBERS", 2**13)
        found = swept(several)
        assert made
        made.clear()
        pairs = [*zip(found[0], expected[0], strict=True), (found[1], expected[1])]
        for table, other in pairs:
            scale = np.nanmax(np.abs(other.sensitivity))
            np.testing.assert_allclose(table.sensitivity, other.sensitivity, rtol=1e-4, atol=1e-6 * scale)
            np.testing.assert_allclose(table.sensitivity_se, other.sensitivity_se, rtol=1e-3, atol=1e-5 * scale)
            assert table.origin["passes"] == other.origin["passes"]
