"""What is forecast beside what the work holds, and what does not fit."""

import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mpsearch as mps
from mpsearch.models.peak_memory import live_bytes
from mpsearch.plan_search import searching
from mpsearch.plan_search.forecasting import search_forecast
from mpsearch.sensitivity import (
    Fisher,
    FisherProjection,
    HessianTrace,
    KLDivergence,
    LayerOutputError,
    RelativeWeightError,
)

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
OPTIONS = mps.precisions("w2 w4 w8")


def decoder(layers=3, classes=1000, width=64):
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "vocab_size": classes}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).eval()
    ids = [torch.randint(0, classes, (4, 32)) for _ in range(3)]
    return model, [{"input_ids": x, "labels": x} for x in ids]


def images(width=32, classes=10):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1, stride=2),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    ).eval()
    return model, [(torch.randn(8, 3, 32, 32), torch.randint(0, classes, (8,))) for _ in range(3)]


def weights(model):
    return sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})


@pytest.mark.parametrize("made", [decoder, images])
@pytest.mark.parametrize(
    "estimator",
    [KLDivergence(), FisherProjection(2), Fisher(1), LayerOutputError(), RelativeWeightError(), HessianTrace(2)],
    ids=lambda estimator: type(estimator).__name__,
)
def test_the_bytes_of_scoring(made, estimator):
    model, data = made()
    with mps.Calibration(model, data, OPTIONS, progress=False) as calibration:
        told = calibration.forecast(estimator)
        _ = calibration.base, calibration.choice
        with live_bytes() as peak:
            calibration.profile(estimator)
    assert told.memory["weights"] == weights(model)
    held = weights(model) + peak.bytes
    assert held <= told.memory_bytes <= 1.5 * held
    assert told.seconds > 0


@pytest.mark.parametrize("made", [decoder, images])
@pytest.mark.parametrize("texts", [["w4"], ["w4", "w2", "w8"]])
def test_the_bytes_of_measuring_plans(made, texts):
    model, data = made()
    layers = mps.layers(model, data[0])
    plans = [mps.Plan(dict.fromkeys([layer.name for layer in layers], mps.Precision(text[1:]))) for text in texts]
    with mps.Calibration(model, data, progress=False, metric="kl") as calibration:
        told = calibration.forecast(plans if len(plans) > 1 else plans[0])
        _ = calibration.choice
        with live_bytes() as peak:
            calibration.measure(plans) if len(plans) > 1 else calibration.evaluate(plans[0])
    held = weights(model) + peak.bytes
    assert held <= told.memory_bytes <= 1.5 * held
    assert told.forward == 1 + len(plans)


def test_a_forecast_leaves_no_trace():
    model, data = decoder()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    told = mps.forecast(model, data, [KLDivergence(), FisherProjection(2)], OPTIONS)
    assert told.forward > 3
    assert told.backward >= 2
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("made", "passes"), [(decoder, 8), (images, 40)])
def test_the_bytes_of_a_search_and_its_refusal(monkeypatch, made, passes):
    model, data = made()
    data = 2 * data
    told = []

    def search(**limit):
        return mps.search(
            model, data, mps.Budget(average_bits=4), OPTIONS, metric="kl", max_passes=passes, progress=False, **limit
        )

    monkeypatch.setattr(searching, "search_forecast", lambda *work: told.append(search_forecast(*work)) or told[-1])
    with pytest.raises(mps.EstimatorError, match="this needs"):
        search(memory_bytes=weights(model))
    assert 0 < told[0].forward <= passes
    with live_bytes() as peak:
        search()
    assert len(told) == 1  # what is sure to fit is not tried
    held = weights(model) + peak.bytes
    assert held <= told[0].memory_bytes <= 1.6 * held
    search(memory_bytes=told[0].memory_bytes)


WORK = {
    "profile": lambda model, data, plan, **limit: mps.profile(model, data, FisherProjection(2), OPTIONS, **limit),
    "evaluate": lambda model, data, plan, **limit: mps.evaluate(model, data, plan, **limit),
    "measure_plans": lambda model, data, plan, **limit: mps.measure_plans(model, data, [plan, plan], **limit),
}


@pytest.mark.parametrize("name", WORK)
def test_one_byte_below_is_refused_and_what_fits_runs(name):
    model, data = images()
    plan = mps.Plan({"0": mps.Precision("4")})
    work = {"profile": FisherProjection(2), "evaluate": plan, "measure_plans": [plan, plan]}[name]
    needed = mps.forecast(model, data, work, OPTIONS).memory_bytes
    WORK[name](model, data, plan, memory_bytes=needed)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(
        mps.EstimatorError, match=r"this needs .* of memory \(.*one batch.*\), and .* are there \(the limit"
    ):
        WORK[name](model, data, plan, memory_bytes=needed - 1)
    handle.remove()
    assert len(calls) < 20  # one batch, and not the work


@pytest.mark.parametrize("limit", ["8 apples", -1, float("nan"), True])
def test_a_limit_that_is_no_amount(limit):
    model, data = images()
    with pytest.raises(mps.BudgetError, match="memory_bytes"):
        mps.profile(model, data, RelativeWeightError(), OPTIONS, memory_bytes=limit)


def test_limits_are_written_as_budgets_are():
    model, data = images()
    for limit in ("1GB", "1GiB", "90%", 10**9):
        mps.evaluate(model, data, mps.Plan({"0": mps.Precision("4")}), memory_bytes=limit)
    with pytest.raises(mps.EstimatorError, match="1\\.00 kB are there"):
        mps.evaluate(model, data, mps.Plan({"0": mps.Precision("4")}), memory_bytes="1kB")


def limited(code):
    """Run code in a process of its own; `limit(bytes)` leaves so much address space beyond what is in use."""
    start = """
        import resource, sys, warnings
        import torch
        from torch import nn
        import mpsearch as mps
        from mpsearch.sensitivity import FisherProjection, RelativeWeightError
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)

        def limit(room):
            used = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
            resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.getrlimit(resource.RLIMIT_AS)[1]))
    """
    text = textwrap.dedent(start) + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=600, env={**os.environ})


@linux
@pytest.mark.slow  # thousands of samples in a batch
def test_what_is_free_of_the_address_space_counts_before_work():
    """As where the kernel would stop the process: told, with the numbers."""
    done = limited("""
        model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, 256)) for _ in range(4)))
        data = [torch.randn(4096, 256) for _ in range(2)]
        mps.profile(model, [data[0][:8]], FisherProjection(), mps.precisions("w4"), progress=False)  # all libraries are loaded
        limit(300 * 10**6)
        try:
            mps.profile(model, data, FisherProjection(), mps.precisions("w4"), progress=False)
        except mps.EstimatorError as error:
            print(error)
    """)
    assert done.stdout.startswith("this needs"), (done.stdout, done.stderr)
    assert "RLIMIT_AS" in done.stdout
    assert re.search(r"\d+ of 4096 samples of a batch", done.stdout)


@linux
def test_memory_that_runs_out_in_the_middle_is_one_error_and_the_model_is_as_it_was():
    done = limited("""
        class Grabbing(nn.Module):
            def forward(self, x):
                if grabbing:
                    torch.empty(2**34).fill_(0)
                return x

        grabbing = []
        model = nn.Sequential(nn.Linear(8, 8), Grabbing(), nn.Linear(8, 4)).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        limit(10**9)
        data = [torch.randn(4, 8)]
        plan = mps.Plan({"0": mps.Precision("4")})

        def metric(model, batch):
            grabbing.append(1)
            try:
                model(batch)
            finally:
                grabbing.clear()
            return 0.0

        try:
            mps.evaluate(model, data, plan, metric=metric, progress=False)
        except mps.EstimatorError as error:
            print(error)
        print(model.training, all(torch.equal(value, before[name]) for name, value in model.state_dict().items()))
    """)
    told, state = done.stdout.splitlines()
    assert told.startswith("out of memory: weights take"), (done.stdout, done.stderr)
    assert "RLIMIT_AS" in told
    assert state == "True True"
