"""What pyproject.toml requires, one a line: `python tests/requirements.py newest|lowest [EXTRA...]`.

`newest` prints the requirements as they stand, `lowest` the lowest version that each allows, as constraints of pip.
"""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]


def required(*extras: str) -> Iterator[str]:
    """Requirements of the project and of some of its extras, those that name other extras opened."""
    yield from PROJECT["dependencies"]
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            inner = re.fullmatch(r"mpsearch\[(.*)\]", requirement)
            yield from required(*inner[1].split(",")) if inner else [requirement]


def name_of(requirement: str) -> str:
    """The distribution that a requirement names, as an index spells it."""
    return re.split(r"[\[<>=;! ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def lowest(requirement: str) -> str:
    """`name==version` of the lowest version that a requirement allows."""
    bound = re.search(r">=\s*([\w.]+)", requirement)
    if bound is None:
        raise ValueError(f"{requirement!r} has no lower bound")
    return f"{name_of(requirement)}=={bound[1]}"


if __name__ == "__main__":
    lines = required(*sys.argv[2:])
    print("\n".join(dict.fromkeys(map(lowest, lines) if sys.argv[1] == "lowest" else lines)))
