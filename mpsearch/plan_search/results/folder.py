"""The folder that a result was saved to, read and held against itself."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypedDict

import numpy as np

from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.checkpoints.store import Store
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.core.table import CostTable
from mpsearch.errors import FileError, PlanError, nearest
from mpsearch.estimation.surrogate import Surrogate, surrogate
from mpsearch.files.file_set import FileSet
from mpsearch.files.schema import OPEN, checked
from mpsearch.plan_search.plan_usage import with_usage
from mpsearch.plan_search.results.summary import INDEX, Summary, read_summary


@dataclass(frozen=True, eq=False)
class FolderContent:
    """What the files of a folder hold.

    Attributes:
        summary: all but the rest.
        plan: the chosen plan, with its use of every resource.
        plans: all measured plans, with theirs.
        tables: name of a signal -> its table.
        finished: everything that was run.
        surrogate: of the output, where one-at-a-time runs were made.
    """

    summary: Summary
    plan: Plan
    plans: MeasuredPlans
    tables: Mapping[str, CostTable]
    finished: Store
    surrogate: Surrogate | None


def read_folder(folder: Path) -> FolderContent:
    """Read what `SearchResult.save` wrote.

    Raises:
        PlanError: where a file is damaged, or not of this result, with the place.
        OSError: where a file is missing.
    """
    files = FileSet(folder, INDEX)
    index = files.place(INDEX)
    summary = read_summary(index)
    hashes = summary.get("files")
    paths = {name: f"tables/{name}.csv" for name in summary["tables"]}
    for path in ("passes.db", "plan.json", "plans.csv", *paths.values()):
        files.read(path, hashes)
    tables = {name: CostTable.load(files.place(path)) for name, path in paths.items()}
    posterior = tables["posterior"]
    plan = _plan_of(Plan.load(files.place("plan.json")), posterior, files.place("plan.json"))
    plans = _plans_of(MeasuredPlans.load(files.place("plans.csv")), posterior, files.place("plans.csv"))
    roles = {row.role for row in summary["comparison"]}
    needed = {"plan"} if summary["uniform"] is None else {"plan", "uniform"}
    if needed - roles or any(row.usage.keys() != plan.usage.keys() for row in summary["comparison"]):
        raise PlanError(f"{index}: the comparison does not fit the plan and the tables")
    over = summary["over"]
    if over not in plan.usage:
        raise PlanError(f"{index}: $.over is {over!r}{nearest(over, plan.usage)}")
    passes = files.read("passes.db", hashes)
    finished = SQLiteStore.read(files.place("passes.db"), passes, summary["identity"])
    decisions = len({layer.decision for layer in posterior.layers})
    return FolderContent(summary, plan, plans, tables, finished, surrogate(finished, decisions, posterior.precisions))


class _Selected(TypedDict):
    damage: float
    se: float
    unit: str


class _Search(TypedDict):
    select: _Selected


class _PlanOrigin(TypedDict):
    search: Annotated[_Search, OPEN]


class _PlansOrigin(TypedDict):
    samples: int


def _plan_of(plan: Plan, posterior: CostTable, path: Path) -> Plan:
    """The chosen plan with its use, held against the table that it was found in."""
    _plans_of(MeasuredPlans((plan,), np.zeros(1), np.zeros(1), origin={"samples": 1}), posterior, path)
    try:
        checked(plan.origin, Annotated[_PlanOrigin, OPEN], "$.origin")
        checked(plan.predicted.get("sensitivity"), float, "$.predicted.sensitivity")
    except FileError as error:
        raise PlanError(f"{path}: {error}") from None
    return with_usage(plan, posterior)


def _plans_of(plans: MeasuredPlans, posterior: CostTable, path: Path) -> MeasuredPlans:
    """Measured plans with their use, held against the table that they belong to."""
    try:
        plans.options(posterior)
        checked(plans.origin, Annotated[_PlansOrigin, OPEN], "$.origin")
    except (FileError, PlanError) as error:
        raise PlanError(f"{path}: {error}") from None
    if plans.damage_se is None:
        raise PlanError(f"{path}: no column 'damage_se', which a search writes")
    return replace(plans, plans=tuple(with_usage(plan, posterior) for plan in plans.plans))
