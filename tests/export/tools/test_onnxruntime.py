"""ONNX Runtime, really run and read back."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.export.verification import REFERENCE
from mpsearch.quantizers import int8_products
from mpsearch.quantizers.int8_products import saturation
from mpsearch.quantizers.rounding import RoundToNearest

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.arange(12).reshape(2, 6)


def run(graph, *inputs):
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {given.name: value.numpy() for given, value in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def fake(model, plan, quantizer=REFERENCE):
    with torch.no_grad():
        for name, precision in plan.items():
            weight = model.get_submodule(name).weight
            weight.copy_(quantizer(weight, precision))
    return model


@pytest.mark.parametrize("quantizer", [RoundToNearest(), RoundToNearest(symmetric=False, scale="max")])
def test_widths_and_groups_mixed_in_one_model(llama, plan_of, tmp_path, quantizer):
    plan = plan_of(
        llama, q_proj="w4g32", k_proj="w2g16", v_proj="w8g64", o_proj="w2g32", up_proj="w8g16", lm_head="w4g16"
    )
    found = export.verify(plan, llama, "onnxruntime", example=(TOKENS, None), quantizer=quantizer)
    assert {check.name: check.precision for check in found.layers} == dict(plan)
    graph = export.onnxruntime(plan, llama, example=(TOKENS, None), path=tmp_path / "model.onnx", quantizer=quantizer)
    assert (tmp_path / "model.onnx").read_bytes() == graph.SerializeToString()
    torch.testing.assert_close(run(graph, TOKENS), fake(llama, plan, quantizer)(TOKENS), rtol=1e-4, atol=1e-5)


class Biased(nn.Module):
    """A Gemm with bias, a layer that runs twice, a layer left alone, and a width that is no multiple of the groups' blocks."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.alone = nn.Linear(48, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 32)

    def forward(self, x):
        return self.alone(self.twice(torch.relu(self.twice(self.first(x)))))


def test_biases_repeats_keywords_and_dynamic_batches():
    model = Biased().eval()
    plan = mps.Plan({"first": mps.Precision("4", "16", 16), "twice": mps.Precision("8", "16", 32)})
    batch = torch.export.Dim("batch")
    options = {"example": {"x": torch.randn(3, 48)}, "dynamic_shapes": {"x": {0: batch}}}
    assert len(export.verify(plan, model, "onnxruntime", **options).layers) == 2
    graph = export.onnxruntime(plan, model, **options)
    names = [node.name for node in graph.graph.node if node.op_type == "MatMulNBits"]
    assert names == ["first/0", "twice/0", "twice/1"]
    x = torch.randn(7, 48)
    torch.testing.assert_close(run(graph, x), fake(model, plan)(x), rtol=1e-4, atol=1e-5)


def test_accuracy_level_reaches_the_nodes():
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(4, 64)
    plan = mps.Plan({"0": mps.Precision("8", "16", 32)})
    exact, quick = (export.onnxruntime(plan, model, example=x, accuracy_level=level) for level in (0, 4))
    level = [
        a.i for n in quick.graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"
    ]
    assert level == [4]
    truth = fake(model, plan)(x)
    near = 0.05 if saturation("onnxruntime MatMulNBits") == 0 else 0.5  # as this machine's products are
    assert (run(exact, x) - truth).abs().max() < (run(quick, x) - truth).abs().max() < near


def test_a_machine_whose_products_saturate_is_told(monkeypatch):
    monkeypatch.setattr(int8_products, "saturation", lambda _engine: 0.49)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)).eval(), torch.randn(4, 64)
    plan = mps.Plan({"0": mps.Precision("8", "16", 32), "1": mps.Precision("4", "16", 32)})
    with pytest.warns(UserWarning, match=r"\('0'\) give outputs .* accuracy_level=0 computes them in float"):
        export.onnxruntime(plan, model, example=x, accuracy_level=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export.onnxruntime(plan, model, example=x)
        export.onnxruntime(mps.Plan({"1": plan["1"]}), model, example=x, accuracy_level=4)
    assert not [str(w.message) for w in caught if "saturate" in str(w.message)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("w3g32", "takes weights of 2, 4, 8 there"),
        ("w5g32", "2, 4, 8"),
        ("w4", "group sizes of 16, 32"),
        ("w4a8g32", "activations of 16"),
    ],
)
def test_what_would_stay_in_float_is_refused(text, words):
    with pytest.raises(mps.ExportError, match=words):
        export.onnxruntime(
            mps.Plan({"0": mps.Precision.parse(text)}), nn.Sequential(nn.Linear(64, 8)), example=torch.ones(1, 64)
        )


def test_only_the_plan_is_quantized(llama, plan_of):
    """`nodes_to_include` of the library quantizes every node."""
    plan = mps.Plan({"lm_head": mps.Precision("4", "16", 32)})
    assert [check.name for check in export.verify(plan, llama, "onnxruntime", example=TOKENS).layers] == ["lm_head"]


def test_a_layer_that_the_example_does_not_reach():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x):
            return self.used(x)

    plan = mps.Plan({"idle": mps.Precision("4", "16", 32)})
    with pytest.raises(mps.ExportError, match="no product with the weight of 'idle'"):
        export.onnxruntime(plan, Idle().eval(), example=torch.ones(1, 32))


def test_the_weights_equal_those_of_the_library(llama, plan_of):
    """Its own quantizer, one pass a width: the same nodes, codes that differ at most where a weight lies between two."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)).eval(), torch.randn(2, 3, 64)
    plan = mps.Plan({"0": mps.Precision("4", "16", 32)})
    ours = export.onnxruntime(plan, model, example=x, quantizer=RoundToNearest(symmetric=False, scale="max"))
    quantizer = MatMulNBitsQuantizer(
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto,
        algo_config=DefaultWeightOnlyQuantConfig(block_size=32, bits=4, is_symmetric=False),
    )
    quantizer.process()
    found = []
    for graph in (ours.graph, quantizer.model.model.graph):
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        (node,) = (node for node in graph.node if node.op_type == "MatMulNBits")
        found.append([constants[key] for key in node.input[1:]])
    (codes, scales, zeros), (their_codes, their_scales, their_zeros) = found
    np.testing.assert_allclose(scales.reshape(-1), their_scales.reshape(-1), rtol=1e-6)
    assert np.array_equal(zeros.reshape(-1), their_zeros.reshape(-1))
    assert (codes.reshape(-1) != their_codes.reshape(-1)).mean() < 0.01
    assert codes.shape == their_codes.shape


def test_it_needs_the_model():
    with pytest.raises(mps.ExportError, match="needs the model"):
        export.onnxruntime(mps.Plan({"0": mps.Precision("4", "16", 32)}), example=np.ones(1))
