"""The one place that looks up pictures and HTML, which lie above all else and load when something is first shown."""

import importlib
from typing import Any


def figures() -> Any:
    """The module `mpsearch.display.figures`."""
    return importlib.import_module("mpsearch.display.figures")


def html() -> Any:
    """What Jupyter shows: `mpsearch.display.fragments`."""
    return importlib.import_module("mpsearch.display.fragments")


def page() -> Any:
    """The report of a search: `mpsearch.display.page`."""
    return importlib.import_module("mpsearch.display.page")
