"""A search that ModelOpt really ran, read back."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import mpsearch as mps
from mpsearch.imports import import_plan, import_table

quantization = pytest.importorskip("modelopt.torch.quantization", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")


def weights(bits):
    quantizers = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
    ]
    return {"quant_cfg": quantizers, "algorithm": "max"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("gate_proj", "up_proj", "down_proj")})
        self.lm_head = nn.Linear(64, 10)

    def forward(self, x):
        return self.lm_head(self.mlp["down_proj"](self.mlp["gate_proj"](x) * self.mlp["up_proj"](x)))


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    path = tmp_path_factory.mktemp("modelopt") / "search.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        data = [(torch.randn(8, 64), torch.randint(10, (8,))) for _ in range(2)]
        _, state = quantization.auto_quantize(
            Net(),
            constraints={"effective_bits": 5.0},
            quantization_formats=[weights(2), weights(4), "INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"],
            data_loader=data,
            forward_step=lambda model, batch: model(batch[0]),
            loss_func=lambda output, batch: functional.cross_entropy(output, batch[1]),
            num_calib_steps=2,
            num_score_steps=2,
            disabled_layers="*lm_head*",
            checkpoint=str(path),
            method="gradient",
        )
    return path, state


def test_the_plan_is_its_best_recipe(search, tmp_path):
    _, state = search
    (tmp_path / "config.json").write_text(json.dumps(quantization.get_auto_quantize_config(state)))
    plan = import_plan(tmp_path / "config.json", "modelopt", Net())
    names = {
        "CUSTOM_0": "w2",
        "CUSTOM_1": "w4",
        "INT8_DEFAULT_CFG": "w8a8",
        "FP8_DEFAULT_CFG": "wfp8_e4m3afp8_e4m3",
        "NONE": "w16",
    }
    wanted = {
        layer: names[str(recipe).partition("(")[0]]
        for title, recipe in state["best"]["recipe"].items()
        for layer in state["candidate_stats"][title]["module_names"]
    }
    assert {name: str(precision) for name, precision in plan.items()} == wanted
    assert plan["mlp.gate_proj"] == plan["mlp.up_proj"]
    with pytest.raises(mps.PlanError, match=r"'\*lm_head\*' matches more than one name; give the model"):
        import_plan(tmp_path / "config.json", "modelopt")


def test_the_table_holds_its_scores(search):
    path, state = search
    table = import_table(path, "modelopt", Net())
    assert {str(p) for p in table.precisions} == {"w2", "w4", "wfp8_e4m3afp8_e4m3", "w8a8", "w16"}
    rows = {layer.name: row for layer, row in zip(table.layers, table.sensitivity, strict=True)}
    group = [layer.group for layer in table.layers if layer.name in ("mlp.gate_proj", "mlp.up_proj")]
    assert group[0] == group[1] != ""
    column = [str(p) for p in table.precisions].index("w2")
    for found in state["candidate_stats"].values():
        if len(found["formats"]) > 1:
            score = sum(rows[name][column] for name in found["module_names"])
            assert (
                score
                == dict(zip(map(str, found["formats"]), found["scores"], strict=True))["CUSTOM_0(effective-bits: 2.0)"]
            )
    used = dict(zip([layer.name for layer in table.layers], table.usage["weight_bytes"], strict=True))
    assert used["mlp.down_proj"][column] == 64 * 64 * 2 / 8
    assert np.isfinite(rows["lm_head"]).sum() == 1
    assert mps.solve(table, mps.Budget(weight_bytes=64 * 64 * 3 * 4 / 8 + 64 * 10 * 2)).plan[
        "lm_head"
    ] == mps.Precision("16")
    assert [layer.numel for layer in import_table(path, "modelopt").layers if layer.name == "mlp.down_proj"] == [4096]


def test_other_files(search, tmp_path):
    path, _ = search
    (tmp_path / "x.pth").write_text("no pickle")
    with pytest.raises(mps.TableError, match="no search state of ModelOpt"):
        import_table(tmp_path / "x.pth", "modelopt")
    (tmp_path / "x.pth").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(mps.TableError, match="no search state of ModelOpt"):
        import_table(tmp_path / "x.pth", "modelopt")
    torch.save({"method": "gradient"}, tmp_path / "x.pth")
    with pytest.raises(mps.TableError, match="are missing"):
        import_table(tmp_path / "x.pth", "modelopt")
    (tmp_path / "x.json").write_text('{"quant_cfg": {"*": 1}}')
    with pytest.raises(mps.PlanError, match="no 'quant_cfg' of ModelOpt"):
        import_plan(tmp_path / "x.json", "modelopt")
    with pytest.raises(mps.TableError, match=r"names 'mlp\.gate_proj', which is no quantizable layer"):
        import_table(path, "modelopt", nn.Linear(2, 2))
    with pytest.raises(OSError, match="No such file"):
        import_table(tmp_path / "none.pth", "modelopt")
