"""Which module of the tree imports which: read from the text, so that imports inside functions and for types alone count too."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FOLDERS = ("mpsearch", "mpsearch/sensitivity", "mpsearch/solvers")


class Import(NamedTuple):
    """`importer` imports `imported`, in line `line` of its file."""

    importer: str
    imported: str
    line: int


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    files = {path for folder in FOLDERS for path in (root / folder).rglob("*.py")}
    return {_name(path.relative_to(root)): path for path in sorted(files)}


def imports(root: Path) -> Iterator[Import]:
    """Every import of a module of the package by another."""
    known = modules(root)
    for importer, path in known.items():
        for node in ast.walk(ast.parse(path.read_text())):
            for imported in _imported(node, known):
                yield Import(importer, imported, getattr(node, "lineno", 0))


def _imported(node: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            name = inner if inner in known else node.module
            if name in known:
                yield name
    elif isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
