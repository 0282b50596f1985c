"""The contract suite of estimators: every registered one passes, every way to cheat is caught."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.errors import EstimatorError
from mpsearch.estimation.estimator import Estimate
from mpsearch.estimation.passes import Passes
from mpsearch.models.running import call
from mpsearch.sensitivity import ESTIMATORS, HessianTrace, KLDivergence
from mpsearch.testing import check_estimator, estimator_checks

FEW_DRAWS = {"hessian-trace": HessianTrace(num_samples=2)}
CONVERGING = {"hessian-top-eigenvalue"}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_registered_estimators(name):
    check_estimator(FEW_DRAWS.get(name) or ESTIMATORS[name](), stops_early=name in CONVERGING)


class Honest:
    """Squared error of the weights, after one pass over the data; each broken one below differs in one thing."""

    unit = "relative"

    def estimate(self, context):
        for batch in context.batches:
            call(context.model, batch)
            context.passes.add(len(context.batches), forward=1)
        return Estimate(self.scores(context), unit=self.unit)

    def scores(self, context):
        return np.array(
            [[self.cell(context, decision, p) for p in context.precisions] for decision in context.decisions]
        )

    def cell(self, context, decision, precision):
        return sum(squared(context, layer, precision) for layer in context.parameters(decision).values())

    def cost(self, batches, decisions, precisions):
        return Passes(1, 0)


def squared(context, layer, precision):
    return float(context.perturbation(layer, precision).double().square().sum())


def test_an_honest_estimator_passes():
    check_estimator(Honest())
    check_estimator(broken(unit="nats"))


def broken(**methods):
    """`Honest` with methods replaced; `after` changes what `estimate` returns."""
    after = methods.pop("after", None)
    if after is not None:
        methods["estimate"] = lambda self, context: after(self, context, Honest.estimate(self, context))
    return type("Broken", (Honest,), methods)()


def returns(**fields):
    """The honest answer with fields replaced by functions of the scores."""
    return lambda self, context, answer: Estimate(
        **{
            "sensitivity": answer.sensitivity,
            "unit": "relative",
            **{k: v(answer.sensitivity) for k, v in fields.items()},
        }
    )


def writes_a_weight(self, context, answer):
    context.module(context.decisions[0].layers[0]).weight.data.mul_(2)
    return answer


def moves_a_weight(self, context, answer):
    weight = context.module(context.decisions[0].layers[0]).weight
    weight.data = weight.data.clone()
    return answer


def writes_the_data(self, context, answer):
    batch = context.batches[0]
    (batch if isinstance(batch, torch.Tensor) else batch["labels"] if isinstance(batch, dict) else batch[0]).zero_()
    return answer


def keeps_notes(self, context, answer):
    self.last = context.decisions[0].name
    return answer


def swaps_without_finally(self, context):
    weight = context.module(context.decisions[0].layers[0]).weight
    original, weight.data = weight.data, weight.data * 2
    answer = Honest.estimate(self, context)
    weight.data = original
    return Estimate(answer.sensitivity * 0, unit="relative")


def swallows(error):
    def estimate(self, context):
        try:
            return Honest.estimate(self, context)
        except error:
            return Estimate(np.zeros((len(context.decisions), len(context.precisions))), unit="relative")

    return estimate


def disguises_an_interrupt(self, context):
    try:
        return Honest.estimate(self, context)
    except KeyboardInterrupt:
        raise EstimatorError("something went wrong") from None


def counts(forward):
    def after(self, context, answer):
        context.passes.forward = forward
        return answer

    return after


def divides_by_zero(self, context):
    raise ZeroDivisionError("float division by zero")


def refuses_everything(self, context):
    raise EstimatorError("not today")


def refuses_the_second_time(self, context):
    Broken.calls += 1
    if Broken.calls == 2:
        raise EstimatorError("not again")
    return Honest.estimate(self, context)


class Broken:
    calls = 0


def first_member(self, context, decision, precision):
    return squared(context, decision.layers[0], precision)


def each_tied_layer(self, context, decision, precision):
    return sum(squared(context, layer, precision) for layer in decision.layers)


def by_place(self, context):
    return Honest.scores(self, context) * np.arange(1, len(context.decisions) + 1)[:, None]


def by_place_of_precision(self, context):
    return Honest.scores(self, context) * np.arange(1, len(context.precisions) + 1)


def fewer_bits_better(self, context, decision, precision):
    error = Honest.cell(self, context, decision, precision)
    return 1 / error if error else 0.0


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (broken(after=returns(sensitivity=lambda s: s[:, :1])), r"has shape \(4, 1\), expected \(4, 4\)"),
        (broken(after=returns(sensitivity=lambda s: s.tolist())), "sensitivity is a list, expected a float64 array"),
        (broken(after=returns(sensitivity=lambda s: s.astype("f4"))), "is a float32 array, expected a float64 array"),
        (broken(after=returns(sensitivity=lambda s: s + np.inf)), "sensitivity is not finite"),
        (broken(after=returns(sensitivity_se=lambda s: s[0])), r"sensitivity_se has shape \(4,\)"),
        (broken(after=returns(sensitivity_se=lambda s: -s)), "a negative standard error"),
        (broken(after=returns(sensitivity_se=lambda s: s + np.inf)), "sensitivity_se is not finite"),
        (broken(after=returns(unit=lambda s: "bits")), "unit 'bits', expected one of nats, relative"),
        (broken(after=returns(facts=lambda s: {"array": s})), "cannot be JSON"),
        (broken(after=returns(sensitivity=lambda s: s + 1e-9)), "1e-09 for 'conv' at w16, which changes nothing"),
        (broken(after=returns(sensitivity=lambda s: s * float(torch.rand(())))), "sensitivity is .* and then"),
        (broken(after=returns(sensitivity=lambda s: s * np.random.rand())), "sensitivity is .* and then"),  # noqa: NPY002
        (broken(after=returns(sensitivity_se=lambda s: s * float(torch.rand(())))), "sensitivity_se is .* and then"),
        (broken(after=counts(0)), "1 forward passes were made, none is counted"),
        (broken(after=counts(0.5)), "1 forward passes were made, 0.5 are counted"),
        (broken(cost=lambda *_: Passes(0.9, 0)), r"1 forward passes, cost\(\) forecasts 0.9"),
        (broken(cost=lambda *_: Passes(3, 0)), r"single layer: 1 forward passes, cost\(\) forecasts 3"),
        (broken(cost=lambda *_: Passes(1, 1)), r"0 backward passes, cost\(\) forecasts 1"),
        (broken(after=writes_a_weight), "changed the model's parameters"),
        (broken(after=moves_a_weight), r"parameter conv.weight changed"),
        (broken(after=writes_the_data), "the data changed"),
        (broken(after=keeps_notes), "the settings changed"),
        (broken(estimate=swaps_without_finally), "parameter conv.weight changed after KeyboardInterrupt at call 1"),
        (broken(estimate=swallows(KeyboardInterrupt)), "KeyboardInterrupt at call 1 of .* was swallowed"),
        (broken(estimate=swallows(Exception)), "ValueError at call 1 of .* was swallowed"),
        (broken(estimate=disguises_an_interrupt), "EstimatorError: something went wrong"),
        (broken(estimate=divides_by_zero), "convolutions with batch norm: ZeroDivisionError"),
        (broken(estimate=refuses_everything), "refused 10 of 10 models"),
        (broken(estimate=refuses_the_second_time), "an answer, and then a refusal"),
        (broken(cell=first_member), "'2' alone is .*, in its group"),
        (broken(cell=each_tied_layer, unit="nats"), "as one layer called twice"),
        (broken(scores=by_place), "in reverse order"),
        (broken(scores=by_place_of_precision), "in reverse order"),
        (broken(cell=fewer_bits_better), "expected less for more bits"),
    ],
)
def test_broken_estimators_are_caught(estimator, message):
    Broken.calls = 0
    with pytest.raises(AssertionError, match=message):
        check_estimator(estimator)


def test_what_is_promised_can_be_told():
    estimator = broken(
        cell=lambda self, context, decision, p: float(Honest.cell(self, context, decision, p) > 0) * p.weight_bits
    )
    with pytest.raises(AssertionError, match="expected less for more bits"):
        check_estimator(estimator)
    check_estimator(estimator, monotone=False)


def test_a_forecast_of_what_converges_is_an_upper_bound():
    check_estimator(broken(cost=lambda *_: Passes(100, 5)), stops_early=True)
    with pytest.raises(AssertionError, match=r"1 forward passes, cost\(\) forecasts 0.5"):
        check_estimator(broken(cost=lambda *_: Passes(0.5, 5)), stops_early=True)


def test_a_stop_in_a_backward_pass_restores_too():
    def estimate(self, context):
        weight = context.module(context.decisions[0].layers[0]).weight.requires_grad_()
        for batch in context.batches:
            with torch.enable_grad():
                loss = call(context.model, batch).square().mean()
            context.passes.add(len(context.batches), forward=1, backward=1)
            original, weight.data = weight.data, weight.data.clone()
            torch.autograd.grad(loss, weight)
            weight.data = original
        return Estimate(Honest.scores(self, context), unit="relative")

    with pytest.raises(AssertionError, match=r"conv.weight changed after KeyboardInterrupt at call 2 \(backward\)"):
        check_estimator(broken(estimate=estimate, cost=lambda *_: Passes(1, 1)))


def test_with_a_seed_the_order_of_layers_may_matter():
    def scores(self, context):
        draws = np.random.default_rng(self.seed).uniform(1, 1.1, (len(context.decisions), 1))
        return Honest.scores(self, context) * draws

    with pytest.raises(AttributeError, match="seed"):
        broken(scores=scores).scores(None)
    check_estimator(broken(scores=scores, seed=0))


def test_refusing_what_is_missing_is_no_fault():
    def estimate(self, context):
        if not context.has_labels():
            raise EstimatorError("needs labels")
        return Honest.estimate(self, context)

    check_estimator(broken(estimate=estimate))


def test_ctrl_c_of_the_user_comes_through():
    def estimate(self, context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_estimator(broken(estimate=estimate))


def test_a_model_of_ones_own():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), [torch.randn(5, 4)]
    state = torch.get_rng_state()
    check_estimator(KLDivergence(), model=model, batches=iter(batches), precisions=mps.precisions("w3 w5"))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(AssertionError, match=r"Broken.* on the given model: .*shape \(2, 1\), expected \(2, 2\)"):
        check_estimator(
            broken(after=returns(sensitivity=lambda s: s[:, :1])),
            model=model,
            batches=batches,
            precisions=mps.precisions("w3 w5"),
        )
    with pytest.raises(EstimatorError, match="model and batches together"):
        check_estimator(KLDivergence(), model=model)


def test_one_failure_does_not_hide_the_others():
    """A score for what changes nothing, and no run counted: two checks fail, and the others hold."""

    class Broken(Honest):
        def estimate(self, context):
            for batch in context.batches:
                call(context.model, batch)
            return Estimate(1.0 + self.scores(context), unit="relative")

    failed = []
    for name, check in estimator_checks(Broken()):
        try:
            check()
        except AssertionError:
            failed.append(name)
    assert failed == ["nothing costs nothing", "passes"]
