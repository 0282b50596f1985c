"""The page on the architecture says what the tree is."""

import configparser
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs a checkout, not an installed package"
)
PAGES = ("docs/architecture.md", "CONTRIBUTING.md")


def rooms():
    """Packages in the order of the page, from the top."""
    page = (ROOT / "docs/architecture.md").read_text()
    return re.findall(r"^\| `mpsearch\.(\w+)` \| .{10,} \|$", page, re.MULTILINE)


def test_the_rooms_stand_in_the_order_of_the_contract():
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    rows = contract["importlinter:contract:levels"]["layers"].split()
    assert rooms() == [name for name in rows if name not in ("|", "__main__")]


@pytest.mark.parametrize("page", PAGES)
def test_what_the_page_names_exists(page):
    text = (ROOT / page).read_text()
    paths = re.findall(r"`([\w./]+/[\w./]*|[\w/]+\.(?:py|md|toml))`", text)
    made = {"site/"}  # by `make docs`
    assert [path for path in paths if path not in made and not (ROOT / path).exists()] == []
    for name in re.findall(r"`(mpsearch(?:\.\w+)+)", text):
        assert resolved(name), name


def resolved(name):
    """True where a dotted name is a module, or something in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


def test_every_registry_is_a_literal_dict_with_parts():
    page = (ROOT / "docs/architecture.md").read_text()
    registries = re.findall(r"\| `(mpsearch[\w.]+\.[A-Z_]+)` \|", page)
    assert len(registries) == len(set(registries)) >= 8
    for registry in registries:
        module, _, name = registry.rpartition(".")
        parts = getattr(importlib.import_module(module), name)
        assert isinstance(parts, dict)
        assert parts


def test_every_suite_is_public():
    page = (ROOT / "docs/architecture.md").read_text()
    suites = re.findall(r"`mpsearch\.testing\.\w+\.(\w+_checks)`", page)
    assert len(suites) >= 8
    for suite in suites:
        assert callable(getattr(importlib.import_module("mpsearch.testing"), suite))
