"""What a search found, and the folder that keeps it."""

import csv
import dataclasses
import errno
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mpsearch import report
from mpsearch.errors import PlanError, nearest
from mpsearch.evaluation import Evaluation
from mpsearch.files import json_text, write_atomically
from mpsearch.measured_plans import MeasuredPlans
from mpsearch.plan import Plan
from mpsearch.table import CostTable
from mpsearch.undecided import sentence

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from mpsearch.logit_shift import Surrogate

_VERSION = 1

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
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns, rows = self._rows()
        writer.writerow(columns)
        writer.writerows(rows)
        write_atomically(path, text.getvalue())

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
        from mpsearch import plot

        return plot.written(plot.measured_front_figure(self, mark=mark, title=title), path)

    def _repr_html_(self) -> str:
        from mpsearch.html import display

        return display.measured_front(self)


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
        surrogate: the output as a sum of what single layers change (`mpsearch.logit_shift`), where one-at-a-time runs were made.
        plans: all plans measured on the whole select part.
        passes: forward-pass equivalents taken: a backward pass counts 2.
        settings: what was asked for, and fingerprints of model and data.
        seconds: it took.
        identity: what the measured plans depend on.
        finished: everything that was run, for a search with another budget.
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
    finished: Mapping[str, bytes] = field(repr=False)
    surrogate: "Surrogate | None" = field(default=None, repr=False)

    @property
    def predicted(self) -> Mapping[str, Any]:
        """What the posterior table says of the plan: sensitivity, unit, bound, gap."""
        return self.plan.predicted

    @property
    def spent(self) -> str:
        """What the search took, in words."""
        plans = f"{len(self.plans)} plan{'s' if len(self.plans) > 1 else ''}"
        return f"{self.passes:.4g} forward-pass equivalents, {plans} measured, {self.seconds:.1f} s"

    @property
    def undecided(self) -> str:
        """What no decision touches, in words; empty where that is next to nothing."""
        return sentence(self.tables["posterior"].origin.get("undecided", {}))

    @property
    def beyond(self) -> str:
        """What a uniform precision is that uses more than was allowed."""
        return "over budget" if self.settings["budget"] else "larger"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write plan.json, tables/*.csv, plans.csv, front.csv, summary.json and passes.db into a folder.

        Raises:
            OSError: where the folder cannot be made or written.
        """
        from mpsearch.checkpoint import Checkpoint

        path = Path(folder)
        (path / "tables").mkdir(parents=True, exist_ok=True)
        self.plan.save(path / "plan.json")
        for name, table in self.tables.items():
            table.save(path / "tables" / f"{name}.csv")
        self.plans.save(path / "plans.csv")
        self.front.save(path / "front.csv")
        with tempfile.TemporaryDirectory(dir=path, prefix=".passes.") as part:  # a run killed here leaves the old file
            with Checkpoint(Path(part) / "passes.db", self.identity) as kept:
                kept.fill(self.finished)
            (Path(part) / "passes.db").replace(path / "passes.db")
        write_atomically(path / "summary.json", json_text(self.summary()) + "\n")

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
        from mpsearch import plot

        posterior = self.tables["posterior"]
        kinds: dict[str, Callable[[], Figure]] = {
            "front": lambda: plot.measured_front_figure(self.front, plans=self.plans, mark=self.plan, title=title),
            "plan": lambda: plot.plan_figure(self.plan, posterior.layers, title=title),
            "sensitivity": lambda: plot.sensitivity_figure(posterior, title=title),
            "usage": lambda: plot.usage_figure(posterior, self.plan, title=title),
            "agreement": lambda: plot.agreement_figure(self.tables, self.plans, title=title),
            "prediction": lambda: plot.prediction_figure(posterior, self.plans, title=title),
        }
        if kind not in kinds:
            raise PlanError(f"no picture of kind {kind!r}{nearest(kind, kinds)}")
        return plot.written(kinds[kind](), path)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML page that needs no network: verdict, plan, comparison, curve, layers, proof, passes, settings.

        Raises:
            OSError: where the folder does not exist or cannot be written.
        """
        from mpsearch.html import report

        report.write(self, path)

    def _repr_html_(self) -> str:
        from mpsearch.html import display

        return display.search_result(self)

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
            PlanError: where a file is damaged, with the place.
            OSError: where a file is missing.
        """
        from mpsearch.checkpoint import Checkpoint
        from mpsearch.logit_shift import surrogate

        path = Path(folder)
        content = _read(path / "summary.json")
        if not (path / "passes.db").is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path / "passes.db"))
        tables = {name: CostTable.load(path / "tables" / f"{name}.csv") for name in content["tables"]}
        plans = MeasuredPlans.load(path / "plans.csv")
        posterior = tables["posterior"]
        plans = dataclasses.replace(plans, plans=tuple(with_usage(plan, posterior) for plan in plans.plans))
        name = content["uniform"]
        try:
            comparison = [_compared(one) for one in content["comparison"]]
            evaluations = {one.role: one.evaluation for one in comparison}
            measured, uniform = evaluations["plan"], None if name is None else (name, evaluations["uniform"])
        except (AttributeError, KeyError, TypeError) as error:
            raise PlanError(f"{path / 'summary.json'}: the comparison is damaged ({error!r})") from None
        with Checkpoint.copy_of(path / "passes.db", content["identity"]) as kept:
            finished = kept.rows()
            units = len({(bool(layer.group), layer.group or layer.name) for layer in posterior.layers})
            shifts = surrogate(kept, units, posterior.precisions)
        return cls(
            Plan.load(path / "plan.json"),
            content["verdict"],
            content["wins"],
            measured,
            uniform,
            comparison,
            measured_front(plans, content["over"]),
            tables,
            plans,
            content["passes"],
            content["settings"],
            content["seconds"],
            content["identity"],
            finished,
            shifts,
        )

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int = 80) -> str:
        """Verdict, comparison and passes, for a person; the table in so many columns."""
        usage = self.comparison[0].usage
        resources = [name for name in dict.fromkeys(("average_bits", "memory_bytes", self.front.over)) if name in usage]
        kinds = [
            ("loss", "loss", report.damage),
            ("accuracy", "right", report.percent),
            ("metric", "metric", report.damage),
        ]
        kinds = [kind for kind in kinds if getattr(self.measured, kind[0]) is not None]
        rows = [
            [
                one.name + (f" ({self.beyond})" if one.role == "uniform above" else ""),
                *(report.amount(name, one.usage[name]) for name in resources),
                report.damage(one.evaluation.kl, one.evaluation.kl_se),
                *(tell(getattr(one.evaluation, kind)) for kind, _, tell in kinds),
            ]
            for one in self.comparison
        ]
        reference = self.measured.reference
        if reference is not None:
            told = [tell(getattr(reference, kind)) for kind, _, tell in kinds]
            rows.append(["unquantized", *[""] * len(resources), report.damage(reference.kl), *told])
        labels = ["bits" if name == "average_bits" else report.label(name) for name in resources]
        header = ["held-out data", *labels, "KL [nats]", *(title for _, title, _ in kinds)]
        shown = report.table(header, rows, width)
        for title in ("loss", "memory", "right"):  # what is least needed, where there is no room
            if title in header and max(map(len, shown.split("\n"))) > width:
                place = header.index(title)
                header, *rows = ([*line[:place], *line[place + 1 :]] for line in [header, *rows])
                shown = report.table(header, rows, width)
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
                proof,
                *filter(None, [self.undecided]),
            ]
        )


def with_usage(plan: Plan, table: CostTable) -> Plan:
    """A plan with its use of every resource of a table."""
    from mpsearch.problem import usage_of

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


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: not JSON ({error})") from None
    known = (
        "mpsearch_search", "verdict", "wins", "passes", "seconds", "uniform", "comparison", "over", "tables", "settings", "identity",
    )  # fmt: skip
    if not isinstance(content, dict) or content.get("mpsearch_search") != _VERSION:
        raise PlanError(f"{path}: no summary of a search that this mpsearch reads")
    for key in content:
        if key not in known:
            raise PlanError(f"{path}: unknown key {key!r}{nearest(key, known)}")
    for key in known:
        if key not in content:
            raise PlanError(f"{path}: the key {key!r} is missing")
    return content


def _compared(content: dict[str, Any]) -> Compared:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    def evaluation(value: dict[str, Any]) -> Evaluation:
        found = {key: part for key, part in value.items() if key != "reference"}
        for key in ("kl", "kl_se"):
            found[key] = number(found[key])
        return Evaluation(**found, reference=None if value["reference"] is None else evaluation(value["reference"]))

    numbers = {key: number(content[key]) for key in ("damage", "damage_se", "difference", "difference_se")}
    return Compared(content["name"], content["role"], content["usage"], evaluation(content["evaluation"]), **numbers)
