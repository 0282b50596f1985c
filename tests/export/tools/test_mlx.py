"""MLX, really run and read back."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.export.tools.mlx import read_mlx

pytest.importorskip("mlx.nn")


def mixed(model, texts):
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    return mps.Plan({name: mps.Precision.parse(texts[i % len(texts)]) for i, name in enumerate(names)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_layer_another_precision(llama, dtype):
    plan = mixed(llama, ["w2g64", "w3g32", "w4g32", "w5g64", "w6g32", "w8g32", "w16"])
    found = export.verify(plan, llama.to(dtype), "mlx")
    wanted = {name: precision for name, precision in plan.items() if precision.quantizes_weight}
    assert {check.name: check.precision for check in found.layers} == wanted


def affine(row, bits):
    """MLX's rounding of one group, in plain Python numbers of single precision."""
    low, high, levels = np.float32(row.min()), np.float32(row.max()), np.float32((1 << bits) - 1)
    scale = max((high - low) / levels, np.float32(1e-7))
    edge, scale = (low, scale) if abs(low) > abs(high) else (high, -scale)
    whole = np.round(edge / scale)
    scale, bias = (edge / whole, edge) if whole else (scale, np.float32(0))
    return np.clip(np.round((row - bias) / scale), 0, levels) * scale + bias


def test_values_group_by_group(llama):
    plan = mixed(llama, ["w2g32", "w3g64", "w4g32", "w5g32", "w6g32", "w8g64"])
    for name, stored in read_mlx(plan, llama).layers.items():
        precision = plan[name]
        rows = llama.get_submodule(name).weight.detach().numpy().reshape(-1, precision.group_size)
        expected = np.stack([affine(row, precision.weight_bits) for row in rows])
        found = stored.values.numpy().reshape(rows.shape)
        step = (found.max(1) - found.min(1))[:, None] / ((1 << precision.weight_bits) - 1)
        assert (np.abs(found - expected) < 1e-4 * step).mean() > 0.999  # the rest lies between two codes
        assert (np.abs(found - expected) < 1.01 * step).all()


def test_the_file_lists_every_layer(llama, plan_of, tmp_path):
    plan = plan_of(llama, o_proj="w3g32", lm_head="w8g64", embed_tokens="w16")
    predicate = export.mlx(plan, llama, path=tmp_path / "quantization.json")
    content = json.loads((tmp_path / "quantization.json").read_text())
    for name, module in llama.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert content[name] == predicate(name, module)
    assert content["lm_head"] == {"bits": 8, "group_size": 64}
    assert content["model.embed_tokens"] is False
    assert content["mode"] == "affine"


@pytest.mark.parametrize(
    ("text", "words"), [("w7g32", "weights of 2, 3, 4, 5, 6, 8"), ("w4g16", "32, 64, 128"), ("w4", "group sizes")]
)
def test_what_it_lacks_is_refused(llama, plan_of, text, words):
    with pytest.raises(mps.ExportError, match=words):
        export.mlx(plan_of(llama, lm_head=text), llama)
