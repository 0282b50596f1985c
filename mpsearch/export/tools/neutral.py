"""Plain CSV, JSON or YAML, for tools and scripts that mpsearch does not know."""

import json
import os
import re
from pathlib import Path
from typing import Any, Literal

from torch import nn

from mpsearch.core.plan import Plan
from mpsearch.errors import ExportError
from mpsearch.export.exporter import Exporter, Setting
from mpsearch.export.fitting import described, named_in
from mpsearch.files.writing import csv_text, write_atomically
from mpsearch.files.yaml_writing import yaml_text
from mpsearch.models.unwrapping import unwrapped

_COLUMNS = ("weight_format", "weight_bits", "activation_format", "activation_bits", "group_size")


def neutral(
    plan: Plan,
    model: nn.Module | None = None,
    *,
    path: str | os.PathLike[str] | None = None,
    keys: Literal["name", "regex"] = "name",
) -> dict[str, dict[str, Any]]:
    r"""Formats and bits by layer.

    Args:
        plan: the plan.
        model: checks the names.
        path: also write it there, as its ending tells: .csv, .json or .yaml.
        keys: layers by full name, or by a regular expression that matches that name alone.

    Returns:
        Layer -> weight_format, weight_bits, activation_format, activation_bits, group_size (None = a scale an output channel).

    Raises:
        ExportError: for a name that is no layer of the model, or an unknown ending.

    >>> from mpsearch import Precision
    >>> list(neutral(Plan({"model.fc": Precision("4")}), keys="regex"))
    ['^model\\.fc$']
    """
    model = unwrapped(model)
    plan = named_in(plan, model)
    described(plan, model)
    content = {
        name if keys == "name" else f"^{re.escape(name)}$": {
            "weight_format": precision.weight,
            "weight_bits": precision.weight_bits,
            "activation_format": precision.activation,
            "activation_bits": precision.activation_bits,
            "group_size": precision.group_size,
        }
        for name, precision in plan.items()
    }
    if path is not None:
        write_atomically(path, _text(content, Path(path).suffix))
    return content


def _text(content: dict[str, dict[str, Any]], suffix: str) -> str:
    if suffix == ".json":
        return json.dumps(content, indent=1) + "\n"
    if suffix in (".yaml", ".yml"):
        return yaml_text(content)
    if suffix != ".csv":
        raise ExportError(f"a neutral file ends in .csv, .json or .yaml, not {suffix or 'nothing'!r}")
    return csv_text(
        [["layer", *_COLUMNS], *([name, *(row[column] for column in _COLUMNS)] for name, row in content.items())]
    )


NEUTRAL = Exporter("neutral", neutral, settings={"keys": Setting(Literal["name", "regex"], "name")})
