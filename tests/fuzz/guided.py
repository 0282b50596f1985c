"""The tests of damaged files, driven by the branches that they reach (atheris): `python tests/fuzz/guided.py TEST [libFuzzer options]`.

Without limits it runs until something breaks: `-runs=20000 -seed=1` ends. A test is a name in `test_files.py`.
"""

import importlib.util
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mpsearch"]):
    pass

_, name, *options = sys.argv
spec = importlib.util.spec_from_file_location("test_files", Path(__file__).with_name("test_files.py"))
tests = importlib.util.module_from_spec(spec)
sys.modules["test_files"] = tests
spec.loader.exec_module(tests)
tests.folder()  # not while it is being watched
atheris.Setup([sys.argv[0], *options], getattr(tests, name).hypothesis.fuzz_one_input)
atheris.Fuzz()
