"""What a search found."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpsearch.allocation.ties import ties_text
from mpsearch.core import amounts, printing, shown
from mpsearch.core.evaluation import Evaluation
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.plan import Plan
from mpsearch.core.printing import undecided_text
from mpsearch.core.table import CostTable
from mpsearch.errors import PlanError, nearest
from mpsearch.files.file_set import FileSet, hash_of
from mpsearch.files.writing import json_text
from mpsearch.plan_search.results.compared import Compared
from mpsearch.plan_search.results.measured_front import MeasuredFront, measured_front
from mpsearch.plan_search.results.summary import INDEX, VERSION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpsearch.checkpoints.store import Store
    from mpsearch.estimation.surrogate import Surrogate

#: What `SearchResult.plot` draws.
Picture = Literal["front", "plan", "sensitivity", "usage", "agreement", "prediction"]


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
        from mpsearch.core.tables.files import to_csv

        files = {
            "plan.json": self.plan.to_json().encode(),
            **{f"tables/{name}.csv": to_csv(table).encode() for name, table in self.tables.items()},
            "plans.csv": self.plans.to_csv().encode(),
            "front.csv": self.front.to_csv().encode(),
            "passes.db": SQLiteStore.content(self.finished),
        }
        content = {**self.summary(), "files": {name: hash_of(data) for name, data in files.items()}}
        FileSet(folder, INDEX).write({**files, INDEX: f"{json_text(content)}\n".encode()})

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
            "mpsearch_search": VERSION,
            "verdict": self.verdict,
            "wins": self.wins,
            "passes": self.passes,
            "seconds": self.seconds,
            "uniform": None if self.uniform is None else self.uniform[0],
            "comparison": [dataclasses.asdict(row) for row in self.comparison],
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
        from mpsearch.plan_search.results.folder import read_folder  # needs torch, which solving does not

        content = read_folder(Path(folder))
        summary = content.summary
        evaluations = {row.role: row.evaluation for row in summary["comparison"]}
        uniform = summary["uniform"]
        return cls(
            plan=content.plan,
            verdict=summary["verdict"],
            wins=summary["wins"],
            measured=evaluations["plan"],
            uniform=None if uniform is None else (uniform, evaluations["uniform"]),
            comparison=summary["comparison"],
            front=measured_front(content.plans, summary["over"]),
            tables=content.tables,
            plans=content.plans,
            passes=summary["passes"],
            settings=summary["settings"],
            seconds=summary["seconds"],
            identity=summary["identity"],
            finished=content.finished,
            surrogate=content.surrogate,
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
                row.name + (f" ({self.beyond})" if row.role == "uniform above" else ""),
                *(amounts.text(name, row.usage[name]) for name in resources),
                tell_first(getattr(row.evaluation, first), getattr(row.evaluation, f"{first}_se")),
                *(tell(getattr(row.evaluation, kind)) for kind, _, tell in kinds),
            ]
            for row in self.comparison
        ]
        reference = self.measured.reference
        if reference is not None:
            others = [tell(getattr(reference, kind)) for kind, _, tell in kinds]
            rows.append(["unquantized", *[""] * len(resources), tell_first(getattr(reference, first)), *others])
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
