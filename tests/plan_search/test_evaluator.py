"""Plans measured batch by batch, against `evaluate`, loops over samples and counted calls of the model."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.checkpoints.memory import MemoryStore
from mpsearch.core.decision import decisions_of
from mpsearch.estimation.context import Context
from mpsearch.metrics.divergences import KL
from mpsearch.metrics.own import Own
from mpsearch.metrics.registry import METRICS
from mpsearch.metrics.targets import Accuracy, Loss
from mpsearch.models.running import samples, state_fingerprint
from mpsearch.plan_search import evaluator as evaluator_module
from mpsearch.plan_search.evaluator import Measurement, PlanEvaluator
from mpsearch.plan_search.passes import PassBudget
from mpsearch.quantizers.fake_quantization import input_ranges
from mpsearch.quantizers.rounding import RoundToNearest

SIZES = (7, 4, 9, 1)


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        for layer in model[::2]:  # type: ignore[attr-defined]
            layer.weight *= 4
    return model


def batches(sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 5, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in sizes]


def right(model, batch):
    return float((model(batch[0]).argmax(1) == batch[1]).double().mean())


def wrong(model, batch):
    return 1 - right(model, batch)


def evaluator_of(
    model=None,
    data=None,
    precisions="w2 w3 w4",
    damage=None,
    *,
    layers=None,
    passes=None,
    total=None,
    checkpoint=None,
):
    model = net() if model is None else model
    data = batches() if data is None else data
    options = mps.precisions(precisions)
    found = mps.layers(model, data[0]) if layers is None else layers
    ranges = input_ranges(model, data, [layer.name for layer in found])
    kept = MemoryStore({}) if checkpoint is None else checkpoint
    context = Context(model, data, decisions_of(found), options, RoundToNearest(), ranges, KL(), None, checkpoint=kept)
    every = sum(map(samples, data)) if total is None else total
    return PlanEvaluator("select", context, data, damage or KL(), every, passes or PassBudget(100.0))


def plan_of(evaluator, options):
    return mps.Plan(
        {
            layer.name: evaluator.context.precisions[p]
            for decision, p in zip(evaluator.context.decisions, options, strict=True)
            for layer in decision.layers
        }
    )


class Runs:
    """Samples that a model is run on."""

    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.count += len(args[0])


@pytest.mark.parametrize("precisions", ["w2 w3 w4", "w2a8 w3a4 w4a8"])
@pytest.mark.parametrize(
    "damage",
    [KL(), Loss(), Accuracy(), Own(right, higher_is_better=True), Own(wrong)],
    ids=["kl", "loss", "accuracy", "own up", "own down"],
)
def test_the_mean_is_that_of_evaluate(damage, precisions):
    evaluator = evaluator_of(precisions=precisions, damage=damage)
    metric = damage.function if damage.runs_model else None
    rises = []
    for options in ([0, 0, 0], [0, 2, 1], [0, 0, 1], [1, 0, 0]):
        found = evaluator.measure(np.array(options))
        expected = mps.evaluate(evaluator.context.model, batches(), plan_of(evaluator, options), metric=metric)
        before = expected.reference
        rise = {
            KL(): lambda new=expected: new.kl,
            Loss(): lambda new=expected, old=before: new.loss - old.loss,
            Accuracy(): lambda new=expected, old=before: old.accuracy - new.accuracy,
            Own(right, higher_is_better=True): lambda new=expected, old=before: old.metric - new.metric,
            Own(wrong): lambda new=expected, old=before: new.metric - old.metric,
        }[damage]()
        assert found.value == pytest.approx(rise, abs=1e-12)
        if damage == KL():
            assert found.se == pytest.approx(expected.kl_se, abs=1e-12)
        rises.append(abs(rise))
    assert max(rises) > 0.01


@pytest.mark.parametrize("metric", ["kl", "loss", "accuracy"])
def test_the_standard_error_by_a_loop_over_samples(metric):
    evaluator = evaluator_of(damage=METRICS[metric]())
    found = [evaluator.measure(np.array(options)) for options in ([0, 0, 1], [2, 0, 0])]
    ones = [(x[None], y[None]) for batch in batches() for x, y in zip(*batch, strict=True)]
    each = []
    for options in ([0, 0, 1], [2, 0, 0]):
        every = [mps.evaluate(evaluator.context.model, [one], plan_of(evaluator, options)) for one in ones]
        if metric == "kl":
            each.append([one.kl for one in every])
        else:
            sign = 1 if metric == "loss" else -1
            each.append([sign * (getattr(one, metric) - getattr(one.reference, metric)) for one in every])
    for one, values in zip(found, each, strict=True):
        assert one.se == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), rel=1e-5)
    difference = np.subtract(*each)
    value, se = found[0].over(found[1])
    assert value == pytest.approx(difference.mean(), rel=1e-5)
    assert se == pytest.approx(difference.std(ddof=1) / math.sqrt(len(difference)), rel=1e-5)


def test_plans_are_compared_on_the_samples_that_both_have_seen():
    long = Measurement(np.array([1.0, 2.0, 9.0]), np.array([1.0, 1.0, 2.0]))
    short = Measurement(np.array([0.0, 4.0]), np.array([1.0, 1.0]))
    assert long.over(short) == (-0.5, 1.5)
    assert short.over(long) == (0.5, 1.5)
    assert math.isnan(long.first(1).se)


def test_predictions_of_one_sample_are_one_draw():
    """Tokens: the standard error of a ratio, by hand (Cochran 1977, section 6.3)."""
    found = Measurement(np.array([4.0, 1.0, 0.0]), np.array([2.0, 1.0, 0.0]))  # the last has nothing to predict
    mean = 5 / 3
    residual = np.array([4 - 2 * mean, 1 - mean])
    assert found.value == pytest.approx(mean)
    assert found.se == pytest.approx(math.sqrt(2 * (residual**2).sum()) / 3)


def test_a_plan_that_is_dropped_keeps_its_first_batches_and_goes_on_from_there():
    evaluator, whole = evaluator_of(), evaluator_of()
    seen = []
    options = np.array([0, 1, 2])
    found = evaluator.measure(options, lambda one: seen.append(len(one.sums)) or len(one.sums) > 7)
    assert seen == [7, 11]
    assert not evaluator.complete(options)
    runs = Runs(evaluator.context.model)
    assert evaluator.measure(options, lambda _: False).value == whole.measure(options).value
    assert evaluator.complete(options)
    assert runs.count == 2 * (9 + 1)
    assert np.array_equal(found.sums, evaluator.known[0, 1, 2].sums[:11])
    runs.count = 0
    evaluator.measure(options, lambda _: pytest.fail("it is known"))
    assert runs.count == 0


@pytest.mark.parametrize("damage", [KL(), Loss(), Own(right)], ids=["kl", "loss", "own"])
@pytest.mark.parametrize("room", [2**30, 10 * 3 * 4], ids=["kept", "not kept"])
def test_passes_are_calls_of_the_model(monkeypatch, damage, room):
    """Of the logits of 21 samples only those of the first batch have room in the second case."""
    monkeypatch.setattr(evaluator_module, "REFERENCE_BYTES", room)
    passes = PassBudget(100.0)
    evaluator = evaluator_of(damage=damage, passes=passes, total=50)
    runs = Runs(evaluator.context.model)
    price = 0.0
    for options in ([0, 1, 2], [0, 0, 0], [1, 1, 1]):
        before = passes.used
        evaluator.measure(np.array(options), lambda one: len(one.sums) > 10)
        assert passes.used - before <= evaluator.share + evaluator.price + 1e-12
        price = passes.used - before
        assert passes.used == pytest.approx(runs.count / 50)
    assert price <= evaluator.price + 1e-12
    assert evaluator.context.passes.forward * 50 == pytest.approx(runs.count)
    assert evaluator.share == 21 / 50
    again = room < 2**30 and not damage.runs_model
    assert evaluator.price == evaluator.share * (2 if again else 1)


@pytest.mark.parametrize("room", [2**30, 10 * 3 * 4], ids=["kept", "not kept"])
def test_what_is_in_the_checkpoint_is_charged_what_it_took(monkeypatch, room):
    """An interrupted run goes on with the same numbers, to the last bit, after any number of batches."""
    monkeypatch.setattr(evaluator_module, "REFERENCE_BYTES", room)
    plans = [np.array(options) for options in ([0, 1, 2], [0, 0, 0], [0, 1, 2], [1, 1, 1])]

    def trail(evaluator, stop=None):
        found = []
        for options in plans:
            one = evaluator.measure(options, None if len(found) % 2 else lambda one: len(one.sums) > 7)
            found.append((one.value, one.se, evaluator.passes.used, evaluator.price))
            if stop is not None and len(found) == stop:
                break
        return found

    expected = trail(evaluator_of())
    for stop in (1, 2, 3, 4):
        kept = MemoryStore({})
        trail(evaluator_of(checkpoint=kept), stop)
        rows = kept.rows()
        resumed = evaluator_of(checkpoint=kept)
        runs = Runs(resumed.context.model)
        assert trail(resumed) == expected
        if stop == 4:
            assert runs.count == 0
        passes = PassBudget(100.0, free=rows)
        other = MemoryStore({})
        other.fill(rows)
        later = evaluator_of(checkpoint=other, passes=passes)
        runs = Runs(later.context.model)
        assert [one[:2] for one in trail(later)] == [one[:2] for one in expected]
        assert passes.used == pytest.approx(runs.count / 21)


def test_layers_of_a_group_and_tied_weights_are_one_decision():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.q, self.k = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            x = self.embed(tokens)
            return self.head(torch.softmax(self.q(x) @ self.k(x).mT, -1) @ x)

    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 9, (4, 5), generator=generator) for _ in range(2)]
    model = Tied().eval()
    layers = mps.layers(model, tokens[0], groups={"scores": ["q", "k"]})
    evaluator = evaluator_of(model, tokens, "w2a8 w4a8", layers=layers)
    assert sorted(len(decision.layers) for decision in evaluator.context.decisions) == [2, 2]
    for options in ([0, 1], [1, 0]):
        found = evaluator.measure(np.array(options))
        plan = plan_of(evaluator, options)
        assert plan["q"] == plan["k"]
        assert plan["embed"] == plan["head"]
        expected = mps.evaluate(model, tokens, plan)
        assert found.value == pytest.approx(expected.kl, abs=1e-12)
        assert found.se == pytest.approx(expected.kl_se, abs=1e-12)


def test_a_model_in_bfloat16():
    model = net().bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches()]
    evaluator = evaluator_of(model, data)
    found = evaluator.measure(np.array([0, 1, 2]))
    expected = mps.evaluate(model, data, plan_of(evaluator, [0, 1, 2]))
    assert (found.value, found.se) == pytest.approx((expected.kl, expected.kl_se), abs=1e-12)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_model_is_whole_after_an_interruption(error):
    model = net()
    fails = []

    def interrupts(_module, _args):
        if fails:
            raise error

    evaluator = evaluator_of(model, precisions="w2a8 w4a8")
    model[4].register_forward_pre_hook(interrupts)
    before, hooks = state_fingerprint(model), [len(m._forward_pre_hooks) for m in model.modules()]
    fails.append(True)
    with pytest.raises((mps.EstimatorError, KeyboardInterrupt)):
        evaluator.measure(np.array([0, 0, 0]))
    assert state_fingerprint(model) == before
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    fails.clear()
    assert (
        evaluator.measure(np.array([0, 0, 0])).value
        == evaluator_of(precisions="w2a8 w4a8").measure(np.array([0, 0, 0])).value
    )


def test_damage_that_is_not_finite_is_refused_with_the_plan():
    model = net()
    evaluator = evaluator_of(model)

    def overflows(module, _args, output):
        return output if torch.equal(module.weight, weight) else output * math.inf

    weight = model[0].weight.detach().clone()
    model[0].register_forward_hook(overflows)
    with pytest.raises(mps.EstimatorError, match=r"not finite \(select part, batch 0\): 0=w2 2=w4 4=w4"):
        evaluator.measure(np.array([0, 2, 2]))


def test_a_metric_that_is_not_finite_is_refused():
    with pytest.raises(mps.EstimatorError, match="not finite"):
        evaluator_of(damage=Own(lambda model, batch: math.nan)).measure(np.array([0, 2, 2]))


def test_missing_labels_are_refused():
    evaluator = evaluator_of(data=[x for x, _ in batches()], damage=Loss())
    with pytest.raises(mps.EstimatorError, match="the loss needs labels"):
        evaluator.measure(np.array([0, 0, 0]))


def test_data_that_is_not_finite_is_told_from_plans_that_are_not():
    evaluator = evaluator_of()
    evaluator.batches[2][0][4, 1] = math.nan
    with pytest.raises(mps.EstimatorError, match=r"the unquantized model is not finite \(select part, batch 2\)"):
        evaluator.measure(np.array([0, 2, 2]))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", ["kl", "loss", "accuracy"])
def test_a_batch_without_any_prediction_counts_for_nothing(metric):
    data = batches()
    empty = [(data[0][0], torch.full_like(data[0][1], -100)), *data[1:]]
    with_it, without = (
        evaluator_of(data=empty, damage=METRICS[metric]()),
        evaluator_of(data=data[1:], damage=METRICS[metric]()),
    )
    seen = []
    with_it.measure(np.array([0, 2, 2]), lambda found: bool(seen.append((found.value, found.se))))
    assert all(math.isnan(value) for value in seen[0])
    found, expected = (evaluator.measure(np.array([0, 2, 2])) for evaluator in (with_it, without))
    assert found.value == pytest.approx(expected.value, abs=1e-12)
    assert found.se == pytest.approx(expected.se, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        (lambda model, batch: batch["x"], "TypeError"),
        (lambda model, batch: model(batch[0]), "one number"),
        (lambda model, batch: None, "NoneType"),
    ],
)
def test_a_metric_that_fails_is_told(metric, words):
    with pytest.raises(mps.EstimatorError, match="the metric fails, expected metric") as caught:
        evaluator_of(damage=Own(metric)).measure(np.array([0, 2, 2]))
    assert words in str(caught.value)


@pytest.mark.parametrize("shift", [2, -1])
def test_labels_that_are_no_output_are_refused(shift):
    data = [(x, y + shift) for x, y in batches()]
    with pytest.raises(mps.EstimatorError, match="but the model has 3 outputs: expected 0 to 2"):
        evaluator_of(data=data, damage=Loss()).measure(np.array([0, 2, 2]))


def test_plans_of_an_earlier_search_are_recalled_at_no_cost_but_not_those_that_it_dropped():
    first = evaluator_of()
    whole = first.measure(np.array([0, 2, 2]))
    first.measure(np.array([1, 1, 1]), lambda found: True)
    kept = first.context.checkpoint
    second = evaluator_of(checkpoint=kept, passes=PassBudget(100.0, free=kept.rows()))
    runs = Runs(second.context.model)
    assert [options.tolist() for options in second.recall()] == [[0, 2, 2]]
    assert second.known[0, 2, 2].sums.tolist() == whole.sums.tolist()
    assert (second.passes.used, runs.count, len(second.known)) == (0.0, 0, 1)
    assert evaluator_of(checkpoint=kept).recall() == []  # its own work, not that of an earlier search
