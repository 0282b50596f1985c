"""Renders the reference of every public name: `python docs/reference.py FOLDER`."""

import importlib
import sys
from pathlib import Path

import pdoc

import mpsearch

#: Packages and modules that are public beside `mpsearch` itself, in the order of the reference.
PARTS = (
    "sensitivity",
    "solvers",
    "resources",
    "export",
    "imports",
    "display.figures",
    "quantizers",
    "testing",
)


def render(folder: Path) -> None:
    """Write a page for `mpsearch` and one for each module of its public parts.

    Args:
        folder: made if need be; `index.html` is the first page.
    """
    for name in mpsearch.__all__:
        vars(mpsearch)[name] = getattr(mpsearch, name)  # pdoc does not ask for names that are loaded when first used
    for part in PARTS:
        importlib.import_module(f"mpsearch.{part}")
    mpsearch.__all__ += [part for part in PARTS if "." not in part]
    pdoc.render.configure(docformat="google", show_source=False)
    deeper = [f"mpsearch.{part}" for part in PARTS if "." in part]  # pdoc follows one name at a time
    pdoc.pdoc("mpsearch", *deeper, output_directory=folder)


if __name__ == "__main__":
    render(Path(sys.argv[1]))
