"""Quantizers by name, and the one adapter of functions and half-made objects."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import Precision
from mpsearch.quantizers import GPTQ, QUANTIZERS, Around, Quantizer, RoundToNearest, input_statistics, resolve_quantizer
from mpsearch.quantizers.quantizer import checked_quantizer
from mpsearch.sensitivity import KLDivergence


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


def batches(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_goes_by_its_name_through_every_door(name):
    model, data, held_out = net(), batches(), batches(1)
    table = mps.profile(model, data, KLDivergence(), mps.precisions("w2 w4"), quantizer=name, metric="kl")
    assert np.isfinite(table.sensitivity).all()
    plan = mps.Plan({"0": Precision("2"), "2": Precision("4")})
    evaluation = mps.evaluate(model, held_out, plan, quantizer=name, calibration=data, metric="kl")
    measured = mps.measure_plans(model, held_out, [plan], quantizer=name, calibration=data, metric="kl")
    assert evaluation.kl == measured.damage[0] > 0
    object_of_it = QUANTIZERS[name]()
    assert (
        mps.evaluate(model, held_out, plan, quantizer=object_of_it, calibration=data, metric="kl").kl == evaluation.kl
    )


def test_a_search_by_name_is_one_with_the_object():
    model, data = net(), batches()
    by_name, by_hand = (
        mps.search(
            model, data, mps.Budget(average_bits=3), mps.precisions("w2 w4"), quantizer=quantizer, metric="kl",
            effort="fast", progress=False,
        )
        for quantizer in ("awq", QUANTIZERS["awq"]())
    )  # fmt: skip
    assert by_name.plan == by_hand.plan
    assert by_name.plans.damage.tolist() == by_hand.plans.damage.tolist()


def test_what_looks_at_inputs_is_shown_the_calibration_data_of_the_run():
    model, data, held_out = net(), batches(), batches(1)
    plan = mps.Plan({"0": Precision("3"), "2": Precision("3")})
    by_hand = GPTQ(input_statistics(model, data))
    expected = mps.evaluate(model, held_out, plan, quantizer=by_hand, metric="kl").kl
    assert mps.evaluate(model, held_out, plan, quantizer="gptq", calibration=data, metric="kl").kl == expected
    assert mps.evaluate(model, held_out, plan, quantizer=GPTQ(), calibration=data, metric="kl").kl == expected
    assert mps.evaluate(model, data, plan, quantizer="gptq", calibration=data, metric="kl").kl != expected
    assert by_hand.calibrated(model, held_out) is by_hand


def test_without_data_it_says_what_is_missing():
    assert resolve_quantizer("awq").needs_data
    with pytest.raises(mps.EstimatorError, match=r"ActivationAware has no input statistics yet"):
        resolve_quantizer("awq").of_layer("0")


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(mps.EstimatorError, match="unknown quantizer 'gtpq'; did you mean 'gptq'"):
        mps.profile(net(), batches(), KLDivergence(), mps.precisions("w4"), quantizer="gtpq")


@pytest.mark.parametrize("wrong", [3, object(), RoundToNearest])
def test_what_is_no_quantizer_is_refused(wrong):
    with pytest.raises(mps.EstimatorError, match="expected a quantizer"):
        resolve_quantizer(wrong)


def test_a_function_becomes_a_quantizer_that_rounds_inputs_plainly():
    quantizer = checked_quantizer(lambda weight, precision: 2 * weight)
    assert isinstance(quantizer, Quantizer)
    x = torch.linspace(-1, 1, 7)
    assert torch.equal(quantizer(x, Precision("4")), 2 * x)
    assert torch.equal(
        quantizer.activation_values(x, "4", -1.0, 1.0), RoundToNearest().activation_values(x, "4", -1.0, 1.0)
    )
    assert (quantizer.symmetric, quantizer.granularity, quantizer.bytes_from) == (True, "channel", "assumed")
    assert not quantizer.needs_data
    assert checked_quantizer(quantizer) is quantizer


def test_an_object_keeps_what_it_has_of_the_protocol():
    class Own:
        symmetric = False

        def __call__(self, weight, precision):
            return weight

        def activation_values(self, x, name, low, high):
            return x + high

        def stored_bytes(self, layer, precision):
            return 7

    quantizer = checked_quantizer(Own())
    layer = mps.Layer("fc", "linear", (8, 4))
    assert not quantizer.symmetric
    assert quantizer.bytes_from == "told"
    assert quantizer.stored_bytes(layer, Precision("4")) == 7
    assert quantizer.stored_bytes(layer, Precision("16")) == 8 * 4 * 4
    assert quantizer.activation_values(torch.zeros(2), "4", 0.0, 3.0).tolist() == [3.0, 3.0]


def test_a_wrapper_leaves_to_the_one_within_what_it_does_not_say():
    class Wrapper:
        def __init__(self, quantizer):
            self.quantizer = quantizer

        def __call__(self, weight, precision):
            return self.quantizer(weight, precision)

    class Derived(Around):
        pass

    inner = RoundToNearest(symmetric=False, granularity="tensor", activation="token")
    layer, x = mps.Layer("fc", "linear", (8, 4)), torch.randn(3, 4)
    for quantizer in (checked_quantizer(Wrapper(inner)), checked_quantizer(Derived(inner))):
        assert (quantizer.symmetric, quantizer.granularity, quantizer.rounding) == (False, "tensor", inner)
        values = quantizer.activation_values(x, "4", math.nan, math.nan)
        assert torch.equal(values, inner.activation_values(x, "4", math.nan, math.nan))
    assert checked_quantizer(Derived(inner)).stored_bytes(layer, Precision("4")) == inner.stored_bytes(
        layer, Precision("4")
    )


def test_the_names_are_there():
    assert mps.Quantizer is Quantizer
    assert mps.quantizers.GPTQ is GPTQ
    assert all(isinstance(kind(), Quantizer) for kind in QUANTIZERS.values())
