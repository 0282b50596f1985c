"""Every public name is documented: what it is, each of its arguments and attributes. A single argument may stand in the sentence."""

import ast
import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mpsearch

ROOT = Path(__file__).resolve().parent.parent
checkout = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs a checkout, not an installed package")

PARTS = ("sensitivity", "solvers", "resources", "export", "imports", "plot", "quantize", "transforms", "testing")


def public():
    """Qualified name -> object, of everything that a user may import."""
    found = {f"mpsearch.{name}": getattr(mpsearch, name) for name in mpsearch.__all__}
    for part in PARTS:
        module = importlib.import_module(f"mpsearch.{part}")
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "") or ""
            if (
                name[0] != "_"
                and own.startswith(module.__name__)
                and (inspect.isclass(value) or inspect.isfunction(value))
            ):
                found[f"mpsearch.{part}.{name}"] = value
    return found


def promised():
    """Methods of protocols, and `cost` of `mps.forecast`: documented there, not in each class that keeps the promise."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("mpsearch.")]
    protocols = [x for module in modules for x in vars(module).values() if getattr(x, "_is_protocol", False)]
    return {"cost"} | {name for protocol in protocols for name in vars(protocol) if name[0] != "_"}


PUBLIC = public()
PROMISED = promised()


def told(docstring):
    """Names that stand before a colon at the start of a line, several with commas."""
    names = re.findall(r"^\s*([\w*, ]+):(?: |$)", docstring, re.MULTILINE)
    return {name.strip().lstrip("*") for line in names for name in line.split(",")}


def undocumented(function):
    """Parameters of a function of several that its docstring neither tells nor refers to."""
    docstring = inspect.getdoc(function) or ""
    if re.search(r"[Ss]ee `", docstring):
        return []
    told_of = told(docstring)
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "cls") and name[0] != "_"]
    return [name for name in names if name not in told_of] if len(names) > 1 else []


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_is_documented(name):
    value = PUBLIC[name]
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        assert undocumented(value) == []
        return
    if dataclasses.is_dataclass(value):
        fields = {field.name for field in dataclasses.fields(value) if field.name[0] != "_"}
        assert fields - told(inspect.getdoc(value)) == set()
    for method, function in vars(value).items():
        function = getattr(function, "__func__", function)
        if method[0] == "_" or not inspect.isfunction(function):
            continue
        assert inspect.getdoc(function), f"no docstring of {method}"
        inherited = any(method in vars(base) for base in value.__mro__[1:])
        if method not in PROMISED and not inherited:
            assert undocumented(function) == [], f"in {method}"


def test_the_public_list_equals_the_names_that_are_exported():
    """`from ... import name as name`, at start-up or when first used."""
    tree = ast.parse(inspect.getsource(mpsearch))
    exported = [
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpsearch.")
        for alias in node.names
    ]
    assert sorted(mpsearch.__all__) == sorted(exported)


@checkout
def test_the_citation_is_that_of_this_version():
    """The keys that the format requires (https://citation-file-format.github.io, 1.2.0), and the facts of pyproject.toml."""
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["cff-version"], citation["type"]) == ("1.2.0", "software")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"] == mpsearch.__version__
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert citation["keywords"] == project["keywords"]


@checkout
@pytest.mark.slow
def test_the_reference_has_a_page_of_every_public_name(tmp_path):
    pytest.importorskip("pdoc")
    command = [sys.executable, "docs/reference.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    pages = {page: page.read_text() for page in tmp_path.rglob("*.html")}
    anchors = {name for text in pages.values() for name in re.findall(r'<section id="(\w+)">', text)}
    assert {name.rsplit(".", 1)[1] for name in PUBLIC} <= anchors
    first = pages[tmp_path / "mpsearch.html"]
    for folder in ("sensitivity", "solvers", "resources", "export"):
        assert f'href="mpsearch/{folder}.html"' in first
