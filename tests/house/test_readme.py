"""What README.md and docs/ tell to type runs, on small files of the names that they use."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
#: Packages that a line needs, by a word in it.
NEEDED = {
    "brevitas": "brevitas",
    "compressed-tensors": "compressed_tensors",
    "gguf": "gguf",
    "onnxruntime": "onnxruntime",
    "demo": "sklearn",
}

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()

def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 64, generator=g), torch.randint(0, 4, (16,), generator=g)) for _ in range(4)]

resnet = decoder = net
calibration = held_out = batches
"""


def blocks(page, *languages):
    """Code between fences, of some languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def lines(page):
    """Lines that call `mpsearch`, without what a shell makes of their output."""
    for block in blocks(page, "", "bash", "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("mpsearch "):
                yield shlex.split(line.split(" > ")[0], comments=True)[1:]


LINES = [(page.name, words) for page in PAGES for words in lines(page)]


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16, "dtype": "bfloat16"}


def named_folders(path):
    """Small ones of the names that pages give to folders of transformers, and what the lines take with them."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS)).bfloat16()
    letters = {"?": 0} | {x: i for i, x in enumerate("abcdefghijklmnopqrstuvwxyz ", 1)}
    words = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], unk_token="?"))
    for name in {name for page in PAGES for name in re.findall(r"hf:([A-Z][\w.-]*\d\w*)", page.read_text())}:
        model.save_pretrained(path / name)
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(path / name)
    (path / "calibration.txt").write_text("pack my box with five dozen liquor jugs " * 20)
    names = [layer.name for layer in mps.layers(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)})]
    rows = [f"{name},w{bits},{4.0**-bits}" for name in names for bits in (2, 4, 8)]
    (path / "measured.csv").write_text("\n".join(["layer,precision,sensitivity", *rows]) + "\n")
    mps.Plan(dict.fromkeys(names, mps.Precision("4"))).save(path / "plan.json")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A folder with the models that the lines name."""
    path = tmp_path_factory.mktemp("hugging_face")
    named_folders(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the lines name."""
    path = tmp_path_factory.mktemp("readme")
    (path / "nets.py").write_text(NETS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name, estimator in (("table", "fisher"), ("hessian", "fisher"), ("kl", "kl-divergence")):
            profile = f"profile nets.py:net --data nets.py:batches --precisions 'w2 w4 w8' --estimator {estimator}"
            assert main(shlex.split(f"{profile} -o {name}.csv --quiet")) == 0
        search = (
            "search nets.py:net --data nets.py:batches --budget average_bits=4 --precisions 'w2 w4 w8' --effort fast"
        )
        assert main(shlex.split(f"{search} -o out/ --quiet")) == 0
        assert main(shlex.split("solve table.csv --budget average_bits=4 -o plan.json --quiet")) == 0
    return path


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{page} {' '.join(words)}" for page, words in LINES])
def test_a_command_runs(request, monkeypatch, capsys, page, words):
    if words == ["demo"]:
        pytest.skip("tests/cli/commands runs it, smaller")
    for word, package in NEEDED.items():
        if word in words:
            pytest.importorskip(package)
    of_hugging_face = any(word.startswith("hf:") for word in words)
    monkeypatch.chdir(request.getfixturevalue("hugging_face" if of_hugging_face else "folder"))
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_the_python_runs(page, tmp_path, monkeypatch):
    """Block after block, in one session with a model and data."""
    code = blocks(page, "python")
    if not code:
        pytest.skip(f"{page.name} has no Python")
    monkeypatch.chdir(tmp_path)
    if any("hf:" in block for block in code):
        named_folders(tmp_path)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    batches = [(torch.randn(16, 64, generator=generator), torch.randint(0, 4, (16,))) for _ in range(6)]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    session = {"model": model, "batches": batches[:4], "held_out_batches": batches[4:], "__name__": "__main__"}
    for block in code:
        exec(compile(block, page.name, "exec"), session)
    assert session["mps"] is mps
