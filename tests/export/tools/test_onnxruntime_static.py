"""ONNX Runtime with static ranges, really run and read back."""

import copy
import warnings

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.quantizers import int8_products
from mpsearch.quantizers.rounding import RoundToNearest

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8).sin()


@pytest.fixture
def cnn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(128, 10)
        )
        return model.eval()


def precisely(model):
    """A session whose products are exact on every CPU, on `X`."""
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


def rounded(model, plan):
    """Outputs of the model with the weights that the plan says."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, precision in plan.items():
            weight = other.get_submodule(name).weight
            weight.copy_(RoundToNearest()(weight, precision))
        return other(X)


def test_every_width_in_one_model(cnn, tmp_path):
    plan = mps.Plan({"0": mps.Precision("3", "8"), "2": mps.Precision("8", "8"), "4": mps.Precision("2", "8")})
    found = export.verify(plan, cnn, "onnxruntime-static", example=X)
    assert {check.name: check.precision for check in found.layers} == dict(plan)
    assert [check.code_range for check in found.layers] == [(-3, 3), (-127, 127), (-1, 1)]
    made = export.onnxruntime_static(plan, cnn, example=(X, None), path=tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == made.SerializeToString()
    expected = rounded(cnn, plan)
    assert (precisely(made) - expected).abs().max() < 0.03 * expected.abs().max()  # 8 bits of input


def test_a_reduced_range_is_exact_on_every_cpu(cnn):
    """Codes within -63 .. 63, where products of pairs stay below 2^15; the session is an ordinary one."""
    plan = mps.Plan({"0": mps.Precision("8", "8"), "2": mps.Precision("5", "8"), "4": mps.Precision("8", "8")})
    found = export.verify(plan, cnn, "onnxruntime-static", example=X, reduce_range=True)
    assert [check.code_range for check in found.layers] == [(-63, 63), (-15, 15), (-63, 63)]
    assert {check.name: check.precision for check in found.layers} == dict(plan)
    made = export.onnxruntime_static(plan, cnn, example=X, reduce_range=True)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    expected = rounded(cnn, {"0": mps.Precision("7"), "2": mps.Precision("5"), "4": mps.Precision("7")})
    assert (torch.from_numpy(out) - expected).abs().max() < 0.03 * expected.abs().max()
    torch.testing.assert_close(torch.from_numpy(out), precisely(made), rtol=1e-4, atol=1e-5)


def test_a_machine_whose_products_saturate_is_told(cnn, monkeypatch):
    monkeypatch.setattr(int8_products, "saturation", lambda _engine: 0.49)
    plan = mps.Plan({"0": mps.Precision("8", "8"), "2": mps.Precision("7", "8"), "4": mps.Precision("8", "8")})
    with pytest.warns(
        UserWarning, match=r"products of onnxruntime saturate .* \('0' and 1 more\) .* reduce_range=True"
    ):
        export.verify(plan, cnn, "onnxruntime-static", example=X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export.onnxruntime_static(plan, cnn, example=X, reduce_range=True)
        export.onnxruntime_static(mps.Plan({"0": mps.Precision("7", "8")}), cnn, example=X)
    assert not [str(w.message) for w in caught if "saturate" in str(w.message)]


def test_a_transformer_with_layers_left_alone(llama, plan_of):
    plan = plan_of(llama, q_proj="w4a8", down_proj="w5a8", lm_head="w16")
    found = export.verify(plan, llama, "onnxruntime-static", example=torch.arange(12).reshape(2, 6))
    assert {check.name for check in found.layers} == {name for name in plan if name != "lm_head"}


def test_refusals(cnn):
    for text, words in (
        ("w4", "activations of 8 there"),
        ("w4a8g16", "a scale an output channel"),
        ("w9a8", "weights of 2"),
    ):
        with pytest.raises(mps.ExportError, match=words):
            export.onnxruntime_static(mps.Plan({"4": mps.Precision.parse(text)}), cnn, example=X)
    plan = mps.Plan({"4": mps.Precision("4", "8")})
    with pytest.raises(mps.ExportError, match="symmetric codes"):
        export.onnxruntime_static(plan, cnn, example=X, quantizer=RoundToNearest(symmetric=False))
    with pytest.raises(mps.ExportError, match=r"takes float32 weights, '4' has torch\.bfloat16"):
        export.onnxruntime_static(plan, cnn.bfloat16(), example=X.bfloat16())


def test_a_plan_that_leaves_all_alone_does(cnn):
    """An empty list of nodes means all of them to the library's quantizer."""
    made = export.onnxruntime_static(mps.Plan(dict.fromkeys("024", mps.Precision("16"))), cnn, example=X)
    assert not [node.op_type for node in made.graph.node if "Quantize" in node.op_type]
