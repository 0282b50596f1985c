"""ExecuTorch, run by its own runtime."""

import sys

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export

pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, groups=2)
        self.third, self.last = nn.Linear(128, 16), nn.Linear(16, 10, bias=False)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.last(torch.relu(self.third(x.flatten(1))))


@pytest.fixture
def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval(), torch.randn(2, 3, 8, 8)


def plan(**texts):
    return mps.Plan({name: mps.Precision.parse(text) for name, text in texts.items()})


@pytest.mark.parametrize("backend", ["portable", "xnnpack"])
@pytest.mark.parametrize(
    "texts",
    [
        {"first": "w4a8", "second": "w3a8", "third": "w8a8", "last": "w2a8"},
        {"first": "w4a8", "second": "w16", "third": "w8a8", "last": "w16"},
        {"first": "w8a8"},
    ],
)
def test_the_runtime_computes_what_the_plan_says(net, tmp_path, backend, texts):
    pytest.importorskip("executorch.runtime")
    model, example = net
    found = export.verify(plan(**texts), model, "executorch", example=example, backend=backend)
    assert {check.name: str(check.precision) for check in found.layers} == {
        n: t for n, t in texts.items() if t != "w16"
    }
    program = export.executorch(plan(**texts), model, example=example, backend=backend, path=tmp_path / "net.pte")
    assert (tmp_path / "net.pte").read_bytes() == program


def test_weights_alone_with_portable_kernels(net):
    pytest.importorskip("executorch.runtime")
    model, example = net
    found = export.verify(plan(first="w4", last="w3"), model, "executorch", example=example)
    assert [str(check.precision) for check in found.layers] == ["w4", "w3"]


def test_wrong_outputs_are_told(net, monkeypatch):
    """XNNPACK with rounded inputs alone computes something else, and says nothing."""
    pytest.importorskip("executorch.runtime")
    model, example = net
    module = sys.modules["mpsearch.export.tools.executorch"]
    real = module.converted
    monkeypatch.setattr(module, "converted", lambda plan, model, example, outputs: real(plan, model, example, False))
    texts = {"first": "w8a8", "second": "w8a8", "third": "w8a8", "last": "w8a8"}
    with pytest.raises(mps.ExportError, match="executorch: the program's output is off by"):
        export.verify(plan(**texts), model, "executorch", example=example, backend="xnnpack")


def test_refusals(net):
    model, example = net
    for text in ("w1a8", "w9", "w4g32", "w8a4"):
        with pytest.raises(mps.ExportError, match=f"executorch cannot express {text} for 'third'"):
            export.executorch(plan(third=text), model, example=example)
    with pytest.raises(mps.ExportError, match="needs the model"):
        export.executorch(plan(third="w8"), example=example)
