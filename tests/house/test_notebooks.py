"""The notebooks run from top to bottom in a fresh kernel, and are committed without output; progress bars are widgets there."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
#: Packages of the dev extra that a notebook needs beside mpsearch's own.
NEEDS = {"4_language_model_to_tools": ("transformers", "torchao", "compressed_tensors", "safetensors", "gguf")}
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="needs a checkout, not an installed package")


def test_all_six_are_there():
    assert [path.name[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_output(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 3
    for number, cell in enumerate(code):
        assert cell["outputs"] == [], f"code cell {number} of {path.name} has output"
        assert cell["execution_count"] is None, f"code cell {number} of {path.name} was run"
    assert "".join(content["cells"][0]["source"]).startswith("# ")
    assert set(content["metadata"]) <= {"kernelspec", "language_info"}


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """Runs a notebook in a fresh kernel; returns the outputs of all its cells."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HOME", str(tmp_path))  # no settings and caches of whoever runs it
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(notebook):
        nbformat.validate(notebook)
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=180, kernel_name="python3", resources=where).execute()
        return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]

    return run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, executed):
    nbformat = pytest.importorskip("nbformat")
    missing = [name for name in NEEDS.get(path.stem, ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'mpsearch[dev]'")
    shown = executed(nbformat.read(path, as_version=4))
    assert any({"image/png", "text/html"} & set(output.get("data", {})) for output in shown), "nothing was drawn"


BAR = """
import torch, mpsearch as mps
model, plan = torch.nn.Sequential(torch.nn.Linear(4, 3)), mps.Plan({"0": mps.Precision("4")})
_ = mps.evaluate(model, [(torch.randn(8, 4), torch.arange(8) % 3)], plan)
"""


def test_bars_are_widgets_in_a_notebook(executed):
    pytest.importorskip("ipywidgets")
    v4 = pytest.importorskip("nbformat").v4
    (shown,) = executed(v4.new_notebook(cells=[v4.new_code_cell(BAR)]))
    assert "application/vnd.jupyter.widget-view+json" in shown["data"]


def test_every_bar_chooses_by_where_it_runs():
    files = [path for folder in ("mpsearch", "sensitivity", "solvers") for path in (ROOT / folder).rglob("*.py")]
    lines = [
        line
        for path in files
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"import.*tqdm|from tqdm", line)
    ]
    assert len(lines) > 4
    assert {line.strip() for line in lines} == {"from tqdm.auto import tqdm"}
