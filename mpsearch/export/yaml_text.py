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
        return "".join(f"{blanks}{_quoted(str(key))}:{_nested(part, indent)}" for key, part in value.items())
    if isinstance(value, list | tuple) and value:
        return "".join(f"{blanks}-{_nested(part, indent)}" for part in value)
    return f"{blanks}{_quoted(value)}\n"


def _nested(value: Any, indent: int) -> str:
    if isinstance(value, Mapping | list | tuple) and value:
        return f"\n{yaml_text(value, indent + 2)}"
    return f" {_quoted(value)}\n"


def _quoted(value: Any) -> str:
    r"""JSON, which is YAML but for characters beyond U+FFFF: JSON writes two halves of one, YAML knows none.

    >>> _quoted("a\n\u2028")
    '"a\\n\\u2028"'
    """
    if not isinstance(value, str):
        return json.dumps(value)
    return '"' + "".join(json.dumps(sign)[1:-1] if ord(sign) < 0x10000 else sign for sign in value) + '"'
