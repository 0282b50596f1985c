"""Quantizers that look at inputs: statistics against the layers themselves, methods against loops with explicit matrices."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import Precision
from mpsearch.models.modules.weights import canonical
from mpsearch.quantizers import gptq
from mpsearch.quantizers.awq import ActivationAware, _output_error
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.input_statistics import InputStatistics, input_statistics
from mpsearch.quantizers.packing import packed_bytes
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.quantizers.smoothquant import SmoothQuant


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


MODULES = [
    (nn.Linear(6, 4), (5, 3, 6)),
    (nn.Conv1d(4, 6, 3, padding=1, groups=2), (3, 4, 7)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 6, 5)),
    (nn.Conv2d(4, 4, 3, groups=4, dilation=2), (3, 4, 6, 7)),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), (3, 4, 6, 7)),
    (nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3)),
]


@pytest.mark.parametrize(("module", "shape"), MODULES)
def test_statistics_against_the_layer_itself(module, shape):
    model = nn.Sequential(module)
    x = normal(*shape) * 2 + 0.3
    found = input_statistics(model, [x[:1], x[1:]])["0"]
    change = normal(*module.weight.shape, seed=1)
    parameters = {"weight": change} if module.bias is None else {"weight": change, "bias": module.bias.detach() * 0}
    output = torch.func.functional_call(module, parameters, x)
    positions = output.numel() / len(change)  # as many outputs as rows
    error = float(_output_error(change, found.gram))
    assert error == pytest.approx(float(output.double().square().sum()) / positions, rel=1e-4)
    channels = x if isinstance(module, nn.Linear) else x.movedim(1, -1)
    flat = channels.reshape(-1, channels.shape[-1])
    assert torch.equal(found.low, flat.amin(0))
    assert torch.equal(found.high, flat.amax(0))
    torch.testing.assert_close(found.mean_size.float(), flat.abs().mean(0))
    weight = canonical(module).detach()
    for channel in range(flat.shape[1]):
        per = weight.shape[1]
        groups = flat.shape[1] // per
        rows = weight.reshape(groups, -1, *weight.shape[1:])[channel // per]
        assert float(found.weight_size[channel]) == float(rows[:, channel % per].abs().max())


def correlated(rows=400, channels=12, seed=0):
    return (
        normal(rows, channels, seed=seed) @ normal(channels, channels, seed=seed + 1) * (1 + torch.arange(channels) / 3)
    )


def statistics_of(weight, x):
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    return {"fc": input_statistics(model, [x])["0"]}


def surgeon(weight, gram, round_column, damping):
    """Optimal brain surgery with the order of columns fixed, the inverse made anew at every step (GPTQ, section 3)."""
    hessian = gram + damping * np.diag(gram).mean() * np.eye(len(gram))
    left, found = weight.copy(), np.zeros_like(weight)
    for j in range(len(gram)):
        inverse = np.linalg.inv(hessian[j:, j:])
        found[:, j] = round_column(left[:, j], j)
        error = (left[:, j] - found[:, j]) / inverse[0, 0]
        left[:, j:] -= np.outer(error, inverse[0])
    return found


@pytest.mark.parametrize("text", ["w3", "w2g5", "w4g4", "wfp4_e2m1", "wmxfp4", "wnvfp4", "wnf4g6", "wbfp4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "activation_order"), [(5, False), (128, False), (5, True)])
def test_gptq_is_optimal_brain_surgery(monkeypatch, text, symmetric, columns, activation_order):
    monkeypatch.setattr(gptq, "_COLUMNS", columns)
    w, precision = normal(7, 12, seed=5).double(), Precision.parse(text)
    statistics = statistics_of(w, correlated())
    inner = RoundToNearest(symmetric=symmetric)
    codes = inner.codes(w, precision)
    steps, zeros = codes.steps_and_zeros()
    levels = codes.grid.decode(torch.arange(2**precision.weight_bits), torch.float64).numpy()
    levels = levels[np.isfinite(levels)][1 if symmetric and precision.weight.isdecimal() else 0 :]
    if text == "wbfp4":
        levels = np.arange(-7, 8)

    def round_column(values, j):
        grid = (levels[None] - zeros[:, j, None].numpy()) * steps[:, j, None].numpy()
        return grid[np.arange(len(values)), np.abs(values[:, None] - grid).argmin(1)]

    gram = statistics["fc"].gram[0].numpy()
    order = sorted(range(12), key=lambda j: -gram[j, j]) if activation_order else list(range(12))
    truth = np.empty_like(w.numpy())
    truth[:, order] = surgeon(
        w.numpy()[:, order], gram[np.ix_(order, order)], lambda v, j: round_column(v, order[j]), 0.01
    )
    found = GPTQ(statistics, activation_order=activation_order, quantizer=inner).of_layer("fc")(w, precision)
    np.testing.assert_allclose(found.numpy(), truth, rtol=1e-6, atol=1e-9)


def test_gptq_beats_rounding_where_inputs_are_correlated_and_equals_it_where_not():
    w, x = normal(16, 64, seed=5), correlated(600, 64)
    statistics = statistics_of(w, x)
    for text in ("w2", "w3", "w4", "w6", "wfp4_e2m1"):
        precision = Precision.parse(text)
        errors = [
            float(((q(w, precision) - w) @ x.T).square().sum())
            for q in (GPTQ(statistics).of_layer("fc"), RoundToNearest())
        ]
        assert errors[0] < 0.8 * errors[1]
    white = InputStatistics(torch.eye(64).double()[None] * 3, *torch.ones(4, 64))
    quantizer = GPTQ({"fc": white}).of_layer("fc")
    torch.testing.assert_close(quantizer(w, Precision("3")), RoundToNearest()(w, Precision("3")))
    for text in ("bf16", "16"):
        assert torch.equal(quantizer(w, Precision(text)), RoundToNearest()(w, Precision(text)))


def test_awq_is_the_best_of_its_scales():
    w, x = normal(9, 12, seed=5), correlated()
    x[:, 4] *= 20
    statistics = statistics_of(w, x)
    for text in ("w3", "w2g4"):
        precision, tried = Precision.parse(text), []
        for step in range(5):
            scale = x.abs().mean(0) ** (step / 5)
            scale = scale / (scale.max() * scale.min()).sqrt()
            value = RoundToNearest()(w * scale, precision) / scale
            tried.append((float(((value - w) @ x.T).square().sum()), value))
        found = ActivationAware(statistics, steps=5).of_layer("fc")(w, precision)
        best = min(tried, key=lambda pair: pair[0])
        torch.testing.assert_close(found, best[1], rtol=1e-4, atol=1e-5)
        assert best[0] < 0.9 * tried[0][0]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_smoothquant_by_its_formula(alpha):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    x = normal(3, 4, 6, 5) * torch.tensor([1.0, 30, 0.1, 2])[:, None, None]
    quantizer = SmoothQuant(input_statistics(model, [x]), alpha)
    w = model[0].weight.detach()
    scale = []
    for channel in range(4):
        rows = w[3 * (channel // 2) : 3 * (channel // 2) + 3, channel % 2]
        scale.append(float(x[:, channel].abs().max()) ** alpha / float(rows.abs().max()) ** (1 - alpha))
    scale = torch.tensor(scale)
    by_row = torch.stack([scale[:2]] * 3 + [scale[2:]] * 3)[:, :, None, None]
    truth = RoundToNearest()(w * by_row, Precision("4")) / by_row
    torch.testing.assert_close(quantizer.of_layer("0")(w, Precision("4")), truth, rtol=1e-4, atol=1e-6)
    smooth = x / scale[:, None, None]
    values = (
        RoundToNearest().activation_values(smooth, "4", float(smooth.min()), float(smooth.max())) * scale[:, None, None]
    )
    seen = []
    handle = model[0].register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    mps.evaluate(model, [x], mps.Plan({"0": Precision("4", "4")}), quantizer=quantizer)
    handle.remove()
    torch.testing.assert_close(seen[-1], values, rtol=1e-4, atol=1e-5)


def test_channels_without_inputs_or_weights_do_no_harm():
    w, x = normal(4, 6), normal(20, 6)
    x[:, 1] = 0
    w[:, 2] = 0
    statistics = statistics_of(w, x)
    for make in (SmoothQuant, ActivationAware, GPTQ):
        quantizer = make(statistics).of_layer("fc")
        assert quantizer(w, Precision("4")).isfinite().all()
    assert SmoothQuant(statistics).of_layer("fc").activation_values(x, "8", 0, 0).isfinite().all()
    dead = statistics_of(w, x * 0)
    assert GPTQ(dead).of_layer("fc")(w, Precision("4")).isfinite().all()


@pytest.mark.parametrize("make", [SmoothQuant, ActivationAware, GPTQ])
def test_the_doors_take_them(make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5)).bfloat16()
    x = normal(64, 2, 4, 4).bfloat16()
    model.train()
    quantizer = make(input_statistics(model, [x]))
    assert model.training
    plan = mps.Plan({"0": Precision("3", "8"), "3": Precision("3", "8")})
    kl = mps.evaluate(model, [x], plan, quantizer=quantizer).kl
    assert kl > 0
    if make is GPTQ:
        assert kl < mps.evaluate(model, [x], plan).kl
    table = mps.profile(model, [x], mps.sensitivity.KLDivergence(), mps.precisions("w3 w8"), quantizer=quantizer)
    assert table.usage["memory_bytes"].tolist() == [
        [packed_bytes(108, 6, 2, Precision(bits), RoundToNearest()) for bits in "38"],
        [packed_bytes(120, 5, 2, Precision(bits), RoundToNearest()) for bits in "38"],
    ]
    with pytest.raises(mps.EstimatorError, match="no input statistics of layer '4'; known: 0, 3"):
        quantizer.of_layer("4")
    with pytest.raises(mps.EstimatorError, match=r"looks at a layer's inputs: use of_layer"):
        quantizer(normal(2, 2), Precision("4"))


def test_layers_without_such_inputs():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    found = input_statistics(model, [torch.tensor([[1, 2]])])
    assert found.keys() == {"0", "1"}
    assert found["0"] is None
    for make in (SmoothQuant, ActivationAware, GPTQ):
        assert make(found).of_layer("0") == RoundToNearest()
    with pytest.raises(mps.EstimatorError, match="layer '0' is a Embedding, expected a linear layer or a convolution"):
        input_statistics(model, [torch.tensor([[1, 2]])], ["0"])
    with pytest.raises(mps.EstimatorError, match="input of layer '0' is not finite"):
        input_statistics(nn.Sequential(nn.Linear(1, 1)), [torch.tensor([[np.inf]])])


@pytest.mark.parametrize("make", [lambda: SmoothQuant({}, 1.5), lambda: ActivationAware({}, 0), lambda: GPTQ({}, 0.0)])
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(mps.EstimatorError, match="expected"):
        make()
