"""HQQ, really run and read back."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.quantizers.rounding import RoundToNearest

pytest.importorskip("hqq.core.quantize")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_layer_another_precision(llama):
    texts = ["w1g32", "w2g64", "w3g32", "w4g16", "w5g32", "w6g32", "w8g32"]
    names = [name for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    plan = mps.Plan({name: mps.Precision.parse(texts[i % 7]) for i, name in enumerate(names)})
    found = export.verify(plan, llama, "hqq")
    assert {check.name: check.precision for check in found.layers} == dict(plan)


def test_the_copy_runs_and_the_model_stays(llama, plan_of, tmp_path):
    plan = plan_of(llama, q_proj="w4g32", lm_head="w16")
    made = export.hqq(plan, llama, path=tmp_path / "state.pt")
    assert type(made.model.layers[1].self_attn.q_proj).__name__ == "HQQLinear"
    assert type(made.lm_head) is type(llama.model.layers[1].self_attn.q_proj) is nn.Linear
    tokens = torch.arange(12).reshape(2, 6)
    expected = made(tokens)
    fake = llama
    with torch.no_grad():
        for name in plan:
            if name != "lm_head":
                fake.get_submodule(name).weight.copy_(made.get_submodule(name).dequantize())
    torch.testing.assert_close(fake(tokens), expected, rtol=1e-4, atol=1e-5)
    assert torch.load(tmp_path / "state.pt").keys() == made.state_dict().keys()


def test_it_tunes_at_least_as_well_as_rounding():
    model = nn.Sequential(nn.Linear(256, 64))
    weight = model[0].weight.detach()
    plain = RoundToNearest(symmetric=False, scale="max")(weight, mps.Precision("3", "16", 32))
    (check,) = export.verify(mps.Plan({"0": mps.Precision("3", "16", 32)}), model, "hqq").layers
    assert check.relative_error < float((plain - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize(
    ("text", "words"),
    [("w7g32", "takes weights of 1, 2, 3, 4, 5, 6, 8"), ("w4", "takes group sizes of"), ("w4g48", "multiples of 48")],
)
def test_what_it_lacks_is_refused(text, words):
    with pytest.raises(mps.ExportError, match=words):
        export.hqq(mps.Plan({"0": mps.Precision.parse(text)}), nn.Sequential(nn.Linear(64, 8)))


def test_it_needs_the_model():
    with pytest.raises(mps.ExportError, match="hqq needs the model"):
        export.hqq(mps.Plan({"0": mps.Precision("4", "16", 32)}))
