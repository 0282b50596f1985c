"""ModelOpt's ordered list; carried out where it is installed."""

import fnmatch
import json

import pytest
from torch import nn

import mpsearch as mps
from mpsearch import export


def mixed(model):
    texts = ["w2", "w3g32", "w4", "w5a8", "w6g64", "w7", "w8a4", "w16"]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return mps.Plan({name: mps.Precision.parse(texts[i % 8]) for i, name in enumerate(names)})


def test_the_last_match_decides_and_is_the_layer_itself(llama, tmp_path):
    plan = mixed(llama)
    config = export.modelopt(plan, llama, path=tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["algorithm"] == config["algorithm"] == "max"
    for name, module in llama.named_modules():
        if isinstance(module, nn.Linear):
            for part, wanted in (("weight", plan[name].quantizes_weight), ("input", plan[name].quantizes_activation)):
                quantizer = f"{name}.{part}_quantizer"
                matching = [
                    entry for entry in config["quant_cfg"] if fnmatch.fnmatch(quantizer, entry["quantizer_name"])
                ]
                assert len(matching) == 1 + wanted
                bits = plan[name].weight_bits if part == "weight" else plan[name].activation_bits
                assert matching[-1].get("cfg", {}).get("num_bits") == (bits if wanted else None)


def test_one_bit_would_be_nan_and_a_bad_name_ignored(llama):
    with pytest.raises(mps.ExportError, match="takes weights of 2"):
        export.modelopt(mps.Plan({"lm_head": mps.Precision("1")}), llama)
    with pytest.raises(mps.ExportError, match="no quantizable layer"):
        export.modelopt(mps.Plan({"lm_head": mps.Precision("4"), "lm_haed": mps.Precision("4")}), llama)


@pytest.mark.filterwarnings("ignore")
def test_carried_out(llama):
    pytest.importorskip("modelopt.torch.quantization", exc_type=ImportError)
    plan = mixed(llama)
    found = export.verify(plan, llama, "modelopt")
    assert {check.name: check.precision for check in found.layers} == {n: p for n, p in plan.items() if str(p) != "w16"}


@pytest.mark.filterwarnings("ignore")
def test_experts_carried_out(transformers_mixtral, experts_plan):
    """Each has a quantizer of its own for its weight; inputs have one a block."""
    model = transformers_mixtral
    text = lambda block, number, part: f"w{number + 3 + block}" + ("a8" if "down" in part else "")  # noqa: E731
    plan = experts_plan(model, text, "w4")
    names = [entry["quantizer_name"] for entry in export.modelopt(plan, model)["quant_cfg"]]
    assert len(names) == len(set(names))
    block = "model.layers.1.mlp.experts"
    assert {name for name in names if name.startswith(block)} == {
        *(
            f"{block}.{part}_weight_quantizers.{number}"
            for part in ("gate_up_proj", "down_proj")
            for number in range(2)
        ),
        f"{block}.down_proj_input_quantizer",
    }
    odd = mps.Plan({**plan, f"{block}.1.gate_up_proj": mps.Precision("4", "8")})
    with pytest.raises(
        mps.ExportError,
        match=r"modelopt has one '.*gate_up_proj_input_quantizer' for the experts, .* inputs of 16 and 8",
    ):
        export.modelopt(odd, model)
    some = {name: precision for name, precision in plan.items() if name != f"{block}.1.down_proj"}
    with pytest.raises(mps.ExportError, match="inputs of 8 and 16"):
        export.modelopt(mps.Plan(some), model)
    pytest.importorskip("modelopt")
    checks = export.verify(plan, model, "modelopt").layers
    assert {check.name: check.precision for check in checks} == dict(plan)
