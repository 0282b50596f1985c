"""The benchmark scripts as modules, with a cache of their own."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def script(name, monkeypatch):
    if not BENCHMARKS.is_dir():
        pytest.skip("needs a checkout, not an installed package")
    for package in ("safetensors", "sklearn"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    if name in sys.modules:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module(name)


@pytest.fixture
def models(monkeypatch, tmp_path):
    module = script("models", monkeypatch)
    monkeypatch.setattr(module, "CACHE", tmp_path / "cache")
    yield module
    del sys.modules["models"]


@pytest.fixture
def sensitivity(models, monkeypatch):
    yield script("sensitivity", monkeypatch)
    del sys.modules["sensitivity"]


@pytest.fixture
def plans(sensitivity, monkeypatch):
    yield script("plans", monkeypatch)
    del sys.modules["plans"]
