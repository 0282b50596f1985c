"""What sensitivity signals are worth: agreement with measured plans, and measured damage of the plans that they lead to.

    python benchmarks/sensitivity.py [--models resnet20 vit] [--estimators kl-divergence] [--seeds 0 1 2] [--missing]

For each network, random plans are measured on held-out data (KL to the unquantized network): half of all sizes, half at
the average bits of one of the budgets. Every estimator that has defaults, and a few with other settings, fills a table from a
small calibration set, a different one a seed; every layer is a decision of its own. A table is judged by its ranks of the random
plans and by the measured damage of its best plan at each budget; once as it is, and once after `mps.calibrate` with plans
measured on the calibration set.
Writes benchmarks/results/sensitivity.csv, .png and sensitivity_table.md; rows of other networks, estimators and seeds are kept.
"""

import argparse
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from models import MODELS, Trained, cache
from numpy.typing import NDArray
from torch import Tensor, nn

import mpsearch as mps
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.core.problem import usage_of
from mpsearch.display.figures import BLUE, GREEN, GREY, ORANGE, RED, save
from mpsearch.files.writing import write_atomically
from mpsearch.metrics.ranking import kendall, spearman
from mpsearch.metrics.statistics import Mean, kl_divergence
from mpsearch.models.modules.weights import weight_of
from mpsearch.models.running import Batch, call, data_fingerprint, fingerprint, predictions, samples, state_fingerprint
from mpsearch.models.streaming.offloading import replaced
from mpsearch.quantizers.fake_quantization import quantized_weight
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import ESTIMATORS, Estimator, KLDivergence
from mpsearch.solvers import Annealing

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = mps.precisions("w2 w3 w4 w6 w8")
BUDGETS = (2.5, 3.0, 4.0, 5.0)  # average weight bits
BAND = 0.05  # random plans of equal size are this close to their budget, in average bits
MEASURED = 12  # plans measured on the calibration set, for `mps.calibrate`
CALIBRATED = ("kl", "spearman", "spearman_at_limit")  # columns that there are after it, too
DISTILLATION = 100  # iterations of distilled data; the default of 500 takes minutes on a ResNet-20
#: Network -> calibration samples, taken in two batches, and held-out samples a batch.
SIZES = {"resnet20": (128, 94), "vit": (128, 128), "decoder": (32, 32), "mobilenet": (128, 128)}

Options = NDArray[np.int64]  # (L,) column of `PRECISIONS` for each layer
Row = dict[str, Any]


@dataclass(frozen=True)
class Signal:
    """What fills a table: an estimator with settings, a loss, and real or distilled data."""

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    loss: Literal["kl", "cross-entropy"] = "kl"
    distilled: bool = False

    def estimator(self, seed: int) -> Estimator:
        """The estimator; where it draws, with this seed.

        Raises:
            mps.EstimatorError: where it has settings without a default.
        """
        fields = dataclasses.fields(ESTIMATORS[self.kind])
        bare = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
        missing = [name for name in bare if name not in self.settings]
        if missing:
            raise mps.EstimatorError(f"no default for {', '.join(missing)}")
        seeded = {"seed": seed} if "seed" in {f.name for f in fields} else {}
        made: Estimator = ESTIMATORS[self.kind](**self.settings, **seeded)
        return made


#: Name of a row -> signal: every estimator as it comes, but for two that would take minutes a table, and a few with other settings.
SIGNALS: dict[str, Signal] = {
    **{name: Signal(name) for name in ESTIMATORS if name not in ("hessian-top-eigenvalue", "hawq-proxy")},
    "hessian-top-eigenvalue, tolerance 0.05": Signal("hessian-top-eigenvalue", {"tolerance": 0.05}),
    "hawq-proxy, 5 iterations": Signal("hawq-proxy", {"num_iterations": 5}),
    "fisher-projection, 8 draws": Signal("fisher-projection", {"draws": 8}),
    "fisher, 4 draws": Signal("fisher", {"draws": 4}),
    "hessian-trace, cross-entropy": Signal("hessian-trace", loss="cross-entropy"),
    "kl-divergence, distilled data": Signal("kl-divergence", distilled=True),
    "fisher-projection, distilled data": Signal("fisher-projection", distilled=True),
}


class Judge:
    """Held-out damage of plans, to the numbers of `mps.evaluate`: every cell is quantized once, every plan measured once.

    What was measured is kept in `benchmarks/cache/`, under a hash of the network, the data and the quantized weights.
    """

    def __init__(self, name: str, model: nn.Module, held_out: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._model, self._held_out = model, held_out
        self.layers = mps.layers(model, held_out[0], groups="none")  # random plans tie no layers, so neither do tables
        self.fingerprint = state_fingerprint(model)
        numel = np.array([layer.numel for layer in self.layers])
        #: (L, P) what each cell adds to the average bits
        self.bits = np.outer(numel / numel.sum(), [precision.weight_bits for precision in PRECISIONS])
        modules = [model.get_submodule(layer.name) for layer in self.layers]
        self._weights = [weight_of(module) for module in modules]
        self._cells = [
            [quantized_weight(module, layer.name, precision, RoundToNearest()) for precision in PRECISIONS]
            for module, layer in zip(modules, self.layers, strict=True)
        ]
        with torch.no_grad():
            self._references = [predictions(model, call(model, batch), batch) for batch in held_out]
        cells = fingerprint(cell for row in self._cells for cell in row)
        key = hashlib.blake2b(f"{self.fingerprint} {data_fingerprint(held_out)} {cells}".encode(), digest_size=8)
        self._path = cache() / f"plans_{name}_{key.hexdigest()}.json"
        self.known = self._read()

    def _read(self) -> dict[str, tuple[float, float]]:
        """Plan as text -> KL and its standard error."""
        found = json.loads(self._path.read_text()) if self._path.exists() else {}
        return {plan: (kl, se) for plan, (kl, se) in found.items()}

    def kl(self, options: Options) -> tuple[float, float]:
        """Held-out KL of a plan in nats, and its standard error."""
        text = " ".join(str(PRECISIONS[p]) for p in options)
        if text not in self.known:
            mean = Mean()
            values = {weight: row[p] for weight, row, p in zip(self._weights, self._cells, options, strict=True)}
            with torch.no_grad(), replaced(values):
                for batch, (reference, _, index) in zip(self._held_out, self._references, strict=True):
                    logits, _, _ = predictions(self._model, call(self._model, batch), batch)
                    mean.add(kl_divergence(reference, logits), index, samples(batch))
            self.known[text] = (mean.value, mean.se)
        return self.known[text]

    def average_bits(self, options: Options) -> float:
        """Average weight bits of a plan."""
        return float(self.bits[np.arange(len(options)), options].sum())

    def plan(self, options: Options) -> mps.Plan:
        """The plan by names."""
        return mps.Plan({layer.name: PRECISIONS[p] for layer, p in zip(self.layers, options, strict=True)})

    def options(self, plan: mps.Plan) -> Options:
        """(L,) columns of a plan."""
        return np.array([PRECISIONS.index(plan[layer.name]) for layer in self.layers])

    def save(self) -> None:
        """Keep what was measured, together with what another run has kept meanwhile."""
        with lock():
            self.known = {**self._read(), **self.known}
            write_atomically(self._path, json.dumps(self.known))


@contextmanager
def lock() -> Iterator[None]:
    """One run at a time: several may fill one CSV."""
    with (cache() / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def random_plan(bits: NDArray[np.float64], number: int) -> tuple[Options, float | None]:
    """Plan `number` of an endless list, and the budget that it is within `BAND` of; None for those of any size.

    Each plan has its own shares of the precisions, drawn evenly, so that all sizes occur. Plans at a budget are then changed
    in one layer at a time, wherever that brings them closer.

    Args:
        bits: (L, P) what each cell adds to the average bits.
        number: even: any size; odd: the budgets in turn.

    Raises:
        ValueError: where the layers are too few or too unequal to come that close to the budget.
    """
    generator = np.random.default_rng(number)
    rows = np.arange(len(bits))
    target = BUDGETS[number // 2 % len(BUDGETS)] if number % 2 else None
    for _ in range(100):
        shares = generator.dirichlet(np.ones(bits.shape[1]))
        options = generator.choice(bits.shape[1], len(bits), p=shares)
        if target is None:
            return options, None
        for row, column in generator.integers(0, bits.shape, (100 * len(bits), 2)):
            distance = bits[rows, options].sum() - target
            if abs(distance) <= BAND:
                return options, target
            if abs(distance + bits[row, column] - bits[row, options[row]]) < abs(distance):
                options[row] = column
    raise ValueError(f"no plan of {len(bits)} layers within {BAND} of {target} average bits found in 100 trials")


class Truth:
    """The random plans with their measured damage, and what is known of each budget without any signal."""

    def __init__(self, judge: Judge, plans: int) -> None:
        drawn = [random_plan(judge.bits, number) for number in range(plans)]
        self.judge = judge
        self.options = [options for options, _ in drawn]
        self.damage = np.array([judge.kl(options)[0] for options in self.options])
        limits = np.array([math.nan if limit is None else limit for _, limit in drawn])
        size = np.array([judge.average_bits(options) for options in self.options])
        everywhere = np.ones(plans, bool)
        self.at = {limit: limits == limit for limit in BUDGETS}
        self.baselines: dict[float, Row] = {}
        for limit in BUDGETS:
            name, uniform_kl = uniform_within(judge, limit)
            self.baselines[limit] = {
                "uniform": name,
                "uniform_kl": uniform_kl,
                "random_kl": geometric_mean(self.damage[self.at[limit]]),
                "size_spearman": self._agreement(-size, everywhere)[0],
                "size_spearman_at_limit": self._agreement(-size, self.at[limit])[0],
            }

    def judged(self, table: mps.CostTable) -> dict[float, Row]:
        """Budget -> agreement of a table with the random plans, and the measured damage of its best plan."""
        predicted = np.array([usage_of(table, options)["sensitivity"] for options in self.options])
        allowed = np.isfinite(predicted)
        solver = None if table.interactions is None else Annealing()  # the default, ILP below 25 layers, takes minutes
        found: dict[float, Row] = {}
        for limit in BUDGETS:
            solution = mps.solve(table, mps.Budget(average_bits=limit), solver)
            assert solution.plan is not None
            kl, kl_se = self.judge.kl(self.judge.options(solution.plan))
            found[limit] = {
                "average_bits": solution.usage["average_bits"],
                "status": str(solution.status),
                "predicted": solution.sensitivity,
                "kl": kl,
                "kl_se": kl_se,
            }
            for name, which in (("", allowed), ("_at_limit", allowed & self.at[limit])):
                found[limit][f"plans{name}"] = int(which.sum())
                found[limit][f"spearman{name}"], found[limit][f"kendall{name}"] = self._agreement(predicted, which)
        return found

    def _agreement(self, predicted: NDArray[np.float64], which: NDArray[np.bool_]) -> tuple[float, float]:
        return spearman(predicted[which], self.damage[which]), kendall(predicted[which], self.damage[which])


def uniform_within(judge: Judge, limit: float) -> tuple[str, float]:
    """The uniform precision with the least measured damage among those within the limit, and its KL."""
    plans = [np.full(len(judge.layers), p) for p in range(len(PRECISIONS))]
    fitting = [options for options in plans if judge.average_bits(options) <= limit + 1e-9]  # a sum of rounded shares
    kl, p = min((judge.kl(options)[0], int(options[0])) for options in fitting)
    return str(PRECISIONS[p]), kl


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a signal may see.

    Attributes:
        batches: data without anything held out.
        passes: forward and as many backward passes that making the data took.
        cpu_s: seconds that it took.
        measured: plans with their damage on these batches.
    """

    batches: Sequence[Batch]
    passes: int
    cpu_s: float
    measured: MeasuredPlans


def calibration(trained: Trained, judge: Judge, size: int, seed: int, distilled: bool) -> Calibration:
    """Two batches, `size` samples in all, drawn by the seed or distilled from the network."""
    batches: list[Batch] = [*trained.pool.sample(size, seed).batches(size // 2)]
    start, passes = time.process_time(), 0
    if distilled:
        shape = trained.pool.inputs.shape[1:]
        batches = [
            *mps.distill_data(
                trained.model,
                shape,
                num_samples=size,
                batch_size=size // 2,
                iterations=DISTILLATION,
                seed=seed,
                progress=False,
            )
        ]
        passes = DISTILLATION * any(isinstance(module, nn.BatchNorm2d) for module in trained.model.modules())
    cpu_s = time.process_time() - start
    numbers = range(1_000_000 + MEASURED * seed, 1_000_000 + MEASURED * (seed + 1))  # others than those of the truth
    plans = [judge.plan(random_plan(judge.bits, number)[0]) for number in numbers]
    return Calibration(batches, passes, cpu_s, mps.measure_plans(trained.model, batches, plans, progress=False))


def measure(truth: Truth, model: nn.Module, data: Calibration, signal: Signal, seed: int) -> list[Row]:
    """One row a budget."""
    start = time.process_time()
    table = mps.profile(
        model,
        data.batches,
        signal.estimator(seed),
        PRECISIONS,
        loss=signal.loss,
        layers=truth.judge.layers,
        resources=(),
        progress=False,
    )
    seconds = time.process_time() - start
    plain, after = truth.judged(table), {}
    try:
        after = truth.judged(mps.calibrate(table, data.measured, per_precision=True))
    except mps.TableError as error:  # pairs of layers, or damage that falls where the table rises
        print(f"{signal.kind}: not calibrated: {error}", file=sys.stderr)
    forward, backward = (table.origin["passes"][kind] + data.passes for kind in ("forward", "backward"))
    return [
        {
            "average_bits_limit": limit,
            "unit": table.unit,
            **plain[limit],
            **{f"calibrated_{key}": after.get(limit, {}).get(key, math.nan) for key in CALIBRATED},
            **truth.baselines[limit],
            "calibration_samples": sum(map(samples, data.batches)),
            "forward_passes": forward,
            "backward_passes": backward,
            "passes": forward + 2 * backward,
            "cpu_s": data.cpu_s + seconds,
            "peak_memory_bytes": table.origin["peak_memory_bytes"],
        }
        for limit in BUDGETS
    ]


def read(path: Path) -> pd.DataFrame:
    """The CSV; no rows where it does not exist yet."""
    columns = ["model", "estimator", "seed", "model_fingerprint", "average_bits_limit"]
    return pd.read_csv(path, dtype={"model_fingerprint": str}) if path.exists() else pd.DataFrame(columns=columns)


def merge(path: Path, rows: Sequence[Row]) -> None:
    """Put the rows of one network, estimator and seed into the CSV, and compare all damages with the least by any of them.

    Rows of the same network with other weights are dropped: its damages are no longer comparable.
    """
    new = pd.DataFrame(rows)
    with lock():
        old = read(path)
        replaced = (old["estimator"] == rows[0]["estimator"]) & (old["seed"] == rows[0]["seed"])
        stale = old["model_fingerprint"] != rows[0]["model_fingerprint"]
        old = old[(old["model"] != rows[0]["model"]) | ~(replaced | stale)]
        found = pd.concat([old, new]) if len(old) else new
        damages = found[["kl", "calibrated_kl", "uniform_kl"]].min(axis=1)
        found["best_kl"] = damages.groupby([found["model"], found["average_bits_limit"]]).transform("min")
        for name in ("kl", "calibrated_kl", "uniform_kl", "random_kl"):
            found[f"{name}_over_best"] = found[name] / found["best_kl"]
        found["kl_over_uniform"] = found["kl"] / found["uniform_kl"]
        found = found.sort_values(["model", "estimator", "seed", "average_bits_limit"])
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, found.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def geometric_mean(values: Any) -> float:
    """Of positive numbers."""
    return float(np.exp(np.mean(np.log(np.asarray(values, np.float64)))))


#: Family -> colour, marker and estimators; a new one goes to the first.
FAMILIES: dict[str, tuple[str, str, frozenset[str]]] = {
    "gradients": (RED, "^", frozenset()),
    "measured outputs": (
        BLUE,
        "o",
        frozenset(
            {
                "kl-divergence",
                "output-mse",
                "sqnr",
                "cosine-distance",
                "prediction-difference",
                "task-metric",
                "masked-kl",
            }
            | {"layer-output-error", "metric-decoupled", "linearity-coefficients", "path-shapley"}
        ),
    ),
    "curvature": (
        GREEN,
        "s",
        frozenset(
            {"fisher-projection", "fisher", "empirical-fisher", "channel-fisher", "gauss-newton-trace", "kfac-diagonal"}
            | {"hessian-augmented", "hessian-trace", "hessian-top-eigenvalue", "hawq-proxy", "hawq-v2-proxy"}
        ),
    ),
    "relevance, activations": (
        "#CC79A7",
        "D",
        frozenset({"lrp", "lrp-qvit", "mix-qvit", "activation-entropy", "orthogonality", "salience-groups"}),
    ),
    "weights alone": (
        ORANGE,
        "v",
        frozenset({"relative-weight-error", "kurtosis", "weight-entropy", "adapt-divergence", "qe"}),
    ),
}
#: Named in the picture though others are better for as few passes.
WELL_KNOWN = (
    "kl-divergence",
    "hessian-trace",
    "hessian-top-eigenvalue, tolerance 0.05",
    "fisher",
    "relative-weight-error",
    "lrp",
    "snip",
)


def family(name: str) -> str:
    """The family of a row."""
    kind = name.split(",")[0]
    return next((label for label, (_, _, members) in FAMILIES.items() if kind in members), next(iter(FAMILIES)))


def picture(path: Path, found: pd.DataFrame) -> None:
    """Quality of the plans against passes: a panel a network, and one for the mean of all."""
    names = list(dict.fromkeys(found["model"]))
    panels = [(name, found[found["model"] == name]) for name in names]
    panels += [(f"mean of {', '.join(names)}", everywhere(found))] if len(names) > 1 else []
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(8 * columns, 6.2 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, mine) in zip(np.ravel(figure.subplots(rows, columns, squeeze=False)), panels, strict=False):
        _panel(axes, mine)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_ylabel("held-out KL of the plan / least found by any", fontsize=9)
    marks = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=label)
        for label, (color, marker, _) in FAMILIES.items()
    ]
    marks += [
        Line2D([], [], color="black", label="best uniform precision that fits"),
        Line2D([], [], color=GREY, linestyle="--", label="random plan of that size"),
        Line2D([], [], color=GREY, linewidth=1, marker="|", label="from the best to the worst calibration seed"),
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=2 * columns, frameon=False, fontsize=9)
    save(figure, path)


def _panel(axes: Axes, found: pd.DataFrame) -> None:
    seeds = by_seed(found)
    points = pd.DataFrame({"ratio": quality(found), "low": seeds.min(axis=1), "high": seeds.max(axis=1)})
    points["passes"] = found.groupby("estimator")["passes"].mean()
    points = points.sort_values("ratio")
    best = {
        name
        for name, ratio, passes in zip(points.index, points["ratio"], points["passes"], strict=True)
        if not ((points["ratio"] < ratio) & (points["passes"] <= passes)).any()
        and not ((points["ratio"] == ratio) & (points["passes"] < passes)).any()
    }
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_yscale("log")
    for name, point in points.iterrows():
        color, marker, _ = FAMILIES[family(str(name))]
        axes.plot([point["passes"]] * 2, [point["low"], point["high"]], color=color, linewidth=1, alpha=0.6)
        axes.plot(
            [point["passes"]],
            [point["ratio"]],
            marker,
            color=color,
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=0.5,
        )
    axes.axhline(geometric_mean(found["uniform_kl_over_best"]), color="black", linewidth=1.2, zorder=0)
    axes.axhline(geometric_mean(found["random_kl_over_best"]), color=GREY, linewidth=1.2, linestyle="--", zorder=0)
    axes.set_xlabel("passes over the calibration set, a backward pass counts 2", fontsize=9)
    axes.grid(True, which="major", alpha=0.25)
    axes.margins(x=0.06)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _labels(axes, points[[name in best or name in WELL_KNOWN for name in points.index]], best)


def _labels(axes: Axes, points: pd.DataFrame, best: set[str]) -> None:
    """Names at the side, joined to their points; bold where nothing has better plans for as few passes."""
    low, high = np.log(axes.get_ylim())
    heights = _apart([(math.log(ratio) - low) / (high - low) for ratio in points["ratio"]], 0.045)
    for (name, point), height in zip(points.iterrows(), heights, strict=True):
        axes.annotate(
            f"{name}  {point['ratio']:.2f}",
            (point["passes"], point["ratio"]),
            xytext=(1.04, height),
            textcoords="axes fraction",
            fontsize=8.5,
            fontweight="bold" if name in best else "normal",
            va="center",
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "alpha": 0.7, "relpos": (0, 0.5)},
        )


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places between 0 and 1, moved until neighbours are `gap` apart, up and down by about as much."""
    up = list(itertools.accumulate(places, lambda before, place: max(place, before + gap)))
    down = list(itertools.accumulate(reversed(places), lambda before, place: min(place, before - gap)))[::-1]
    last = len(places) - 1
    return [min(max((a + b) / 2, i * gap), 1 - (last - i) * gap) for i, (a, b) in enumerate(zip(up, down, strict=True))]


def quality(found: pd.DataFrame, column: str = "kl_over_best") -> dict[str, float]:
    """Of each estimator: geometric mean of a ratio over networks, seeds and budgets; none for those without one."""
    means = found.dropna(subset=[column]).groupby("estimator")[column].agg(geometric_mean)
    return {str(name): float(ratio) for name, ratio in means.items()}


def by_seed(found: pd.DataFrame) -> pd.DataFrame:
    """A line an estimator, a column a seed."""
    return pd.DataFrame({seed: quality(mine) for seed, mine in found.groupby("seed")})


def everywhere(found: pd.DataFrame) -> pd.DataFrame:
    """Rows of the estimators and seeds that every network has."""
    counts = found.groupby(["estimator", "seed"])["model"].transform("nunique")
    return found[counts == found["model"].nunique()]


def markdown(found: pd.DataFrame) -> str:
    """A line a signal, best plans first, among them the best uniform precision and random plans; then what to choose."""
    header = ["signal", "family", "Spearman, all plans", "Spearman, equal size", "plan quality", "and by seed"]
    header += ["after calibration", "worst network", "passes", "CPU seconds"]
    found = everywhere(found)
    seeds = by_seed(found)
    ratios, mended = quality(found), quality(found, "calibrated_kl_over_best")
    numbers = {**ratios, **{f"{name} after": ratio for name, ratio in mended.items()}}
    lines = []
    for name, mine in found.groupby("estimator"):
        label = str(name)
        cells = [
            f"`{label}`",
            family(label),
            f"{mine['spearman'].mean():.2f}",
            f"{mine['spearman_at_limit'].mean():.2f}",
            f"{ratios[label]:.2f}",
            f"{seeds.loc[label].min():.2f} to {seeds.loc[label].max():.2f}",
            f"{mended[label]:.2f}" if label in mended else "",
            _worst(mine, "kl_over_best"),
            f"{mine['passes'].mean():.3g}",
            f"{mine['cpu_s'].mean():.2g}",
        ]
        lines.append((ratios[label], cells))
    for kind, label in (("uniform", "best uniform precision that fits"), ("random", "random plan of that size")):
        column = f"{kind}_kl_over_best"
        ratio = numbers[kind] = geometric_mean(found[column])
        size = [f"{found[f'size_spearman{at}'].mean():.2f}" if kind == "uniform" else "" for at in ("", "_at_limit")]
        lines.append((ratio, [f"*{label}*", "", *size, f"{ratio:.2f}", "", "", _worst(found, column), "0", "0"]))
    rows = [header, ["---"] * len(header), *(cells for _, cells in sorted(lines))]
    lists = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    seen = found["seed"].nunique(), int(found["plans"].max()), ", ".join(found["model"].unique())
    return f"{LEGEND.format(*seen, MEASURED)}\n{lists}\n## How to choose\n\n{advice(numbers)}"


def _worst(found: pd.DataFrame, column: str) -> str:
    ratios = found.groupby("model")[column].agg(geometric_mean)
    return f"{ratios.idxmax()} {ratios.max():.2f}"


#: Above the table: seeds, random plans, networks, plans measured for `calibrate`.
LEGEND = """\
Plan quality: held-out KL of the signal's exact plan over the least KL found by any plan of this table, geometric mean over 2.5, 3, 4 and 5
average bits, {0} calibration sets and the networks {2}; 1 is best. After calibration: the same for the table that
`mps.calibrate(..., per_precision=True)` makes with {3} plans measured on the calibration set. Spearman: of predicted and measured KL of
{1} random plans, and within plans of equal size; in the row of uniform precision, of the average bits alone. Passes over the
calibration set, a backward pass counts 2. Seconds of one CPU thread.
"""


#: What to choose, with plan qualities of the table.
ADVICE = (
    "A first table: `fisher-projection` ({fisher-projection:.2f}), one forward and two backward passes however many layers and "
    "precisions. More draws ({fisher-projection, 8 draws:.2f}) and pairs of layers (`hessian-augmented`, "
    "{hessian-augmented:.2f}) change little on average.",
    "Time for a run a layer and precision, or no gradients: `kl-divergence` ({kl-divergence:.2f}) or `cosine-distance` "
    "({cosine-distance:.2f}).",
    "No data: `mps.distill_data` (`kl-divergence` {kl-divergence, distilled data:.2f}, `fisher-projection` "
    "{fisher-projection, distilled data:.2f}): plans as good as from data, but no forecast of their damage.",
    "No data and no passes: `qe` ({qe:.2f}), `relative-weight-error` ({relative-weight-error:.2f}); the best uniform precision has "
    "{uniform:.2f}.",
    "Of the cheap scores `snip` ({snip:.2f}) is as good as any; `lrp` ({lrp:.2f}) beats the weights alone, not "
    "`fisher` ({fisher:.2f}).",
    "Rather `gauss-newton-trace` ({gauss-newton-trace:.2f}, 5 passes) than `hessian-trace` ({hessian-trace:.2f}, 131 passes): no sign "
    "to get wrong. The task loss instead of the KL ({hessian-trace, cross-entropy:.2f}) makes no difference.",
    "Worse than uniform: `taylor` ({taylor:.2f}), `synflow` ({synflow:.2f}), `lrp-qvit` ({lrp-qvit:.2f}), `activation-entropy` "
    "({activation-entropy:.2f}). `mps.calibrate` with a scale for each precision mends the last two ({lrp-qvit after:.2f}, "
    "{activation-entropy after:.2f}), whose fall with the bits is off; a table that is right without it gets no better.",
    "High rank correlation is no promise: `path-shapley` ranks random plans best and `task-metric` among the best, but cells that they "
    "falsely take for free fill their own plans ({path-shapley:.2f}, {task-metric:.2f}).",
    "Neighbours in the table are equal within the spread of calibration sets. Measure the plan before you ship it.",
)


def advice(numbers: Mapping[str, float]) -> str:
    """A line for each piece of `ADVICE` whose signals have all run."""
    lines = []
    for line in ADVICE:
        with suppress(KeyError):
            lines.append(f"- {line.format_map(numbers)}\n")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet20", "vit", "decoder"])
    parser.add_argument("--estimators", nargs="+", choices=list(SIGNALS), default=list(SIGNALS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration sets")
    parser.add_argument("--plans", type=int, default=240, metavar="N", help="random plans")
    parser.add_argument("--missing", action="store_true", help="leave out what the CSV holds already")
    parser.add_argument("--out", type=Path, default=RESULTS / "sensitivity.csv", metavar="FILE.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)  # comparable times, and the same weights on every machine
    for name in options.models:
        trained = MODELS[name]()
        size, batch = SIZES[name]
        judge = Judge(name, trained.model, trained.held_out.batches(batch))
        start, before = time.perf_counter(), len(judge.known)
        truth = Truth(judge, options.plans)
        judge.save()
        print(f"{name}: {len(judge.known) - before} plans measured in {time.perf_counter() - start:.0f} s", flush=True)
        warm = trained.pool.first(2).batches(1)  # what torch does once is in no estimator's time
        mps.profile(trained.model, warm, KLDivergence(), PRECISIONS, resources=(), progress=False)
        old = read(options.out)
        mine = old[old["model_fingerprint"] == judge.fingerprint] if options.missing else old.iloc[:0]
        present = set(zip(mine["model"], mine["estimator"], mine["seed"], strict=True))
        data = functools.cache(functools.partial(calibration, trained, judge, size))
        for seed, kind in itertools.product(options.seeds, options.estimators):
            if (name, kind, seed) in present:
                continue
            signal, start = SIGNALS[kind], time.perf_counter()
            try:
                rows = measure(truth, trained.model, data(seed, signal.distilled), signal, seed)
            except mps.MpsearchError as error:
                print(f"{name}, {kind}: left out: {error}", file=sys.stderr)
                continue
            head = {"model": name, "estimator": kind, "seed": seed, "model_fingerprint": judge.fingerprint}
            judge.save()
            merge(options.out, [{**head, **row} for row in rows])
            damages = " ".join(f"{row['kl']:.4g}" for row in rows)
            print(
                f"{name}, {kind}, seed {seed}: {rows[0]['passes']:.0f} passes in {rows[0]['cpu_s']:.1f} CPU seconds, "
                f"all {time.perf_counter() - start:.1f} s, KL {damages}",
                flush=True,
            )
    found = read(options.out)
    if not len(found):
        print("nothing to draw: no estimator ran", file=sys.stderr)
        return 1
    picture(options.out.with_suffix(".png"), found)
    text = markdown(found)
    write_atomically(options.out.with_name(f"{options.out.stem}_table.md"), text)
    print(text)
    print(f"wrote {options.out}, .png and _table.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
