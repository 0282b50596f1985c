"""AIMET's encodings; loaded where it is installed."""

import json

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export
from mpsearch.quantizers.rounding import RoundToNearest


def test_aimet_encodings_give_the_weights_of_a_quantizer_that_does_not_clip(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    plan = mps.Plan({"0": mps.Precision("3"), "2": mps.Precision("8")})
    quantizer = RoundToNearest(scale="max")
    export.aimet(plan, model, path=tmp_path / "encodings.json", quantizer=quantizer)
    content = json.loads((tmp_path / "encodings.json").read_text())
    assert set(content["param_encodings"]) == {"0.weight", "2.weight"}
    for name, precision in plan.items():
        weight = model.get_submodule(name).weight.detach()
        rows = []
        for row, encoding in zip(weight.flatten(1), content["param_encodings"][f"{name}.weight"], strict=True):
            assert encoding["bitwidth"] == precision.weight_bits
            steps = (encoding["max"] - encoding["min"]) / encoding["scale"]
            assert steps == pytest.approx(2**precision.weight_bits - 1)
            assert encoding["min"] == pytest.approx(encoding["offset"] * encoding["scale"])
            kept = (row / encoding["scale"]).round().clamp(encoding["offset"], -encoding["offset"] - 1)
            rows.append(kept * encoding["scale"])
        torch.testing.assert_close(torch.stack(rows).reshape(weight.shape), quantizer(weight, precision))
    with pytest.raises(mps.ExportError, match="takes weights of 2"):  # one bit would be nan
        export.aimet(mps.Plan({"0": mps.Precision("1")}), model)
    with pytest.raises(mps.ExportError, match="symmetric"):
        export.aimet(plan, model, quantizer=RoundToNearest(symmetric=False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantizer", [RoundToNearest(), RoundToNearest(scale="max")])
def test_carried_out(quantizer, torchvision_operators):
    pytest.importorskip("aimet_torch.quantsim")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.Flatten(),
            nn.Linear(128, 32),
            nn.Linear(32, 10),
        ]
        model = nn.Sequential(*layers).eval()
    example = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8)
    plan = mps.Plan({"0": mps.Precision("3"), "2": mps.Precision("16"), "4": mps.Precision("6")})
    found = export.verify(plan, model, "aimet", example=example, quantizer=quantizer)
    assert {check.name: str(check.precision) for check in found.layers} == {"0": "w3", "4": "w6"}
