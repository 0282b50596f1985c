"""Inputs of layers: whichever way they are passed, quantized or refused, never silently skipped."""

import itertools

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.core.precision import Precision
from mpsearch.quantizers.fake_quantization import input_quantizer, input_ranges, inputs, quantized
from mpsearch.quantizers.quantizer import checked_quantizer
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import HessianTrace, KLDivergence


class Calls(nn.Module):
    """One linear layer, its input passed by position or by keyword."""

    def __init__(self, keyword):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)
        self.keyword = keyword

    def forward(self, x):
        return self.fc(input=x) if self.keyword else self.fc(x)


class Scaled(nn.Linear):
    """A layer with more than one tensor argument."""

    def forward(self, input, gain=None, mask=None, **more):
        return super().forward(input) * (1 if gain is None else gain)


def batch(seed=0):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def by_both_ways(function):
    return [function(Calls(keyword)) for keyword in (False, True)]


def test_an_input_by_keyword_is_quantized_as_one_by_position():
    plan = mps.Plan({"fc": Precision("16", "2")})
    position, keyword = by_both_ways(lambda model: mps.evaluate(model, [batch()], plan))
    assert keyword.kl == position.kl > 0
    model = Calls(True)
    x = batch()
    low, high = float(x.min()), float(x.max())
    truth = nn.functional.linear(RoundToNearest().activation_values(x, "2", low, high), model.fc.weight, model.fc.bias)
    with quantized(model, {"fc": Precision("16", "2")}, RoundToNearest(), {"fc": (low, high)}) as changed:
        assert changed
        assert torch.equal(model(x), truth)


def test_ranges_see_inputs_by_keyword():
    x = batch()
    expected = {"fc": (float(x.min()), float(x.max()))}
    assert by_both_ways(lambda model: input_ranges(model, [x[:3], x[3:]], ["fc"])) == [expected, expected]


@pytest.mark.parametrize("estimator", [HessianTrace(4), KLDivergence()])
def test_estimators_see_inputs_by_keyword(estimator):
    options = mps.precisions("w16a2 w4a4")
    position, keyword = by_both_ways(
        lambda model: mps.profile(model, [batch()], estimator, options, loss="kl").sensitivity
    )
    assert (position > 0).all()
    assert (keyword == position).all()


def test_the_first_floating_point_argument_in_the_order_of_the_signature():
    layer = Scaled(4, 3)
    x, gain, mask = batch(), torch.full((3,), 2.0), torch.ones(6, dtype=torch.bool)
    truth = layer(x * 0, gain)
    with inputs({layer: lambda given: given * 0}):
        for output in (
            layer(x, gain),
            layer(x, gain=gain),
            layer(gain=gain, input=x),
            layer(mask=mask, gain=gain, input=x, other=gain),
        ):
            assert torch.equal(output, truth)
    embedding = nn.Embedding(5, 2)
    with inputs({embedding: lambda given: given * 0}):
        assert torch.equal(embedding(input=torch.tensor([3])), embedding.weight[[3]])


def test_nothing_is_left_behind():
    model = Calls(True)
    with pytest.raises(ValueError, match="stop"), inputs({model.fc: lambda x: x}):
        raise ValueError("stop")
    assert not model.fc._forward_pre_hooks
    assert not model.fc._forward_pre_hooks_with_kwargs


class Experts(nn.Module):
    """Rows go to one of two layers by the sign of their sum."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        up = x.sum(1) > 0
        out = x.new_zeros(len(x), 3)
        out[up] = self.first(x[up])
        if not up.all():
            out[~up] = self.second(input=x[~up])
        return out


def test_a_layer_that_calibration_never_reached_is_refused_by_name():
    model = Experts()
    calibration, data = [batch().abs()], [batch()]
    plan = mps.Plan({"first": Precision("16", "8"), "second": Precision("4", "8")})
    with pytest.raises(mps.EstimatorError, match=r"input of layer 'second' at w4a8: no calibrated range"):
        mps.evaluate(model, data, plan, calibration=calibration)
    assert mps.evaluate(model, calibration, plan).kl > 0  # nobody asks for the range that is missing
    token = mps.evaluate(model, data, plan, calibration=calibration, quantizer=RoundToNearest(activation="token"))
    assert token.kl > 0
    blocks = mps.Plan({"second": Precision("16", "mxfp8")})
    assert mps.evaluate(model, data, blocks, calibration=calibration).kl > 0  # blocks have scales of their own


def test_an_expert_without_tokens_passes_nothing_on():
    function = input_quantizer(nn.Linear(4, 4), "fc", Precision("16", "8"), RoundToNearest(), {})
    assert function(torch.ones(0, 4)).shape == (0, 4)


def test_a_quantizer_of_inputs_of_ones_own_gets_the_range():
    seen = []

    class Own:
        def __call__(self, weight, precision):
            return weight

        def activation_values(self, x, name, low, high):
            seen.append((name, low, high))
            return x

    model, x = Calls(True), batch()
    table = mps.profile(model, [x], KLDivergence(), mps.precisions("w16a5"), quantizer=Own())
    assert table.sensitivity.tolist() == [[0.0]]
    assert seen[0] == ("5", float(x.min()), float(x.max()))


def test_a_quantizer_may_differ_by_layer():
    class Own:
        def of_layer(self, name):
            return lambda weight, precision: weight * (2 if name == "0" else 3)

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plan = {"0": Precision("4"), "1": Precision("4")}
    before = [layer.weight.clone() for layer in model]
    with quantized(model, plan, checked_quantizer(Own()), {}):
        assert torch.equal(model[0].weight, before[0] * 2)
        assert torch.equal(model[1].weight, before[1] * 3)


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Linear(32, 2), (2, 5, 32), 2),
        (nn.Conv1d(32, 2, 3), (2, 32, 5), 1),
        (nn.Conv2d(32, 2, 3), (2, 32, 4, 5), 1),
        (nn.Conv2d(32, 2, 3), (32, 4, 5), 0),
        (nn.ConvTranspose2d(32, 2, 3), (2, 32, 4, 5), 1),
    ],
)
@pytest.mark.parametrize("text", ["w16amxfp4", "w16a4"])
def test_blocks_and_tokens_lie_along_the_channels(module, shape, axis, text):
    seen = []
    model = nn.Sequential(module)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    handle = module.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    with quantized(model, {"0": Precision.parse(text)}, RoundToNearest(activation="token"), {}):
        model(x)
    handle.remove()
    for place in itertools.product(*(range(n) for k, n in enumerate(shape) if k != axis)):
        index = (*place[:axis], slice(None), *place[axis:])
        truth = RoundToNearest(activation="token").activation_values(x[index], Precision.parse(text).activation, 0, 0)
        assert torch.equal(seen[0][index], truth)
