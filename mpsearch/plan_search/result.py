"""What a search found, and the folder that keeps it."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Required, TypedDict

import numpy as np

from mpsearch.allocation.ties import ties_text
from mpsearch.core import amounts, printing, shown
from mpsearch.core.evaluation import Evaluation
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.core.printing import undecided_text
from mpsearch.core.table import CostTable
from mpsearch.errors import FileError, PlanError, nearest
from mpsearch.files.file_set import FileSet, hash_of
from mpsearch.files.schema import OPEN, checked, read_json
from mpsearch.files.writing import csv_text, json_text, write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from mpsearch.checkpoints.store import Store
    from mpsearch.estimation.surrogate import Surrogate

_VERSION = 2
_INDEX = "summary.json"

#: What `SearchResult.plot` draws.
Picture = Literal["front", "plan", "sensitivity", "usage", "agreement", "prediction"]


@dataclass(frozen=True)
class Compared:
    """One plan on the report part, as a row of the comparison.

    Attributes:
        name: `plan`, `w4` (a uniform precision), `best of kl-divergence` (the exact plan of one table).
        role: `plan`, `uniform`, `uniform above` (the next larger one, beyond the budget), `table`.
        usage: of every resource.
        evaluation: on the report part.
        damage: that was searched for, on the report part.
        damage_se: its standard error.
        difference: damage less that of the plan, on common samples.
        difference_se: its standard error.
    """

    name: str
    role: str
    usage: Mapping[str, float]
    evaluation: Evaluation
    damage: float
    damage_se: float
    difference: float
    difference_se: float


@dataclass(frozen=True, eq=False)
class MeasuredFront:
    """Plans measured on the select part, of which none is beaten in both damage and use; with every uniform precision.

    Attributes:
        over: the resource.
        plans: not dominated, by increasing use.
        uniforms: the uniform precisions that were measured, by increasing use; None without any.
    """

    over: str
    plans: MeasuredPlans
    uniforms: MeasuredPlans | None

    @property
    def usage(self) -> np.ndarray[Any, Any]:
        """(N,) use of the resource by each plan of the front."""
        return np.array([plan.usage[self.over] for plan in self.plans.plans])

    def to_frame(self) -> "pd.DataFrame":
        """One row a plan: use of every resource, damage, standard error, whether it is uniform, whether on the front."""
        import pandas as pd

        columns, rows = self._rows()
        return pd.DataFrame(rows, columns=columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows of `to_frame` as CSV."""
        write_atomically(path, self.to_csv())

    def to_csv(self) -> str:
        """The rows of `to_frame` as CSV."""
        columns, rows = self._rows()
        return csv_text([columns, *rows])

    def _rows(self) -> tuple[list[str], list[list[Any]]]:
        resources = list(self.plans.plans[0].usage)
        columns = [*resources, "damage", "damage_se", "uniform"]
        rows = []
        for measured in (self.plans, self.uniforms):
            if measured is None:
                continue
            assert measured.damage_se is not None
            for plan, damage, se in zip(
                measured.plans, measured.damage.tolist(), measured.damage_se.tolist(), strict=True
            ):
                label = "" if measured is self.plans else _plan(plan)
                rows.append([*(float(plan.usage[name]) for name in resources), damage, se, label])
        return columns, rows

    def plot(
        self, path: str | os.PathLike[str] | None = None, *, mark: Plan | None = None, title: str = ""
    ) -> "Figure":
        """Draw measured damage over the resource, with every uniform precision.

        Args:
            path: .png, .svg or .pdf; without it the figure is only returned.
            mark: the chosen plan.
            title: above the picture.
        """
        figures = shown.figures()
        return figures.written(figures.measured_front_figure(self, mark=mark, title=title), path)

    def _repr_html_(self) -> str:
        return shown.html().measured_front(self)


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found.

    Attributes:
        plan: the best plan, measured.
        verdict: is mixed precision worth it here? In words, with numbers.
        wins: True: mixed precision is measurably better than uniform; False: uniform is; None: no measurable difference.
        measured: the plan on the report part, which the search never saw.
        uniform: the best uniform precision that fits, as (name, Evaluation on the report part); None where none fits.
        comparison: the plan, uniform precisions and the best plan of one table, on the report part.
        front: plans measured on the select part that none beats in both damage and use.
        tables: name of a signal -> its table; `posterior` is what the measured plans made of them.
        passes_in_this_run: of `passes`, fewer where a checkpoint had results; None for a result that was loaded.
        surrogate: the output as a sum of what single layers change (`mpsearch.estimation.surrogate`), where one-at-a-time runs were made.
        plans: all plans measured on the whole select part.
        passes: forward-pass equivalents taken: a backward pass counts 2.
        settings: what was asked for, and fingerprints of model and data.
        seconds: it took.
        identity: what the measured plans depend on.
        finished: everything that was run, for a search with another budget (`mpsearch.checkpoints`).
    """

    plan: Plan
    verdict: str
    wins: bool | None
    measured: Evaluation
    uniform: tuple[str, Evaluation] | None
    comparison: Sequence[Compared]
    front: MeasuredFront
    tables: Mapping[str, CostTable]
    plans: MeasuredPlans
    passes: float
    settings: Mapping[str, Any]
    seconds: float
    identity: Mapping[str, str]
    finished: "Store" = field(repr=False)
    surrogate: "Surrogate | None" = field(default=None, repr=False)
    passes_in_this_run: float | None = None

    @property
    def predicted(self) -> Mapping[str, Any]:
        """What the posterior table says of the plan: sensitivity, unit, bound, gap."""
        return self.plan.predicted

    @property
    def spent(self) -> str:
        """What the search took, in words."""
        plans = f"{len(self.plans)} plan{'s' if len(self.plans) > 1 else ''}"
        now = self.passes_in_this_run
        again = "" if now in (None, self.passes) else f" (of which in this run {now:.4g})"
        return f"{self.passes:.4g} forward-pass equivalents{again}, {plans} measured, {self.seconds:.1f} s"

    @property
    def undecided(self) -> str:
        """What no decision touches, in words; empty where that is next to nothing."""
        return undecided_text(self.tables["posterior"].origin.get("undecided", {}))

    @property
    def counted(self) -> str:
        """How `memory_bytes` is counted, in words."""
        return printing.counted(self.tables["posterior"].origin)

    @property
    def outdone(self) -> str:
        """Which options were left out since finer ones use no more, in words; empty where none was."""
        return str(self.tables["posterior"].origin.get("outdone", ""))

    @property
    def ties(self) -> Sequence[Mapping[str, Any]]:
        """What each tie costs by the posterior table at this budget, as in `mpsearch.tie_prices`; the dearest first."""
        ties: Sequence[Mapping[str, Any]] = self.plan.predicted.get("ties", ())
        return ties

    @property
    def beyond(self) -> str:
        """What a uniform precision is that uses more than was allowed."""
        return "over budget" if self.settings["budget"] else "larger"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write plan.json, tables/*.csv, plans.csv, front.csv, passes.db, and summary.json with their hashes, into a folder.

        Over an earlier result all files are replaced together: a run that is killed, or finds the disk full, leaves a folder that loads
        as the old result or as the new one (`FileSet`).

        Raises:
            OSError: names the file that cannot be written whole, or the folder that cannot be made.
        """
        from mpsearch.checkpoints.sqlite import SQLiteStore
        from mpsearch.core.table_files import to_csv

        files = {
            "plan.json": self.plan.to_json().encode(),
            **{f"tables/{name}.csv": to_csv(table).encode() for name, table in self.tables.items()},
            "plans.csv": self.plans.to_csv().encode(),
            "front.csv": self.front.to_csv().encode(),
            "passes.db": SQLiteStore.content(self.finished),
        }
        content = {**self.summary(), "files": {name: hash_of(data) for name, data in files.items()}}
        FileSet(folder, _INDEX).write({**files, _INDEX: f"{json_text(content)}\n".encode()})

    def plot(self, path: str | os.PathLike[str] | None = None, *, kind: Picture = "front", title: str = "") -> "Figure":
        """Draw one side of the result.

        Args:
            path: .png, .svg or .pdf; without it the figure is only returned.
            kind: `front` (measured damage over the resource), `plan` (bits over the depth), `sensitivity` (what the measured
                plans made of the tables), `usage` (of the first resource in the budget), `agreement` (rank correlation
                of the tables with each other and with the measured plans), `prediction` (their damage over what the posterior
                says; it has seen them).
            title: above the picture.

        Raises:
            MpsearchError: for another kind of picture.
        """
        figures, posterior = shown.figures(), self.tables["posterior"]
        kinds: dict[str, Callable[[], Figure]] = {
            "front": lambda: figures.measured_front_figure(self.front, plans=self.plans, mark=self.plan, title=title),
            "plan": lambda: figures.plan_figure(self.plan, posterior.layers, title=title),
            "sensitivity": lambda: figures.sensitivity_figure(posterior, title=title),
            "usage": lambda: figures.usage_figure(posterior, self.plan, title=title),
            "agreement": lambda: figures.agreement_figure(self.tables, self.plans, title=title),
            "prediction": lambda: figures.prediction_figure(posterior, self.plans, title=title),
        }
        if kind not in kinds:
            raise PlanError(f"no picture of kind {kind!r}{nearest(kind, kinds)}")
        return figures.written(kinds[kind](), path)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML page that needs no network: verdict, plan, comparison, curve, layers, proof, passes, settings.

        Raises:
            OSError: where the folder does not exist or cannot be written.
        """
        shown.page().write(self, path)

    def _repr_html_(self) -> str:
        return shown.html().search_result(self)

    def summary(self) -> dict[str, Any]:
        """All but the plans and tables, as JSON values."""
        return {
            "mpsearch_search": _VERSION,
            "verdict": self.verdict,
            "wins": self.wins,
            "passes": self.passes,
            "seconds": self.seconds,
            "uniform": None if self.uniform is None else self.uniform[0],
            "comparison": [dataclasses.asdict(one) for one in self.comparison],
            "over": self.front.over,
            "tables": list(self.tables),
            "settings": dict(self.settings),
            "identity": dict(self.identity),
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "SearchResult":
        """Read what `save` wrote.

        Raises:
            PlanError: where a file is damaged, or not of this result, with the place.
            OSError: where a file is missing.
        """
        from mpsearch.checkpoints.sqlite import SQLiteStore
        from mpsearch.estimation.surrogate import surrogate

        files = FileSet(folder, _INDEX)
        index = files.place(_INDEX)
        summary = _read(index)
        hashes = summary.get("files")
        tables = {name: f"tables/{name}.csv" for name in summary["tables"]}
        for path in ("passes.db", "plan.json", "plans.csv", *tables.values()):
            files.read(path, hashes)
        loaded = {name: CostTable.load(files.place(path)) for name, path in tables.items()}
        posterior = loaded["posterior"]
        plan = _plan_of(Plan.load(files.place("plan.json")), posterior, files.place("plan.json"))
        plans = _plans_of(MeasuredPlans.load(files.place("plans.csv")), posterior, files.place("plans.csv"))
        evaluations = {row.role: row.evaluation for row in summary["comparison"]}
        name, over = summary["uniform"], summary["over"]
        needed = {"plan"} if name is None else {"plan", "uniform"}
        if needed - evaluations.keys() or any(row.usage.keys() != plan.usage.keys() for row in summary["comparison"]):
            raise PlanError(f"{index}: the comparison does not fit the plan and the tables")
        if over not in plan.usage:
            raise PlanError(f"{index}: $.over is {over!r}{nearest(over, plan.usage)}")
        passes = files.read("passes.db", hashes)
        finished = SQLiteStore.read(files.place("passes.db"), passes, summary["identity"])
        decisions = len({layer.decision for layer in posterior.layers})
        shifts = surrogate(finished, decisions, posterior.precisions)
        return cls(
            plan,
            summary["verdict"],
            summary["wins"],
            evaluations["plan"],
            None if name is None else (name, evaluations["uniform"]),
            summary["comparison"],
            measured_front(plans, over),
            loaded,
            plans,
            summary["passes"],
            summary["settings"],
            summary["seconds"],
            summary["identity"],
            finished,
            shifts,
        )

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 80) -> str:
        """Verdict, comparison and passes, for a person; the table in so many columns."""
        usage = self.comparison[0].usage
        resources = [name for name in dict.fromkeys(("average_bits", "memory_bytes", self.front.over)) if name in usage]
        (first, title, tell_first), *kinds = self.measured.kinds
        kinds = [(kind, "right" if kind == "accuracy" else name, tell) for kind, name, tell in kinds]
        rows = [
            [
                one.name + (f" ({self.beyond})" if one.role == "uniform above" else ""),
                *(amounts.text(name, one.usage[name]) for name in resources),
                tell_first(getattr(one.evaluation, first), getattr(one.evaluation, f"{first}_se")),
                *(tell(getattr(one.evaluation, kind)) for kind, _, tell in kinds),
            ]
            for one in self.comparison
        ]
        reference = self.measured.reference
        if reference is not None:
            told = [tell(getattr(reference, kind)) for kind, _, tell in kinds]
            rows.append(["unquantized", *[""] * len(resources), tell_first(getattr(reference, first)), *told])
        labels = ["bits" if name == "average_bits" else amounts.label(name) for name in resources]
        header = ["held-out data", *labels, title, *(title for _, title, _ in kinds)]
        shown = printing.table(header, rows, width)
        for title in ("loss", "memory", "right"):  # what is least needed, where there is no room
            if title in header and max(map(len, shown.split("\n"))) > width:
                place = header.index(title)
                header, *rows = ([*line[:place], *line[place + 1 :]] for line in [header, *rows])
                shown = printing.table(header, rows, width)
        gap = self.plan.predicted.get("gap")
        proof = (
            "no bound on the plan's damage is known" if gap is None else
            "the plan is the optimum of the table learned from these plans" if gap <= 0 else
            f"the plan is within {100 * gap:.2g} % of the optimum of the table learned from these plans"
        )  # fmt: skip
        return "\n".join(
            [
                self.verdict,
                "",
                shown,
                "",
                self.spent,
                *filter(None, [self.settings.get("measured", "")]),
                proof,
                *filter(None, [ties_text(self.plan.predicted), self.undecided, self.counted, self.outdone]),
            ]
        )


def with_usage(plan: Plan, table: CostTable) -> Plan:
    """A plan with its use of every resource of a table."""
    from mpsearch.core.problem import usage_of

    options = np.array([table.precisions.index(plan[layer.name]) for layer in table.layers])
    usage = usage_of(table, options)
    del usage["sensitivity"]
    return dataclasses.replace(plan, usage=usage)


def measured_front(plans: MeasuredPlans, over: str) -> MeasuredFront:
    """The plans that none beats in both damage and use of one resource, and the uniform ones."""
    use = np.array([plan.usage[over] for plan in plans.plans])
    kept: list[int] = []
    for number in np.lexsort((plans.damage, use)):
        if not kept or plans.damage[number] < plans.damage[kept[-1]]:
            kept.append(int(number))
    uniform = [i for i, plan in enumerate(plans.plans) if len(set(plan.values())) == 1]
    uniform.sort(key=lambda i: use[i])
    return MeasuredFront(over, _part(plans, kept), _part(plans, uniform) if uniform else None)


def _part(plans: MeasuredPlans, numbers: Sequence[int]) -> MeasuredPlans:
    assert plans.damage_se is not None
    places = list(numbers)
    return dataclasses.replace(
        plans,
        plans=tuple(plans.plans[i] for i in places),
        damage=plans.damage[places],
        damage_se=plans.damage_se[places],
    )


def _plan(plan: Plan) -> str:
    return str(next(iter(plan.values())))


class _Settings(TypedDict, total=False):
    budget: Required[dict[str, Any]]
    max_passes: float | None
    tolerance: float | None
    metric: str
    stages: dict[str, float]
    environment: dict[str, str]


class _Summary(TypedDict):
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


def _read(path: Path) -> _Summary:
    try:
        summary = read_json(path.read_bytes(), _Summary, version="mpsearch_search", known=(1, _VERSION))
        if summary["mpsearch_search"] == _VERSION and "files" not in summary:
            raise FileError("the key 'files' is missing")
    except FileError as error:
        raise PlanError(f"{path}: {error}") from None
    for name in summary["tables"]:
        if Path(name).name != name or name in ("", "..") or "\\" in name or not name.isprintable():
            raise PlanError(f"{path}: the table {name!r} is no name of a file in the folder")
    if "posterior" not in summary["tables"]:
        raise PlanError(f"{path}: no table 'posterior' at $.tables")
    return summary


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
    return dataclasses.replace(plans, plans=tuple(with_usage(plan, posterior) for plan in plans.plans))
