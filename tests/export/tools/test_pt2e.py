"""PyTorch 2 export quantization, really run and read back."""

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch import export

pytest.importorskip("torchao")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cnn():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=8),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        model[1].running_var.uniform_(0.5, 2)
        return model.eval()


X = torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)


def test_a_transformer(llama):
    texts = ["w2", "w3a8", "w4", "w5", "w6a8", "w7", "w8a8", "w16"]
    names = [name for name, module in llama.named_modules() if isinstance(module, nn.Linear)]
    plan = mps.Plan({name: mps.Precision.parse(texts[i % 8]) for i, name in enumerate(names)})
    found = export.verify(plan, llama, "pt2e", example=torch.arange(12).reshape(2, 6))
    wanted = {name: precision for name, precision in plan.items() if precision.quantizes_weight}
    assert {check.name: check.precision for check in found.layers} == wanted


def test_convolutions_with_folded_batch_norm_run_as_predicted(cnn):
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    plan = mps.Plan({"0": mps.Precision("8", "8"), "3": mps.Precision("8"), "5": mps.Precision("8", "8")})
    found = export.verify(plan, cnn, "pt2e", example=(X, None))
    assert {check.name: check.precision for check in found.layers} == dict(plan)
    prepared = prepare_pt2e(torch.export.export(cnn, (X,)).module(), export.pt2e(plan, cnn))
    prepared(X)
    assert (convert_pt2e(prepared)(X) - cnn(X)).abs().max() < 0.02 * cnn(X).abs().max()


def test_a_layer_that_is_not_in_the_graph(cnn):
    """XNNPACKQuantizer leaves a convolution that is named to it alone, and says nothing."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    quantizer = export.pt2e(mps.Plan({"5": mps.Precision("4")}), cnn)
    with pytest.raises(mps.ExportError, match="the exported graph has no layer '5'"):
        prepare_pt2e(torch.export.export(other, (X,)).module(), quantizer)


def test_what_it_lacks_is_refused(cnn):
    for text, words in (
        ("w4g16", "a scale an output channel"),
        ("w1", "takes weights of 2"),
        ("w4a4", "activations of 8, 16"),
    ):
        with pytest.raises(mps.ExportError, match=words):
            export.pt2e(mps.Plan({"5": mps.Precision.parse(text)}), cnn)
    with pytest.raises(mps.ExportError, match="needs the model and an example"):
        export.pt2e(mps.Plan({"5": mps.Precision("4")}), cnn, path="x")


def test_the_file_is_a_program_that_runs(cnn, tmp_path):
    """Against the graph that torchao's own steps make."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    plan = mps.Plan({"0": mps.Precision("8", "8"), "3": mps.Precision("3"), "5": mps.Precision("4", "8")})
    before = {name: value.clone() for name, value in cnn.state_dict().items()}
    quantizer = export.pt2e(plan, cnn, example=X, path=tmp_path / "program.pt2")
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())
    prepared = prepare_pt2e(torch.export.export(cnn, (X,)).module(), quantizer)
    prepared(X)
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    assert torch.equal(loaded(X), convert_pt2e(prepared)(X))
    assert not torch.allclose(loaded(X), cnn(X), atol=1e-3)
