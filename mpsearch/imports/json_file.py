"""JSON settings of other tools."""

import os
from pathlib import Path
from typing import Any

from mpsearch.errors import FileError, PlanError
from mpsearch.files.schema import parse_json


def json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        PlanError: where it holds something else.
        OSError: where the file cannot be read.
    """
    try:
        content = parse_json(Path(path).read_bytes())
    except FileError as error:
        raise PlanError(f"{path}: {error}") from None
    if not isinstance(content, dict):
        raise PlanError(f"{path}: expected an object, got {type(content).__name__}")
    return content
