"""`summary.json`, the index of a result's folder."""

from pathlib import Path
from typing import Annotated, Any, NotRequired, Required, TypedDict

from mpsearch.errors import FileError, PlanError
from mpsearch.files.schema import OPEN, read_json
from mpsearch.plan_search.results.compared import Compared

#: Version of the summary, and its file, which tells the hashes of the others.
VERSION, INDEX = 2, "summary.json"


class _Settings(TypedDict, total=False):
    budget: Required[dict[str, Any]]
    max_passes: float | None
    tolerance: float | None
    metric: str
    stages: dict[str, float]
    environment: dict[str, str]


class Summary(TypedDict):
    """What `SearchResult.summary` writes."""

    mpsearch_search: int
    verdict: str
    wins: bool | None
    passes: float
    seconds: float
    uniform: str | None
    comparison: list[Compared]
    over: str
    tables: list[str]
    settings: Annotated[_Settings, OPEN]
    identity: dict[str, str]
    files: NotRequired[dict[str, str]]  # since version 2


def read_summary(path: Path) -> Summary:
    """The summary in a file.

    Raises:
        PlanError: with the place of what is damaged.
        OSError: where the file is missing.
    """
    try:
        summary = read_json(path.read_bytes(), Summary, version="mpsearch_search", known=(1, VERSION))
        if summary["mpsearch_search"] == VERSION and "files" not in summary:
            raise FileError("the key 'files' is missing")
    except FileError as error:
        raise PlanError(f"{path}: {error}") from None
    for name in summary["tables"]:
        if Path(name).name != name or name in ("", "..") or "\\" in name or not name.isprintable():
            raise PlanError(f"{path}: the table {name!r} is no name of a file in the folder")
    if "posterior" not in summary["tables"]:
        raise PlanError(f"{path}: no table 'posterior' at $.tables")
    return summary
