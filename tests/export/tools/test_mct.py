"""MCT's nodes and widths; carried out where it is installed."""

import json

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export


def test_mct_names_the_nodes_after_folding(tmp_path):
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
    model = nn.Sequential(features, nn.Flatten(), nn.Linear(8, 4))
    names = {"0.0": "2", "0.2": "8", "2": "4"}
    plan = mps.Plan({name: mps.Precision(bits, "8") for name, bits in names.items()})
    found = export.mct(plan, model, path=tmp_path / "mct.json")
    assert found == json.loads((tmp_path / "mct.json").read_text()) == {"_0_0_bn": 2, "_0_2": 8, "_2": 4}
    for rest in ({}, {"2": mps.Precision("16")}):
        with pytest.raises(mps.ExportError, match="mct cannot leave '2' alone: where nothing is said, it takes 8 bits"):
            export.mct(mps.Plan({"0.0": plan["0.0"], "0.2": plan["0.2"], **rest}), model)
    with pytest.raises(mps.ExportError, match="takes weights of 2, 4, 8"):
        export.mct(mps.Plan({"2": mps.Precision("3", "8")}), model)


@pytest.mark.filterwarnings("ignore")
def test_carried_out(torchvision_operators):
    tool = pytest.importorskip("model_compression_toolkit")
    from model_compression_toolkit.core.common.network_editors import NodeNameFilter

    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 3)))
        model = nn.Sequential(features, nn.Flatten(), nn.Linear(128, 10)).eval()
        x = torch.randn(2, 3, 8, 8)
    plan = mps.Plan({"0.0": mps.Precision("2", "8"), "0.3.0": mps.Precision("8", "8"), "2": mps.Precision("4", "8")})
    nodes = export.mct(plan, model)
    widths = tool.core.BitWidthConfig()
    for node, bits in nodes.items():
        widths.set_manual_weights_bit_width(NodeNameFilter(node), bits, "weight")
    quantized, _ = tool.ptq.pytorch_post_training_quantization(
        model, lambda: iter([[x]]), core_config=tool.core.CoreConfig(bit_width_config=widths)
    )
    found = {
        name: module.weights_quantizers["weight"].num_bits
        for name, module in quantized.named_modules()
        if "weight" in getattr(module, "weights_quantizers", {})
    }
    assert found == nodes
