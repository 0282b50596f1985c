"""What the package imports is what pyproject.toml declares, no less and no more."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs a checkout, not an installed package"
)
#: Import names that are not the name of their distribution.
DISTRIBUTIONS = {
    "modelopt": "nvidia-modelopt",
    "optimum": "optimum-quanto",
    "sklearn": "scikit-learn",
    "tokenizers": "transformers",  # which brings it
    "yaml": "pyyaml",
}


def script(name):
    """A script of this folder as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources():
    for folder in ("mpsearch", "sensitivity", "solvers"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(tree, inside=False):
    """(top name, whether it is imported in a function) of what a module imports; not what only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((name.name.split(".")[0], inside) for name in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0], inside
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "package")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield node.args[0].value.split(".")[0], True
        yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def imported():
    """Distribution -> (files that import it as they load, files that import it when they run)."""
    found = {}
    for path in sources():
        for name, late in imports(ast.parse(path.read_text())):
            if name != "mpsearch" and name not in sys.stdlib_module_names:
                files = found.setdefault(DISTRIBUTIONS.get(name, name.replace("_", "-")), (set(), set()))
                files[late].add(path.name)
    return found


@pytest.fixture(scope="module")
def requirements():
    return script("requirements")


def test_what_is_imported_is_declared(requirements):
    declared = {requirements.name_of(line) for line in requirements.required()}
    extras = requirements.PROJECT["optional-dependencies"]
    optional = {
        requirements.name_of(line) for extra in extras if extra != "dev" for line in requirements.required(extra)
    }
    for name, (at_once, late) in imported().items():
        assert name in declared or not at_once, f"{name} is imported by {sorted(at_once)} and not declared"
        assert name in declared | optional, f"{name}, of {sorted(late)}, is in no extra"


def test_what_is_declared_is_imported(requirements):
    assert {requirements.name_of(line) for line in requirements.required()} - set(imported()) == set()


def test_a_missing_one_is_seen():
    """The walk finds an import in a class, a try and an else, and leaves those of type checkers out."""
    code = """
try:
    import scipy.linalg
except ImportError:
    from pandas import DataFrame
if TYPE_CHECKING:
    import optuna
class A:
    import numpy as np
    def f(self):
        import pulp
        package("gguf.quants", "gguf")
"""
    assert list(imports(ast.parse(code))) == [
        ("scipy", False),
        ("pandas", False),
        ("numpy", False),
        ("pulp", True),
        ("gguf", True),
    ]


def test_every_requirement_has_a_lower_bound_and_extras_open(requirements):
    lines = [requirements.lowest(line) for line in requirements.required("all", "test")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
    assert {"scipy", "torchao", "scikit-learn"} <= {
        requirements.name_of(line) for line in requirements.required("all", "test")
    }
    assert requirements.lowest("pulp>=3.3.1,<4") == "pulp==3.3.1"
    assert requirements.lowest("mlx[cpu]>=0.32; sys_platform == 'linux'") == "mlx==0.32"
    with pytest.raises(ValueError, match="'torch' has no lower bound"):
        requirements.lowest("torch")


def test_all_modules_import_and_a_search_runs(tmp_path):
    """As `make test-alone` does in an environment of the declared dependencies alone."""
    run = [sys.executable, ROOT / "tests" / "alone.py"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert re.search(r"\d{3} modules imported; (mixed|uniform|no )", done.stdout), done.stdout


@pytest.mark.slow
def test_in_an_environment_of_the_declared_dependencies_alone():
    subprocess.run(["sh", ROOT / "tests" / "versions.sh", "alone"], check=True)
