"""ONNX Runtime with static ranges, really run and read back."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.quantize import RoundToNearest

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


def test_every_width_in_one_model(cnn, tmp_path):
    plan = mps.Plan({"0": mps.Precision("3", "8"), "2": mps.Precision("8", "8"), "4": mps.Precision("2", "8")})
    found = export.verify(plan, cnn, "onnxruntime-static", example=X)
    assert {check.name: check.precision for check in found.layers} == dict(plan)
    assert [check.code_range for check in found.layers] == [(-3, 3), (-127, 127), (-1, 1)]
    made = export.onnxruntime_static(plan, cnn, example=(X, None), path=tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == made.SerializeToString()
    session = ort.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    with torch.no_grad():
        for name, precision in plan.items():
            weight = cnn.get_submodule(name).weight
            weight.copy_(RoundToNearest()(weight, precision))
        expected = cnn(X)
    assert (torch.from_numpy(out) - expected).abs().max() < 0.03 * expected.abs().max()  # 8 bits of input


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
