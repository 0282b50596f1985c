"""Who may import whom: the contract, and that it would be seen to be broken."""

import configparser
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs a checkout, not an installed package"
)

spec = importlib.util.spec_from_file_location("house_imports", Path(__file__).with_name("imports.py"))
assert spec is not None
assert spec.loader is not None
tree = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tree)


def levels():
    """Package -> its level, 0 at the bottom."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    lines = contract["importlinter:contract:levels"]["layers"].split("\n")
    rows = [line.strip() for line in lines if line.strip()]
    return {name.strip(): level for level, row in enumerate(reversed(rows)) for name in row.split("|")}


def package(module):
    return module.split(".")[1] if "." in module else ""


def upwards(root):
    """Imports, late ones and those for types included, of a package on the same level or above."""
    level = levels()
    return [
        f"{one.importer}:{one.line} imports {one.imported}"
        for one in tree.imports(root)
        if package(one.importer) and package(one.imported) and package(one.importer) != package(one.imported)
        if level[package(one.imported)] >= level[package(one.importer)]
    ]


def copy(folder):
    """The packages in another folder, the links as real folders."""
    for name in ("mpsearch", ".importlinter"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def plant(root, module, line):
    path = root / Path(*module.split(".")).with_suffix(".py")
    path.write_text(f"{path.read_text()}\n\n{line}\n")


def lint(root):
    """import-linter, over the packages in a folder."""
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); from importlinter.cli import lint_imports; "
        "sys.exit(lint_imports(no_cache=True))"
    )
    return subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=root)


def test_every_import_goes_down_late_ones_too():
    assert upwards(ROOT) == []


def test_every_package_has_its_level():
    folders = {path.parent.name for path in (ROOT / "mpsearch").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "mpsearch").glob("*.py")} - {"__init__"}
    assert set(levels()) == folders | files


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mpsearch.core.plan", "def late():\n    import mpsearch.display.figures"),
        ("mpsearch.solvers.greedy", "def late():\n    from mpsearch.models import running"),
        ("mpsearch.metrics.choice", "def late():\n    from mpsearch.resources import bitops"),
    ],
)
def test_a_late_import_upwards_is_seen(tmp_path, module, line):
    plant(copy(tmp_path), module, line)
    (seen,) = upwards(tmp_path)
    assert seen.startswith(module)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("mpsearch.export.tools.hqq", "import mpsearch.plan_search.searching"),
        ("mpsearch.export.tools.hqq", "import mpsearch.cli.commands.search"),
        ("mpsearch.core.plan", "from mpsearch.quantizers import rounding"),
        ("mpsearch.solvers.greedy", "import torch"),
    ],
)
def test_a_planted_import_is_reported(tmp_path, module, line):
    plant(copy(tmp_path), module, line)
    outcome = lint(tmp_path)
    assert outcome.returncode == 1
    assert "BROKEN" in outcome.stdout
    assert f"{module} -> {line.split()[1]}" in outcome.stdout


def test_a_new_package_must_be_given_a_level(tmp_path):
    new = copy(tmp_path) / "mpsearch" / "extras"
    new.mkdir()
    (new / "__init__.py").write_text('"""Nothing."""\n')
    outcome = lint(tmp_path)
    assert outcome.returncode == 1
    assert "extras" in outcome.stdout + outcome.stderr
