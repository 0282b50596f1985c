"""What whole searches are worth: measured damage of the plans of mpsearch, of single tables and of other tools, for their passes.

    python benchmarks/plans.py [--models resnet20 vit] [--methods uniform KL MCT] [--seeds 0 1 2] [--missing]

Every method gets a network, a small calibration set (a different one a seed) and a budget of average bits, and returns a plan of
2, 3, 4, 6 or 8 bits a layer. One judge measures them all: round to nearest with MSE scales per channel, on held-out data.
The scale is a reference plan for each network and budget: the one with the least damage on a selection split among the
plans of all methods and some hundreds found by a long search; its held-out damage is what others are divided by, so a ratio
below 1 can occur. Other tools run in environments of their own: `benchmarks/peers/build.sh` makes them; those not built
are left out. Writes benchmarks/results/plans.csv, plans_table.md and a plot for each network; rows of other networks, methods and
seeds are kept.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from models import MODELS, Trained, cache
from numpy.typing import NDArray
from torch import Tensor, nn

import mpsearch as mps
from mpsearch.core import printing
from mpsearch.display.figures import BLUE, GREY, ORANGE, save
from mpsearch.estimation.context import Context
from mpsearch.estimation.estimator import Estimate
from mpsearch.files.writing import write_atomically
from mpsearch.metrics.statistics import Mean, kl_divergence
from mpsearch.models.running import call, predictions, samples
from mpsearch.models.streaming.offloading import replaced
from mpsearch.resources.memory import MemoryBytes
from mpsearch.sensitivity import (
    Estimator,
    FisherProjection,
    HessianTopEigenvalue,
    HessianTrace,
    KLDivergence,
    OutputGradient,
    RelativeWeightError,
)
from sensitivity import (  # noqa: TID251 the script beside this one
    BUDGETS,
    PRECISIONS,
    RESULTS,
    SIZES,
    Judge,
    Options,
    lock,
    random_plan,
)

PEERS = Path(__file__).resolve().parent / "peers"
#: Network -> calibration samples, taken in two batches.
SAMPLES = {"resnet20": 256, "vit": 256, "mobilenet": 256, "decoder": 64}
SELECTION = 512  # most samples of the split that the reference is selected on
NOISE = 0.5  # standard deviation of the log of the noise on tables in the reference search
NEAR = 0.25  # plans within so many average bits below a budget count as searched for it
DISTILLATION = 500  # iterations of a batch of distilled data
TIE = 1e-9  # average bits are sums of floats
BROWN = "#8a5f00"  # orange, dark enough for text
CASE = ["model", "average_bits_limit"]
KEYS = [*CASE, "method", "seed"]


@dataclass(frozen=True, eq=False)
class Task:
    """What a method is given.

    Attributes:
        name: the network, in `MODELS`.
        model: the network itself.
        batches: calibration data.
        seed: of the calibration data, and of what the method draws.
        space: layers and sizes of plans.
        kept: work that serves several budgets, by method; each budget is charged for all of it.
    """

    name: str
    model: nn.Module
    batches: Sequence[tuple[Tensor, Tensor]]
    seed: int
    space: Judge
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A method's plan, and what it took: passes over the calibration set, a backward as 2, and CPU seconds."""

    plan: mps.Plan
    passes: float
    cpu_s: float


#: `method(task, average bits)` returns a plan; None where its tool is not there, or does not take the network.
Method = Callable[[Task, float], Found | None]


@dataclass(frozen=True)
class AdaQuant:
    """Damage of a layer at a precision while all others are at 8 bits, over the damage of all at 8 (AdaQuant, 2006.10518, section 4).

    The paper takes the rise of the loss; KL to the unquantized network is taken here, as it is for the others. A forward pass a cell.
    """

    def estimate(self, context: Context) -> Estimate:
        """Score every cell; see `Estimator.estimate`."""
        layers = [decision.layers[0] for decision in context.decisions]
        parameters = [next(iter(context.parameters(decision))) for decision in context.decisions]
        background = dict(
            zip(parameters, (context.quantized(layer, mps.Precision("8")) for layer in layers), strict=True)
        )
        with torch.no_grad():
            references = [predictions(context.model, call(context.model, batch), batch)[0] for batch in context.batches]
            context.passes.add(1, forward=1)
            start = self._damage(context, references, background)
            damage = np.full((len(layers), len(context.precisions)), start)
            for u, p in context.progress(list(context.cells()), damage.size, "8-bit reference"):
                if context.precisions[p] != mps.Precision("8"):
                    changed = {**background, parameters[u]: context.quantized(layers[u], context.precisions[p])}
                    damage[u, p] = self._damage(context, references, changed)
        return Estimate(damage - start)

    def _damage(self, context: Context, references: Sequence[Tensor], values: Mapping[nn.Parameter, Tensor]) -> float:
        context.passes.add(1, forward=1)
        mean = Mean()
        with replaced(values):
            for batch, reference in zip(context.batches, references, strict=True):
                logits, _, index = predictions(context.model, call(context.model, batch), batch)
                mean.add(kl_divergence(reference, logits), index, samples(batch))
        return mean.value


def uniform(task: Task, limit: float) -> Found:
    """The widest precision that fits, everywhere."""
    widest = max(p for p, precision in enumerate(PRECISIONS) if precision.weight_bits <= limit)
    return Found(task.space.plan(np.full(len(task.space.layers), widest)), 0, 0)


def at_random(task: Task, limit: float) -> Found:
    """A random plan just within the budget."""
    number = 2 * (BUDGETS.index(limit) + len(BUDGETS) * task.seed) + 1
    while True:
        options, _ = random_plan(task.space.bits, number)
        if task.space.bits[np.arange(len(options)), options].sum() <= limit + TIE:
            return Found(task.space.plan(options), 0, 0)
        number += 2 * len(BUDGETS) * 1000  # the same budget, out of the way of the next seeds


def from_table(
    kind: Callable[..., Estimator],
    task: Task,
    limit: float,
    *,
    loss: str = "kl",
    distilled: bool = False,
    **settings: Any,
) -> Found:
    """The exact plan of a single table."""
    key = f"{kind.__name__} {loss} {distilled} {settings}"
    if key not in task.kept:
        start, extra = time.process_time(), 0.0
        batches: Sequence[Any] = task.batches
        if distilled:
            count = sum(len(inputs) for inputs, _ in batches)
            shape = batches[0][0].shape[1:]
            batches = mps.distill_data(
                task.model, shape, num_samples=count, iterations=DISTILLATION, seed=task.seed, progress=False
            )
            matched = any(isinstance(module, nn.BatchNorm2d) for module in task.model.modules())
            extra = 3.0 * DISTILLATION if matched else 0.0
        chosen: Any = loss
        table = mps.profile(
            task.model,
            batches,
            kind(**settings),
            PRECISIONS,
            loss=chosen,
            groups="none",
            resources=(),
            progress=False,
        )
        passes = table.origin["passes"]
        used = passes["forward"] + 2 * passes["backward"] + extra
        task.kept[key] = table, used, time.process_time() - start
    table, passes, seconds = task.kept[key]
    start = time.process_time()
    plan = mps.solve(table, mps.Budget(average_bits=limit)).plan
    assert plan is not None
    return Found(plan, passes, seconds + time.process_time() - start)


def drawn(kind: Callable[..., Estimator], task: Task, limit: float, **settings: Any) -> Found:
    """The same with an estimator that draws, under the task's seed."""
    return from_table(kind, task, limit, seed=task.seed, **settings)


def searched(effort: Literal["fast", "default", "thorough"], task: Task, limit: float) -> Found:
    """The plan of mpsearch itself, which splits the calibration set as it needs."""
    start = time.process_time()
    budget = mps.Budget(average_bits=limit)
    found = mps.search(
        task.model, task.batches, budget, PRECISIONS, effort=effort, groups="none", seed=task.seed, progress=False
    )
    return Found(found.plan, found.passes, time.process_time() - start)


def from_peer(name: str, variant: str, task: Task, limit: float) -> Found | None:
    """The plan of another tool, run in its own environment once for all budgets."""
    python = cache() / "peers" / name / "bin" / "python"
    if not python.exists() or task.name not in TAKES.get(f"{name} {variant}", MODELS):
        return None
    key = f"{name} {variant}"
    if key not in task.kept:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                python,
                PEERS / name / "run.py",
                variant,
                task.name,
                task.seed,
                SAMPLES[task.name],
                folder,
                *BUDGETS,
            ]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"{task.name} {name} {variant}: {done.stderr.strip()[-2000:]}", file=sys.stderr)
            task.kept[key] = {
                budget: mps.Plan.load(path) for budget in BUDGETS if (path := Path(folder) / f"{budget}.json").exists()
            }
    plan = task.kept[key].get(limit)
    return plan and Found(plan, plan.origin["passes"], plan.origin["cpu_s"])


METHODS: dict[str, Method] = {
    "uniform": uniform,
    "random": at_random,
    "KL": partial(from_table, KLDivergence),
    "ZeroQ": partial(from_table, KLDivergence, distilled=True),
    "AdaQuant": partial(from_table, AdaQuant),
    "HAWQ": partial(drawn, HessianTopEigenvalue, loss="cross-entropy"),
    "HAWQ-V2": partial(drawn, HessianTrace, loss="cross-entropy"),
    "Fisher projection": partial(drawn, FisherProjection),
    "output gradient": partial(drawn, OutputGradient),
    "weight error": partial(from_table, RelativeWeightError),
    "ModelOpt gradient": partial(from_peer, "modelopt", "gradient"),
    "ModelOpt kl_div": partial(from_peer, "modelopt", "kl_div"),
    "MCT": partial(from_peer, "mct", "default"),
    "MCT Hessian": partial(from_peer, "mct", "hessian"),
    "AIMET": partial(from_peer, "aimet", "amp"),
    "AutoRound": partial(from_peer, "autoround", "auto_scheme"),
    "mpsearch fast": partial(searched, "fast"),
    "mpsearch default": partial(searched, "default"),
    "mpsearch thorough": partial(searched, "thorough"),
}
#: Networks that a tool takes: language models alone, or all on which it ends within ten minutes.
TAKES = {"autoround auto_scheme": ("decoder",), "mct hessian": ("resnet20", "vit", "mobilenet")}
PEER_TOOLS = ("ModelOpt", "MCT", "AIMET", "AutoRound")


class Reference:
    """The best plan known for each budget, by its damage on a selection split, which is no part of the held-out data.

    All plans measured there are kept in `benchmarks/cache/`, so that every run goes on from the last one.
    """

    def __init__(self, name: str, trained: Trained) -> None:
        self._model = trained.model
        self._batches = trained.pool.first(SELECTION).batches(SIZES[name][1])
        self._judge = Judge(f"{name}_selection", trained.model, self._batches)
        column = {str(precision): p for p, precision in enumerate(PRECISIONS)}
        self._found: list[tuple[Options, float, float]] = []  # with average bits and KL
        for text in list(self._judge.known):
            self.measure(np.array([column[part] for part in text.split()]))

    def measure(self, options: Options) -> None:
        """Measure a plan, whoever made it."""
        self._found.append((options, self._judge.average_bits(options), self._judge.kl(options)[0]))

    def best(self, limit: float) -> Options:
        """The plan of least damage among all that were measured and fit."""
        return min((found for found in self._found if found[1] <= limit + TIE), key=lambda found: found[2])[0]

    def searched(self, limit: float) -> int:
        """Plans measured that are just within a budget."""
        return len({tuple(options) for options, bits, _ in self._found if limit - NEAR <= bits <= limit + TIE})

    def search(self, limit: float, least: int) -> None:
        """Measure plans until `least` are known just within a budget.

        A third are exact plans of noisy tables; the others change one or two layers of the best plan so far, the most
        promising by a noisy table first.
        """
        known = self.searched(limit)
        if known < least:
            tables = self._tables()
        generator = np.random.default_rng(known)
        for number in range(known, least):
            table = tables[number % len(tables)]
            noise = np.exp(NOISE * generator.standard_normal(table.sensitivity.shape))
            noisy = replace(table, sensitivity=np.maximum(table.sensitivity, 0) * noise)
            if number < least // 3:
                plan = mps.solve(noisy, mps.Budget(average_bits=limit)).plan
                assert plan is not None
                self.measure(self._judge.options(plan))
            else:
                self.measure(self._changed(self.best(limit), noisy.sensitivity, limit))
        self._judge.save()

    def _tables(self) -> list[mps.CostTable]:
        estimators: list[Estimator] = [KLDivergence(), FisherProjection()]
        return mps.profile(
            self._model, self._batches, estimators, PRECISIONS, groups="none", resources=(), progress=False
        )

    def _changed(self, options: Options, table: NDArray[np.float64], limit: float) -> Options:
        """The plan not measured yet that differs in one or two layers, fits, and has the least damage by a table."""
        rows = np.arange(len(options))
        bits = self._judge.bits - self._judge.bits[rows, options][:, None]
        damage = table - table[rows, options][:, None]
        total = damage[:, :, None, None] + damage
        total[self._judge.average_bits(options) + bits[:, :, None, None] + bits > limit + TIE] = np.inf
        total[rows, :, rows, :] = np.inf  # a layer is changed once; to change one alone, the other stays as it is
        known = {tuple(found) for found, *_ in self._found}
        for place in np.argsort(total, axis=None):
            u, p, v, q = np.unravel_index(place, total.shape)
            found = options.copy()
            found[u], found[v] = p, q
            if tuple(found) not in known:
                return found
        raise ValueError(f"every plan two layers away from {options} is known")


class HeldOut(Judge):
    """Held-out damage of plans as rows of the CSV."""

    def __init__(self, name: str, trained: Trained) -> None:
        self._data = trained.held_out.batches(SIZES[name][1])
        super().__init__(name, trained.model, self._data)
        self._memory = MemoryBytes()(trained.model, self.layers, PRECISIONS)
        self._measured: dict[str, mps.Evaluation] = {}

    def samples(self, bits: str) -> NDArray[np.float64]:
        """(N,) KL of each held-out sample under a plan, as the CSV writes it."""
        options = [PRECISIONS.index(mps.Precision(b)) for b in bits.split()]
        values = {weight: row[p] for weight, row, p in zip(self._weights, self._cells, options, strict=True)}
        found = []
        with torch.no_grad(), replaced(values):
            for batch, (reference, _, index) in zip(self._data, self._references, strict=True):
                logits, _, _ = predictions(self._model, call(self._model, batch), batch)
                damage = kl_divergence(reference, logits).double().numpy()
                found.append(np.bincount(index.numpy(), damage) / np.bincount(index.numpy()))
        return np.concatenate(found)

    def row(self, limit: float, plan: mps.Plan) -> dict[str, Any]:
        """Size and held-out damage of a plan."""
        options = self.options(plan)
        text = " ".join(str(PRECISIONS[p].weight) for p in options)
        if text not in self._measured:
            self._measured[text] = mps.evaluate(self._model, self._data, plan, progress=False)
        measured, average_bits = self._measured[text], self.average_bits(options)
        return {
            "average_bits_limit": limit,
            "average_bits": average_bits,
            "memory_bytes": self._memory.usage[np.arange(len(options)), options].sum() + self._memory.fixed,
            "over_budget": average_bits > limit + TIE,
            "kl": measured.kl,
            "kl_se": measured.kl_se,
            "loss": measured.loss,
            "accuracy": measured.accuracy,
            "bits": text,
            "model_fingerprint": self.fingerprint,
        }


def measured(task: Task, method: str, judge: HeldOut) -> list[dict[str, Any]]:
    """A row for each budget that the method has a plan for."""
    try:
        found = [(limit, METHODS[method](task, limit)) for limit in BUDGETS]
    except mps.MpsearchError as error:
        print(f"{task.name} {method} seed {task.seed}: left out: {error}", file=sys.stderr)
        return []
    head = {"model": task.name, "seed": task.seed, "method": method}
    rows = [
        {**head, **judge.row(limit, one.plan), "passes": one.passes, "cpu_s": one.cpu_s} for limit, one in found if one
    ]
    done = "no plan"
    if rows:
        damages = " ".join(f"{row['kl']:.4g}" for row in rows)
        done = f"{rows[0]['passes']:.0f} passes, {rows[0]['cpu_s']:.1f} CPU s, KL {damages}"
    print(f"{task.name} {method} seed {task.seed}: {done}", flush=True)
    return rows


def read(path: Path) -> pd.DataFrame:
    """Rows of the CSV; none where it does not exist yet."""
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*KEYS, "model_fingerprint"])


def merge(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows into the CSV in the place of older ones, and bring the comparisons up to date.

    Rows of the same network with other weights are dropped: its damages are no longer comparable.
    """
    if not rows:
        return
    with lock():
        found = pd.DataFrame(rows)
        current = dict(zip(found["model"], found["model_fingerprint"], strict=True))
        kept = read(path)
        kept = kept[kept["model"].map(current).fillna(kept["model_fingerprint"]) == kept["model_fingerprint"]]
        both = pd.concat([kept, found]) if len(kept) else found
        both = both.drop_duplicates(KEYS, keep="last").sort_values(KEYS)
        for method in ("reference", "uniform"):
            damage = both[both["method"] == method].drop_duplicates(CASE).set_index(CASE)["kl"]
            both[f"kl_over_{method}"] = (
                both["kl"].to_numpy() / damage.reindex(pd.MultiIndex.from_frame(both[CASE])).to_numpy()
            )
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, both.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def mean_ratio(rows: pd.DataFrame, column: str = "kl_over_reference") -> float:
    """Geometric mean of a column."""
    return float(np.exp(np.log(rows[column]).mean()))


def picture(path: Path, rows: pd.DataFrame, name: str) -> None:
    """Quality of the plans of one network against passes, a point a method."""
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_yscale("log")
    rows = rows[(rows["model"] == name) & (rows["method"] != "reference")]
    points = []
    for method, mine in rows.groupby("method"):
        spread = [mean_ratio(part) for _, part in mine.groupby("seed")]
        points.append((mean_ratio(mine), mine["passes"].mean(), str(method), spread))
    for ratio, passes, method, spread in sorted(points):
        color, marker = family(method)
        axes.plot([passes, passes], [min(spread), max(spread)], color=color, linewidth=1)
        axes.plot([passes], [ratio], marker, color=color, markersize=6)
        if method == "uniform":
            axes.axhline(ratio, color="black", linewidth=1, linestyle="--")
    axes.axhline(1, color="black", linewidth=1)
    for (ratio, passes, method, _), height in zip(sorted(points), np.linspace(0.02, 0.98, len(points)), strict=True):
        color, _ = family(method)
        axes.annotate(
            f"{method}  {ratio:.3g}",
            (passes, ratio),
            xytext=(1.04, height),
            textcoords="axes fraction",
            color={ORANGE: BROWN}.get(color, color),
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.5, "relpos": (0, 0.5)},
        )
    axes.set_xlabel("passes over the calibration set, a backward as 2")
    axes.set_ylabel(
        "held-out KL of the plan / of the reference plan,\ngeometric mean over budgets of 2.5, 3, 4, 5 bits"
    )
    axes.set_title(
        f"{name}: bars from the best to the worst calibration set; dashed: uniform precision", loc="left", fontsize=10
    )
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, which="major", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save(figure, path)


def family(method: str) -> tuple[str, str]:
    """Color and marker: mpsearch, other tools, uniform and random, single tables."""
    if method.startswith("mpsearch"):
        return BLUE, "s"
    if method.startswith(PEER_TOOLS):
        return ORANGE, "D"
    return ("black", "x") if method in ("uniform", "random") else (GREY, "o")


def summary(rows: pd.DataFrame) -> str:
    """A line for each network and method, best first, means over seeds and budgets."""
    lines = []
    for (name, method), mine in rows.groupby(["model", "method"]):
        ratios = [mean_ratio(mine), mean_ratio(mine, "kl_over_uniform")]
        numbers = [*ratios, *(float(mine[key].mean()) for key in ("passes", "cpu_s", "accuracy"))]
        counts = [str(int(mine["over_budget"].sum())), str(len(mine))]
        lines.append((str(name), ratios[0], [str(name), str(method), *(f"{v:.3g}" for v in numbers), *counts]))
    header = ["network", "method", "KL/reference", "KL/uniform", "passes", "CPU seconds", "accuracy"]
    return printing.table([*header, "over budget", "plans"], [cells for *_, cells in sorted(lines)], width=None)


def markdown(rows: pd.DataFrame) -> str:
    """A line a method, best first: geometric means for each network, and over networks; passes; calibration sets."""
    rows = rows[rows["method"] != "reference"]
    lines = []
    for method, mine in rows.groupby("method"):
        ratios = {name: mean_ratio(part) for name, part in mine.groupby("model")}
        over_all = float(np.exp(np.mean(np.log(list(ratios.values())))))
        least, most = (round(bound(mine["passes"])) for bound in (min, max))
        cells = [
            str(method),
            *(f"{ratios[name]:.2f}" if name in ratios else "" for name in MODELS),
            f"{over_all:.2f}" if len(ratios) == len(MODELS) else "",
            str(least) if least == most else f"{least} to {most}",
            str(mine.groupby("model")["seed"].nunique().min()),
        ]
        lines.append((over_all, "| " + " | ".join(cells) + " |"))
    header = ["method", *MODELS, "all", "passes", "calibration sets"]
    return "\n".join(
        ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|", *(line for _, line in sorted(lines))]
    )


def beaten(rows: pd.DataFrame, judges: Mapping[str, "HeldOut"], own: str = "mpsearch default") -> list[str]:
    """Where another tool's plans do less damage than mpsearch's, one line each, with the standard error of the difference.

    Means over the calibration sets that both have. The difference is taken sample by sample on the held-out data, so what plans
    have in common cancels; calibration sets differ, too: both spreads make up the error.
    """
    lines = []
    for (name, limit), here in rows[rows["model"].isin(judges)].groupby(CASE):
        plans = dict(zip(zip(here["method"], here["seed"], strict=True), here["bits"], strict=True))
        for method in sorted({method for method, _ in plans if str(method).startswith(PEER_TOOLS)}):
            seeds = sorted(seed for tool, seed in plans if tool == method and (own, seed) in plans)
            if not seeds:
                continue
            pairs = [[judges[str(name)].samples(plans[which, seed]) for which in (own, method)] for seed in seeds]
            worse = np.array([mine - other for mine, other in pairs])  # (seeds, samples)
            spread = worse.mean(1).std(ddof=1) / len(seeds) ** 0.5 if len(seeds) > 1 else 0.0
            se = float(np.hypot(worse.mean(0).std(ddof=1) / worse.shape[1] ** 0.5, spread))
            if worse.mean() > 0:
                mine, other = np.mean(pairs, axis=(0, 2))
                lines.append(
                    f"{name} at {limit:g} bits: {method} {other:.4g}, {own} {mine:.4g}, difference {worse.mean():.2g} ± {se:.2g}"
                    f" ({worse.mean() / se:.1f} standard errors, {len(seeds)} calibration sets)"
                )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="calibration sets")
    parser.add_argument("--missing", action="store_true", help="leave out what the CSV holds already")
    parser.add_argument(
        "--reference", type=int, default=500, metavar="N", help="least plans of the reference search a budget"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "plans.csv", metavar="FILE.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)  # comparable times, and the same weights on every machine
    judges: dict[str, HeldOut] = {}
    for name in options.models:
        trained = MODELS[name]()
        judge, reference = HeldOut(name, trained), Reference(name, trained)
        judges[name] = judge
        old = read(options.out)
        old = old[(old["model"] == name) & (old["model_fingerprint"] == judge.fingerprint)]
        present = set(zip(old["method"], old["seed"], strict=True)) if options.missing else set()
        count = SAMPLES[name]
        for seed in options.seeds:
            calibration = trained.pool.sample(count, seed).batches(-(-count // 2))
            task = Task(name, trained.model, calibration, seed, judge)
            for method in options.methods:
                if (method, seed) not in present:
                    rows = measured(task, method, judge)
                    merge(options.out, rows)
                    for row in rows:
                        reference.measure(np.array([PRECISIONS.index(mps.Precision(b)) for b in row["bits"].split()]))
        rows = []
        for limit in BUDGETS:
            start = time.process_time()
            reference.search(limit, options.reference)
            rows.append(
                {
                    "model": name,
                    "seed": 0,
                    "method": "reference",
                    **judge.row(limit, judge.plan(reference.best(limit))),
                    "passes": reference.searched(limit),
                    "cpu_s": time.process_time() - start,
                }
            )
            print(
                f"{name} reference at {limit:g} bits: {rows[-1]['passes']} plans, KL {rows[-1]['kl']:.4g}", flush=True
            )
        merge(options.out, rows)
    found = read(options.out)
    for name in options.models:
        picture(options.out.with_name(f"{options.out.stem}_{name}.png"), found, name)
    write_atomically(options.out.with_name(f"{options.out.stem}_table.md"), markdown(found) + "\n")
    print(summary(found[found["model"].isin(options.models)]))
    print("\n".join(["another tool does less damage:", *(beaten(found, judges) or ["nowhere"])]))
    print(f"wrote {options.out}, a table and a plot for each network")
    return 0


if __name__ == "__main__":
    sys.exit(main())
