"""Brevitas, really run and read back."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.quantizers.rounding import RoundToNearest

pytest.importorskip("brevitas.nn")
pytestmark = pytest.mark.filterwarnings("ignore")


def test_every_layer_another_precision(llama):
    texts = ["w2", "w3a4", "w4", "w5a8", "w6", "w7a2", "w8", "w16"]
    names = [name for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    plan = mps.Plan({name: mps.Precision.parse(texts[i % 8]) for i, name in enumerate(names)})
    found = export.verify(plan, llama, "brevitas")
    wanted = {name: precision for name, precision in plan.items() if precision.quantizes_weight}
    assert {check.name: check.precision for check in found.layers} == wanted


def test_convolutions_run_as_predicted(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)).eval()
    plan = mps.Plan({"0": mps.Precision("3"), "3": mps.Precision("4")})
    assert len(export.verify(plan, model, "brevitas").layers) == 2
    made, x = export.brevitas(plan, model, path=tmp_path / "state.pt"), torch.randn(2, 3, 8, 8)
    found = made(x)
    with torch.no_grad():
        for name, precision in plan.items():
            weight = model.get_submodule(name).weight
            weight.copy_(RoundToNearest(scale="max")(weight, precision))
    torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
    assert torch.load(tmp_path / "state.pt").keys() == made.state_dict().keys()


def test_one_bit_would_be_nan():
    with pytest.raises(mps.ExportError, match="cannot express w1 for '0': it takes weights of 2"):
        export.brevitas(mps.Plan({"0": mps.Precision("1")}), nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(mps.ExportError, match="brevitas needs the model"):
        export.brevitas(mps.Plan({"0": mps.Precision("2")}))
