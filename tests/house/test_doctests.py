"""Every example in the documentation of the code runs."""

import doctest
import importlib
import pkgutil

import pytest

import mpsearch


def modules():
    names = [info.name for info in pkgutil.walk_packages(mpsearch.__path__, "mpsearch.")]
    names.remove("mpsearch.__main__")  # it runs
    return sorted(names)


@pytest.mark.parametrize("name", modules())
def test_examples(name):
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0
