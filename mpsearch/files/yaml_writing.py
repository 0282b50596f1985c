"""YAML of plain data, written by PyYAML."""

import math
from typing import Any

import yaml


class _QuotedDumper(yaml.SafeDumper):
    """Every text in double quotes, so that no reader takes a layer named `no`, `y` or `1e5` for a truth value or a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """True: a part that occurs twice is written twice, since few readers of recipes expect anchors."""
        return True


_QuotedDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def yaml_text(content: Any) -> str:
    """Block style, keys in their order, no line folded.

    Raises:
        yaml.YAMLError: for anything but mappings, lists, texts, numbers, truth values and None.

    >>> print(yaml_text({"bits": 4, "layers": {"no": [1.5, "a"]}}), end="")
    "bits": 4
    "layers":
      "no":
      - 1.5
      - "a"
    """
    return yaml.dump(content, Dumper=_QuotedDumper, default_flow_style=False, sort_keys=False, width=math.inf)
