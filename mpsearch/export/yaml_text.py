"""YAML of plain data, written without a library."""

import json
from collections.abc import Mapping
from typing import Any


def yaml_text(value: Any, indent: int = 0) -> str:
    """Block style; every text is quoted, so that no name is read as a number or a truth value.

    >>> print(yaml_text({"bits": 4, "layers": {"no": [1.5, "a"]}}), end="")
    "bits": 4
    "layers":
      "no":
        - 1.5
        - "a"
    """
    blanks = " " * indent
    if isinstance(value, Mapping) and value:
        return "".join(f"{blanks}{json.dumps(str(key))}:{_nested(part, indent)}" for key, part in value.items())
    if isinstance(value, list | tuple) and value:
        return "".join(f"{blanks}-{_nested(part, indent)}" for part in value)
    return f"{blanks}{json.dumps(value)}\n"


def _nested(value: Any, indent: int) -> str:
    if isinstance(value, Mapping | list | tuple) and value:
        return f"\n{yaml_text(value, indent + 2)}"
    return f" {json.dumps(value)}\n"
