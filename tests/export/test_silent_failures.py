"""What quantizers do in silence, asked of every exporter: it is refused, or carried out and read back."""

import pytest
import torch

import mpsearch as mps
from mpsearch import export

EXAMPLE = torch.zeros(1, 8, dtype=torch.long)
NAMED = [name for name in export.EXPORTERS if name != "neutral"]


def exported(target, plan, model):
    exporter = export.EXPORTERS[target]
    return exporter(plan, model, **({"example": EXAMPLE} if exporter.write_example else {}))


@pytest.mark.parametrize("target", export.EXPORTERS)
@pytest.mark.parametrize(
    "name", ["q_proj", "model.layers.0.self_attn.q_prj", "re:.*q_proj", "model.layers.9.mlp.up_proj"]
)
def test_a_name_that_matches_nothing_is_refused(llama, target, name):
    with pytest.raises(mps.ExportError, match="which is no quantizable layer of the model"):
        exported(target, mps.Plan({name: mps.Precision("4", "8" if target == "mct" else "16")}), llama)


#: Who can do with one bit: asymmetric integers, and the trellis codes of ExLlamaV3.
ONE_BIT = {
    ("torchao", "w1"),
    ("torchao", "w1g32"),
    ("torchao", "w1a8"),
    ("hqq", "w1g32"),
    ("exllamav3", "w1"),
}


@pytest.mark.parametrize("target", NAMED)
@pytest.mark.parametrize("text", ["w1", "w1g32", "w1a8"])
@pytest.mark.filterwarnings("ignore")
def test_one_bit_is_refused_or_read_back(llama, plan_of, target, text):
    plan = plan_of(llama, o_proj=text)
    if (target, text) not in ONE_BIT:
        with pytest.raises(mps.ExportError, match=f"cannot express {text} for 'model"):
            exported(target, plan, llama)
        return
    if target in export.READERS:
        pytest.importorskip(export.READERS[target][0])
        assert len(export.verify(plan, llama, target).layers) == 2
    exported(target, plan, llama)


LACKED = [(target, text) for target in NAMED for text in ("w9", "w10a8", "w16a8", "w4a4g48", "wfp8_e4m3")]
LACKED.remove(("aimet", "w9"))  # has integers of up to 16 bits


@pytest.mark.parametrize(("target", "text"), LACKED)
def test_what_a_target_lacks_is_refused(llama, plan_of, target, text):
    plan = plan_of(llama, o_proj=text)
    with pytest.raises(mps.ExportError, match=f"cannot express {plan['model.layers.0.self_attn.o_proj']} for 'model"):
        exported(target, plan, llama)


@pytest.mark.parametrize("target", ["compressed-tensors", "llm-compressor", "auto-round"])
def test_fused_layers_that_differ_are_refused(llama, plan_of, target):
    plan = plan_of(llama, q_proj="w4g32", k_proj="w8g32", v_proj="w4g32")
    with pytest.raises(mps.ExportError, match="one precision for layers that are fused at run time"):
        exported(target, plan, llama)


@pytest.mark.parametrize("target", NAMED)
def test_layers_that_share_a_weight_and_differ_are_refused(llama, target):
    llama.model.layers[1].mlp.up_proj.weight = llama.model.layers[0].mlp.up_proj.weight
    texts = {"gguf": ("wq8_0", "wq4_0"), "llama-quantize": ("wq8_0", "wq4_0"), "quanto": ("w8", "w16")}
    texts |= {"onnxruntime": ("w4g32", "w8g32"), "hqq": ("w4g32", "w8g32"), "mlx": ("w4g32", "w8g32")}
    texts |= {"onnxruntime-static": ("w4a8", "w8a8"), "mct": ("w4a8", "w8a8"), "bitsandbytes": ("w8a8", "w16")}
    texts |= {"nncf": ("w4", "w8")}
    chosen = texts.get(target, ("w4", "w8"))
    names = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
    plan = mps.Plan({name: mps.Precision.parse(text) for name, text in zip(names, chosen, strict=True)})
    with pytest.raises(mps.ExportError, match="one precision for layers that"):
        exported(target, plan, llama)
