"""JSON settings of other tools."""

import json
import os
from pathlib import Path
from typing import Any

from mpsearch.errors import PlanError


def json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        PlanError: where it holds something else.
        OSError: where the file cannot be read.
    """
    try:
        content = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise PlanError(f"{path}: expected an object, got {type(content).__name__}")
    return content
