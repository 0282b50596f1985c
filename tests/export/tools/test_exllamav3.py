"""ExLlamaV3's recipe, held against the rules by which its converter reads it."""

import pytest
import yaml
from torch import nn

import mpsearch as mps
from mpsearch import export


def linear(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_exllamav3_covers_every_layer(llama, plan_of, tmp_path):
    plan = plan_of(llama, q_proj="w1", k_proj="w3", v_proj="w8", o_proj="w16", down_proj="w5", lm_head="w6")
    export.exllamav3(plan, llama, path=tmp_path / "recipe.yaml")
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert set(recipe) == {"target_bpw", "head_bits", "tensors"}
    assert recipe["head_bits"] == 6
    assert set(recipe["tensors"]) == set(linear(llama)) - {"lm_head"}
    assert all(bits in {*range(1, 9), 16} for bits in recipe["tensors"].values())
    sizes = {name: module.weight.numel() for name, module in linear(llama).items() if name != "lm_head"}
    used = sum(recipe["tensors"][name] * size for name, size in sizes.items())
    assert recipe["target_bpw"] == pytest.approx(used / sum(sizes.values()), abs=1e-4)
    with pytest.raises(mps.ExportError, match="a scale an output channel there"):
        export.exllamav3(plan_of(llama, o_proj="w4g32"), llama)
    with pytest.raises(mps.ExportError, match="needs the model"):
        export.exllamav3(plan)
