"""`latency_s` with real kernels: that they compute the layer, what is refused, what is kept. Times themselves are only compared widely."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.quantizers.int8_products import saturation
from mpsearch.resources import MeasuredLatency, measured_latency
from mpsearch.resources.kernels import NoKernel
from mpsearch.resources.onnxruntime_kernels import onnxruntime_kernel
from mpsearch.resources.torch_kernels import torch_kernel
from mpsearch.resources.torchao_kernels import torchao_kernel


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 64), nn.ReLU(), nn.Linear(64, 64)
    ).eval()


X = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
OPTIONS = mps.precisions("w3 w8a8 wbf16abf16 wbf16 w16")


def measure(model, x=X, options=OPTIONS, **settings):
    settings = {"cache": None, "rounds": 2, **settings}
    return MeasuredLatency(**settings)(model, mps.layers(model, x), options, example=x)


def attainable(engine, text, tolerance):
    """What an engine can keep to: where its int8 products saturate, outputs of 8 bits are off by up to 15 %."""
    return tolerance + 0.3 * (text.startswith("w8") and saturation(engine) > 0)


def inputs(kind, dtype):
    torch.manual_seed(1)
    made = {
        "linear": (nn.Linear(128, 48), torch.randn(7, 128)),
        "rows": (nn.Linear(128, 48, bias=False), torch.randn(2, 7, 128)),
        "conv1d": (nn.Conv1d(8, 16, 3, stride=2), torch.randn(2, 8, 20)),
        "conv2d": (nn.Conv2d(8, 16, 3, padding=1, groups=2), torch.randn(2, 8, 9, 9)),
        "conv3d": (nn.Conv3d(4, 8, 2, bias=False), torch.randn(1, 4, 4, 4, 4)),
    }[kind]
    return made[0].to(dtype), made[1].to(dtype)


@pytest.mark.parametrize("kind", ["linear", "rows", "conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize(
    ("text", "tolerance"), [("w16", 0), ("w8a8", 0.03), ("wbf16abf16", 0.01), ("wfp32afp32", 1e-6)]
)
def test_a_kernel_computes_the_layer(kind, text, tolerance):
    module, x = inputs(kind, torch.float32)
    with torch.no_grad():
        found, true = torch_kernel(module, x, mps.Precision.parse(text))(), module(x)
    assert found.dtype == true.dtype
    assert float((found - true).norm() / true.norm()) <= attainable("torch", text, tolerance)


@pytest.mark.parametrize("kind", ["linear", "rows"])
@pytest.mark.parametrize(
    ("text", "tolerance"), [("w8", 0.02), ("w4g32", 0.12), ("w4g128", 0.15), ("wbf16", 0), ("w8a8", 0.03)]
)
def test_weights_alone_of_a_bfloat16_model(kind, text, tolerance):
    module, x = inputs(kind, torch.bfloat16)
    with torch.no_grad():
        found, true = torch_kernel(module, x, mps.Precision.parse(text))(), module(x)
    assert float((found.reshape(true.shape) - true).norm() / true.norm()) <= attainable("torch", text, tolerance)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("linear", "w3", "PyTorch runs no w3 of a linear layer with float32 inputs on cpu"),
        ("linear", "w4g32", "PyTorch runs no w4g32 of a linear layer with float32 inputs"),
        ("conv2d", "w8", "PyTorch runs no w8 of a conv2d layer"),
        ("linear", "wbf16", "weights of bf16 need inputs of bf16: wbf16abf16"),
    ],
)
def test_what_no_kernel_runs(kind, text, message):
    with pytest.raises(NoKernel, match=message):
        torch_kernel(*inputs(kind, torch.float32), mps.Precision.parse(text))  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [("w16", 1e-5), ("w8a8", 0.03), ("w8g32", 0.02), ("w4g16", 0.1), ("w4g128", 0.2), ("w2g32", 0.7)],
)
def test_kernels_of_onnxruntime(text, tolerance):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    module, x = inputs("rows", torch.float32)
    with torch.no_grad():
        true = module(x).numpy()
    found = onnxruntime_kernel(module, x, mps.Precision.parse(text))()
    engine = "onnxruntime MatMulNBits" if "g" in text else "onnxruntime"
    assert np.linalg.norm(found - true) / np.linalg.norm(true) <= attainable(engine, text, tolerance)
    with pytest.raises(NoKernel):
        onnxruntime_kernel(module, x, mps.Precision.parse("w3g32"))


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d"])
@pytest.mark.parametrize(("text", "tolerance"), [("w16", 1e-5), ("w8a8", 0.03)])
def test_convolutions_of_onnxruntime(kind, text, tolerance):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    module, x = inputs(kind, torch.float32)
    module.bias = None
    with torch.no_grad():
        true = module(x).numpy()
    found = onnxruntime_kernel(module, x, mps.Precision.parse(text))()
    assert np.linalg.norm(found - true) / np.linalg.norm(true) <= attainable("onnxruntime", text, tolerance)


@pytest.mark.parametrize(
    ("text", "tolerance"), [("w16", 0), ("w8a8", 0.03), ("w8", 0.02), ("w4", 0.3), ("w4g32", 0.15), ("w2g32", 0.8)]
)
def test_kernels_of_torchao(text, tolerance):
    pytest.importorskip("torchao")
    module, x = inputs("rows", torch.float32)
    with torch.no_grad():
        found, true = torchao_kernel(module, x, mps.Precision.parse(text))(), module(x)
    assert float((found - true).norm() / true.norm()) <= attainable("torch", text, tolerance)
    assert type(module.weight) is nn.Parameter  # the layer itself is left alone
    for refused in ("w4a8", "wnf4"):
        with pytest.raises(NoKernel):
            torchao_kernel(module, x, mps.Precision.parse(refused))


def test_without_onnxruntime(monkeypatch):
    model, x = net(), X
    layers = mps.layers(model, x)
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(mps.MissingPackage, match=r"pip install 'mpsearch\[onnxruntime\]'"):
        MeasuredLatency("onnxruntime", cache=None)(model, layers, OPTIONS, example=x)


def test_what_no_kernel_runs_is_not_allowed_in_the_table():
    model = net()
    table = mps.profile(
        model,
        [X],
        mps.sensitivity.KLDivergence(),
        OPTIONS,
        resources={"latency_s": MeasuredLatency(cache=None, rounds=1)},
        progress=False,
    )
    assert table.allowed.tolist() == [[False, True, True, False, True]] * 3
    assert (table.usage["latency_s"][table.allowed] > 0).all()


def test_a_layer_that_nothing_runs_is_refused_with_the_reasons():
    with pytest.raises(
        mps.TableError, match=r"layer '0': no kernel runs it: PyTorch runs no w3 of a conv2d.*; PyTorch runs no w5"
    ):
        measure(net(), options=mps.precisions("w3 w5"))


def test_a_layer_counts_once_a_call_and_the_rest_is_fixed():
    class Repeats(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(256, 256)

        def forward(self, x):
            for _ in range(4):
                x = self.fc(x)
            return x

    model, x = Repeats().eval(), torch.randn(8, 256)
    found = measure(model, x, mps.precisions("w16"), rounds=20)
    once = MeasuredLatency(cache=None, rounds=20)(
        nn.Sequential(model.fc), [mps.Layer("0", "linear", (256, 256))], mps.precisions("w16"), example=x
    )
    assert 2 < found.usage[0, 0] / once.usage[0, 0] < 8  # four calls
    assert found.fixed >= 0
    assert found.reference == pytest.approx(found.usage[0, 0] + found.fixed)


def test_timings_are_kept_and_not_taken_again(tmp_path, monkeypatch):
    cache, model = tmp_path / "folder" / "latency.json", net()
    first = measure(model, cache=cache)
    content = json.loads(cache.read_text())
    assert len(content) == 3 * 3  # three layers; w8a8, wbf16abf16 and w16 have kernels
    assert all(one["least_s"] > 0 and one["spread_s"] >= 0 for one in content.values())
    assert any("torch " + torch.__version__ in key and "1 threads | conv2d 8x4x3x3" in key for key in content)
    made = []
    monkeypatch.setitem(measured_latency._ENGINES, "torch", lambda *given: made.append(given) or torch_kernel(*given))
    again = measure(model, cache=cache)
    assert {str(precision) for _, _, precision in made} == {"w3", "wbf16"}  # refused ones are asked again
    assert np.array_equal(again.usage, first.usage, equal_nan=True)
    made.clear()
    measure(model, X[:2], cache=cache)
    assert len(made) == 3 * 5  # another batch is another shape
    measure(model, cache=cache, threads=2)
    assert len(json.loads(cache.read_text())) == 3 * 9


def test_a_file_that_holds_no_timings_is_refused(tmp_path):
    (tmp_path / "latency.json").write_text('{"a": 1}')
    with pytest.raises(mps.TableError, match="is no file of timings"):
        measure(net(), cache=tmp_path / "latency.json")


def test_threads_are_as_before():
    before = torch.get_num_threads()
    measure(net(), threads=before + 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("settings", [{"threads": 0}, {"rounds": 0}, {"engine": "tvm"}])
def test_settings(settings):
    with pytest.raises(mps.TableError, match="expected"):
        MeasuredLatency(**settings)


def test_the_variants_take_turns(monkeypatch):
    order = []
    kernels = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    measured_latency.time_in_turns(kernels, 2, torch.device("cpu"))
    assert order == ["a", "b"] * 3
