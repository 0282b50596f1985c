"""`memory_bytes` with a target, against the bytes that the real tool stores: widths, group sizes, odd shapes, dtypes."""

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.resources import MemoryBytes

#: Rows and columns: whole words and blocks, and some that need padding.
SHAPES = ((32, 64), (24, 128), (7, 64), (40, 96))


class Parallel(nn.Module):
    """A linear layer of each precision and shape, a norm, an embedding; every layer reads the same input."""

    def __init__(self, cases):
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.layers = nn.ModuleList(nn.Linear(columns, rows, bias=rows % 2 == 1) for _, (rows, columns) in cases)
        self.register_buffer("scratch", torch.zeros(64), persistent=False)

    def forward(self, x):
        x = self.norm(x)
        return tuple(layer(x[..., : layer.in_features]) for layer in self.layers)


def counted(target, texts, dtype, quantizer=None):
    """A model with a layer for each precision and shape that the target has, a plan, and what `memory_bytes` tells of it."""
    rule = export.TARGETS[target]
    cases = [
        (text, shape)
        for text in texts
        for shape in SHAPES
        if rule.refusal(mps.Layer("x", "linear", shape), mps.Precision.parse(text)) is None
    ]
    assert {text for text, _ in cases} == set(texts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Parallel([*cases, ("w16", (8, 32))]).to(dtype).eval()
    x = torch.ones(2, 128, dtype=dtype)
    layers = mps.layers(model, x, target=target)
    names = [layer.name for layer in layers]
    options = mps.precisions(" ".join(texts) + " w16")
    plan = {name: mps.Precision.parse(text) for name, (text, _) in zip(names[: len(cases)], cases, strict=True)}
    plan[names[-1]] = mps.Precision("16")
    resource = MemoryBytes(quantizer)(model, layers, options)
    cells = {name: resource.usage[row, options.index(plan[name])] for row, name in enumerate(names)}
    total = sum(cells.values()) + resource.fixed
    return model, x, mps.Plan(plan, usage={"memory_bytes": total}), cells


def carried_out(target, texts, dtype, quantizer=None, **options):
    model, _, plan, cells = counted(target, texts, dtype, quantizer)
    found = export.verify(plan, model, target, **options)
    assert {check.name: check.nbytes for check in found.layers} == {
        n: b for n, b in cells.items() if plan[n].weight != "16"
    }
    assert found.stored_bytes == found.told_bytes == plan.usage["memory_bytes"]


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_torchao(dtype):
    pytest.importorskip("torchao")
    carried_out(
        "torchao", ["w1", "w2", "w3g32", "w4g64", "w4g32", "w5", "w6g32", "w7", "w8", "w8g32", "w4a8g32", "w8a8"], dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors(dtype):
    pytest.importorskip("compressed_tensors")
    texts = [
        "w2",
        "w3",
        "w4",
        "w5",
        "w6",
        "w7",
        "w8",
        "w2g32",
        "w3g32",
        "w4g64",
        "w5g32",
        "w6g32",
        "w7g32",
        "w8g32",
        "w8a8",
    ]
    carried_out("compressed-tensors", texts, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hqq(dtype):
    pytest.importorskip("hqq.core.quantize")
    carried_out(
        "hqq", ["w1g8", "w2g32", "w2g16", "w3g32", "w3g8", "w4g32", "w4g64", "w5g32", "w6g32", "w8g64", "w8g16"], dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlx(dtype):
    pytest.importorskip("mlx.nn")
    carried_out("mlx", ["w2g32", "w2g64", "w3g32", "w4g64", "w4g32", "w5g32", "w6g64", "w6g32", "w8g32"], dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("symmetric", [True, False])
def test_onnxruntime(symmetric):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    quantizer = RoundToNearest(symmetric=symmetric)
    model, x, plan, cells = counted(
        "onnxruntime", ["w2g16", "w2g32", "w4g32", "w4g64", "w8g32"], torch.float32, quantizer
    )
    found = export.verify(plan, model, "onnxruntime", example=x, quantizer=quantizer)
    assert {check.name: check.nbytes for check in found.layers} == {
        n: b for n, b in cells.items() if plan[n].weight != "16"
    }
    assert found.told_bytes == plan.usage["memory_bytes"]
    assert abs(found.stored_bytes / found.told_bytes - 1) < 0.01  # constants of the tracer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["pt2e", "onnxruntime-static"])
def test_graphs_with_int8_codes(target):
    pytest.importorskip("torchao" if target == "pt2e" else "onnxscript")
    texts = ["w2a8", "w3a8", "w4a8", "w8a8"]
    model, x, plan, cells = counted(target, texts, torch.float32)
    found = export.verify(plan, model, target, example=x)
    assert {check.name: check.nbytes for check in found.layers} == {
        n: b for n, b in cells.items() if plan[n].weight != "16"
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
def test_gguf(transformers_llama, tmp_path, dtype, tied):
    pytest.importorskip("gguf")
    import gguf

    model = transformers_llama.to(dtype)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    layers = mps.layers(model, torch.tensor([[1, 2, 3]]), target="gguf")
    texts = ["wq4_0", "wq4_1", "wq5_0", "wq5_1", "wq8_0", "wiq4_nl", "wbf16", "wfp16", "w16"]
    options = mps.precisions(" ".join(texts))
    resource = MemoryBytes()(model, layers, options)
    columns = {layer.name: row % len(options) for row, layer in enumerate(layers)}
    if tied:
        columns["lm_head"] = columns["model.embed_tokens"]
    total = sum(resource.usage[row, columns[layer.name]] for row, layer in enumerate(layers)) + resource.fixed
    plan = mps.Plan({name: options[column] for name, column in columns.items()}, usage={"memory_bytes": total})
    export.gguf(plan, model, path=tmp_path / "m.gguf")
    file = gguf.GGUFReader(tmp_path / "m.gguf")
    assert total == len(np.memmap(tmp_path / "m.gguf")) - file.data_offset
    found = export.verify(plan, model, "gguf")
    assert found.stored_bytes == found.told_bytes == total
