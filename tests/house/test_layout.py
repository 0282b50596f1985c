"""The walls of the house: package list, links, start-up, imports."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("mpsearch", "mpsearch/sensitivity", "mpsearch/solvers")
checkout = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs a checkout, not an installed package"
)


@checkout
def test_the_package_list_equals_the_tree():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert listed == found


@checkout
@pytest.mark.parametrize("name", ["sensitivity", "solvers"])
def test_the_links_are_whole(name):
    link = ROOT / "mpsearch" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"
    assert (link / "__init__.py").is_file()


@checkout
def test_the_repository_reads_nothing_outside_itself():
    files = [path for folder in ("tests", "benchmarks", "notebooks") for path in (ROOT / folder).rglob("*")]
    reach = re.compile(r"shared/(fixtures|data)|[\"']shared[\"'] */|parents\[[3-9]\]|(\.parent){5}")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path.suffix in {".py", ".sh", ".ipynb"} and "cache" not in path.parts and path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if reach.search(line)
    ]
    assert found == []


@checkout
def test_no_folder_is_a_flat_row():
    """22 modules at most; `sensitivity` has one for each estimator, by contract."""
    folders = {path.parent for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    count = {str(folder.relative_to(ROOT)): len(list(folder.glob("[!_]*.py"))) for folder in folders}
    assert {name: number for name, number in count.items() if number > 22} == {
        "mpsearch/sensitivity": count["mpsearch/sensitivity"]
    }


@checkout
def test_no_module_hides_behind_an_underscore():
    names = [path for folder in FOLDERS for path in (ROOT / folder).rglob("_*.py")]
    assert {path.name for path in names} == {"__init__.py", "__main__.py"}


@checkout
def test_no_function_takes_more_than_twelve_arguments():
    def arguments(function):
        given = function.args
        return [*given.posonlyargs, *given.args, *given.kwonlyargs]

    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(arguments(node)) > 12
    ]
    assert long == []


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_and_solving_load_no_torch():
    code = """
import sys, mpsearch as mps
layers = (mps.Layer("a", weight_shape=(10,)), mps.Layer("b", weight_shape=(10,)))
table = mps.CostTable(layers, mps.precisions("w2 w4"), [[2, 1], [2, 1]])
mps.solve(table, mps.Budget(average_bits=3)); mps.pareto(table, "average_bits")
import mpsearch.cli
print([name for name in ("torch", "pandas", "matplotlib", "optuna", "rich") if name in sys.modules])
"""
    assert run(code).strip() == "[]"


@pytest.mark.parametrize(
    ("names", "loaded"),
    [("__version__", "mpsearch True"), ("solve pareto Budget CostTable Plan", "mpsearch numpy True")],
)
def test_importing_loads_numpy_and_little_else(names, loaded):
    code = f"""
import sys
before = set(sys.modules)
import mpsearch
for name in {names.split()}:
    getattr(mpsearch, name)
names = set(sys.modules) - before
print(*sorted({{name.split(".")[0] for name in names}} - sys.stdlib_module_names), len(names) < 250)
"""
    assert run(code).strip() == loaded


def test_every_public_name_is_there():
    import mpsearch

    for name in dir(mpsearch):
        getattr(mpsearch, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mpsearch.nothing
