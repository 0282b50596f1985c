"""What sensitivity estimators are worth: agreement with measured plans, and measured damage of the plans that they lead to.

    python benchmarks/sensitivity.py [--models resnet20 vit] [--estimators kl-divergence] [--missing]

For each network, random plans are measured on held-out data (KL to the unquantized network): half of all sizes, half at
the average bits of one of the budgets. Every estimator that has defaults fills a table from a small calibration set, a different one
a seed; the table is judged by its ranks of the random plans and by the measured damage of its best plan at each budget.
Writes benchmarks/results/sensitivity.csv and .png; rows of other networks, estimators and seeds are kept.
"""

import argparse
import csv
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from models import MODELS, Examples, cache
from numpy.typing import NDArray
from torch import Tensor, nn

import mpsearch as mps
from mpsearch import report
from mpsearch.files import write_atomically
from mpsearch.measure import Mean, kl_divergence
from mpsearch.model import call, data_fingerprint, fingerprint, predictions, samples, state_fingerprint
from mpsearch.modules import weight_of
from mpsearch.perturb import quantized_weight, weights
from mpsearch.plot import BLUE, GREY, ORANGE, save
from mpsearch.problem import usage_of
from mpsearch.quantize import RoundToNearest
from mpsearch.ranking import kendall, spearman
from mpsearch.sensitivity import ESTIMATORS, Estimator

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = mps.precisions("w2 w3 w4 w6 w8")
BUDGETS = (2.5, 3.0, 4.0, 5.0)  # average weight bits
BAND = 0.05  # random plans of equal size are this close to their budget, in average bits
#: Network -> calibration samples, taken in two batches, and held-out samples a batch.
SIZES = {"resnet20": (128, 94), "vit": (128, 128), "decoder": (32, 32), "mobilenet": (128, 128)}

WORDS = (
    "model",
    "estimator",
    "model_fingerprint",
    "unit",
    "status",
    "uniform",
)  # columns of the CSV that hold no number

Options = NDArray[np.int64]  # (L,) column of `PRECISIONS` for each layer
Row = dict[str, Any]


class Judge:
    """Held-out damage of plans, to the numbers of `mps.evaluate`: every cell is quantized once, every plan measured once.

    What was measured is kept in `benchmarks/cache/`, under a hash of the network, the data and the quantized weights.
    """

    def __init__(self, name: str, model: nn.Module, held_out: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._model, self._held_out = model, held_out
        self.layers = mps.layers(model, held_out[0])
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
            with torch.no_grad(), weights(values):
                for batch, (reference, _, index) in zip(self._held_out, self._references, strict=True):
                    logits, _, _ = predictions(self._model, call(self._model, batch), batch)
                    mean.add(kl_divergence(reference, logits), index, samples(batch))
            self.known[text] = (mean.value, mean.se)
        return self.known[text]

    def average_bits(self, options: Options) -> float:
        """Average weight bits of a plan."""
        return float(self.bits[np.arange(len(options)), options].sum())

    def best(self, limit: float) -> float:
        """Least KL of all plans measured so far, by whomever, within a limit on the average bits."""
        column = {str(precision): p for p, precision in enumerate(PRECISIONS)}
        plans = ((np.array([column[name] for name in text.split()]), kl) for text, (kl, _) in self.known.items())
        return min(kl for options, kl in plans if self.average_bits(options) <= limit + 1e-9)

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


def settings(kind: type, seed: int) -> Estimator:
    """An estimator with its defaults and, where it draws, a seed.

    Raises:
        mps.EstimatorError: where it has settings without a default.
    """
    fields = dataclasses.fields(kind)
    bare = [f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    if bare:
        raise mps.EstimatorError(f"no default for {', '.join(bare)}")
    made: Estimator = kind(**({"seed": seed} if "seed" in {f.name for f in fields} else {}))
    return made


def measure(judge: Judge, model: nn.Module, calibration: Examples, estimator: Estimator, plans: int) -> list[Row]:
    """One row a budget: agreement with the random plans, and the measured damage of the best plan."""
    start = time.process_time()
    table = mps.profile(
        model, calibration.batches(-(-len(calibration) // 2)), estimator, PRECISIONS, resources=(), progress=False
    )
    seconds = time.process_time() - start
    drawn = [random_plan(judge.bits, number) for number in range(plans)]
    predicted = np.array([usage_of(table, options)["sensitivity"] for options, _ in drawn])
    measured = np.array([judge.kl(options)[0] for options, _ in drawn])
    allowed = np.isfinite(predicted)
    passes = table.origin["passes"]
    rows = []
    for limit in BUDGETS:
        solution = mps.solve(table, mps.Budget(average_bits=limit))
        assert solution.plan is not None
        kl, se = judge.kl(np.array([PRECISIONS.index(solution.plan[layer.name]) for layer in table.layers]))
        here = allowed & np.array([target == limit for _, target in drawn])
        rows.append(
            {
                "average_bits_limit": limit,
                "unit": table.unit,
                "average_bits": solution.usage["average_bits"],
                "status": str(solution.status),
                "predicted": solution.sensitivity,
                "kl": kl,
                "kl_se": se,
                "spearman": spearman(predicted[allowed], measured[allowed]),
                "kendall": kendall(predicted[allowed], measured[allowed]),
                "plans": int(allowed.sum()),
                "spearman_at_limit": spearman(predicted[here], measured[here]),
                "kendall_at_limit": kendall(predicted[here], measured[here]),
                "plans_at_limit": int(here.sum()),
                "calibration_samples": len(calibration),
                "forward_passes": passes["forward"],
                "backward_passes": passes["backward"],
                "passes": passes["forward"] + 2 * passes["backward"],
                "cpu_s": seconds,
                "peak_memory_bytes": table.origin.get("peak_memory_bytes", ""),
            }
        )
    return rows


def uniform_within(judge: Judge, limit: float) -> tuple[str, float]:
    """The uniform precision with the least measured damage among those within the limit, and its KL."""
    plans = [np.full(len(judge.layers), p) for p in range(len(PRECISIONS))]
    fitting = [options for options in plans if judge.average_bits(options) <= limit]
    kl, p = min((judge.kl(options)[0], int(options[0])) for options in fitting)
    return str(PRECISIONS[p]), kl


def read(path: Path) -> list[Row]:
    """Rows of the CSV, numbers as numbers; none where it does not exist yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def _value(column: str, text: str) -> Any:
    return text if column in WORDS or not text else float(text)


def merge(path: Path, judge: Judge, rows: Sequence[Row]) -> None:
    """Put the rows of one network, estimator and seed into the CSV, and bring the network's comparisons up to date.

    Rows of the same network with other weights are dropped: its damages are no longer comparable.
    """
    name = rows[0]["model"]

    def identity(row: Row) -> tuple[Any, ...]:
        return row["model"], row["estimator"], float(row["seed"])

    with lock():
        kept = [row for row in read(path) if identity(row) != identity(rows[0])]
        kept = [row for row in kept if row["model"] != name or row["model_fingerprint"] == judge.fingerprint]
        found = [*kept, *rows]
        for limit in BUDGETS:
            here = [row for row in found if row["model"] == name and row["average_bits_limit"] == limit]
            uniform, uniform_kl = uniform_within(judge, limit)
            best = min(judge.best(limit), *(row["kl"] for row in here))
            for row in here:
                row["uniform"], row["uniform_kl"], row["best_kl"] = uniform, uniform_kl, best
                row["kl_over_uniform"], row["kl_over_best"] = row["kl"] / uniform_kl, row["kl"] / best
        found.sort(key=lambda row: (*identity(row), row["average_bits_limit"]))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _text(row[key]) for key in rows[0]} for row in found)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text.getvalue())


def _text(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def mean_ratio(rows: Sequence[Row], column: str) -> float:
    """Geometric mean of a column."""
    return math.exp(math.fsum(math.log(row[column]) for row in rows) / len(rows))


def picture(path: Path, rows: Sequence[Row]) -> None:
    """Quality of the plans against passes, a panel a network; estimators are named at the side, in the order of quality."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    count = max(len({row["estimator"] for row in rows if row["model"] == name}) for name in names)
    figure = Figure(figsize=(6.5 * len(names), max(5.0, 0.19 * count + 1.5)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(np.ravel(figure.subplots(1, len(names))), names, strict=True):
        mine = [row for row in rows if row["model"] == name]
        by_estimator = {
            key: [row for row in mine if row["estimator"] == key] for key in {row["estimator"] for row in mine}
        }
        _panel(axes, by_estimator)
        axes.set_title(name, loc="left", fontsize=11)
    figure.supylabel("held-out KL of the plan / least found by any\ngeometric mean over 2.5, 3, 4, 5 bits", fontsize=10)
    note = "bars: least and most over calibration seeds · blue: nothing else has better plans for as few passes"
    figure.suptitle(note, fontsize=9, color=GREY)
    save(figure, path)


def _panel(axes: Axes, by_estimator: Mapping[str, Sequence[Row]]) -> None:
    points = []
    for name, rows in by_estimator.items():
        seeds = {row["seed"]: [other for other in rows if other["seed"] == row["seed"]] for row in rows}
        spread = [mean_ratio(mine, "kl_over_best") for mine in seeds.values()]
        points.append((mean_ratio(rows, "kl_over_best"), float(np.mean([row["passes"] for row in rows])), name, spread))
    points.sort()
    axes.set_xscale("symlog", linthresh=1, linscale=0.5)
    axes.set_yscale("log")
    for ratio, passes, _, spread in points:
        color = BLUE if _undominated((ratio, passes), points) else GREY
        axes.plot([passes, passes], [min(spread), max(spread)], color=color, linewidth=1)
        axes.plot([passes], [ratio], "o", color=color, markersize=5)
    rows = next(iter(by_estimator.values()))
    uniform = mean_ratio(rows, "kl_over_best") / mean_ratio(rows, "kl_over_uniform")
    axes.axhline(uniform, color=ORANGE, linewidth=1.5)
    axes.annotate(
        "best uniform precision that fits",
        (0, uniform),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=8,
        color="#8a5f00",
    )
    axes.set_xlabel("passes over the calibration set, a backward as 2")
    axes.grid(True, which="major", alpha=0.25)
    axes.margins(x=0.08)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    low, high = np.log(axes.get_ylim())
    heights = _apart([(math.log(ratio) - low) / (high - low) for ratio, *_ in points], 0.98 / len(points))
    for (ratio, passes, name, _), height in zip(points, heights, strict=True):
        color = BLUE if _undominated((ratio, passes), points) else GREY
        axes.annotate(
            f"{name}  {ratio:.2f}",
            (passes, ratio),
            xytext=(1.05, height),
            textcoords="axes fraction",
            fontsize=8,
            color=color,
            va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.5, "relpos": (0, 0.5)},
        )


def _undominated(point: tuple[float, float], points: Sequence[tuple[float, float, str, list[float]]]) -> bool:
    """True where no estimator has better plans for as few passes, or as good ones for fewer."""
    ratio, passes = point
    return not any((a < ratio and b <= passes) or (a <= ratio and b < passes) for a, b, *_ in points)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Rising places between 0 and 1, moved until neighbours are `gap` apart, up and down by about as much."""
    up = list(itertools.accumulate(places, lambda before, place: max(place, before + gap)))
    down = list(itertools.accumulate(reversed(places), lambda before, place: min(place, before - gap)))[::-1]
    last = len(places) - 1
    return [min(max((a + b) / 2, i * gap), 1 - (last - i) * gap) for i, (a, b) in enumerate(zip(up, down, strict=True))]


def summary(rows: Sequence[Row]) -> str:
    """A line for each network and estimator, means over seeds and budgets."""
    lines = []
    for model, name in dict.fromkeys((row["model"], row["estimator"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["estimator"]) == (model, name)]
        averages = [
            float(np.mean([row[key] for row in mine]))
            for key in ("spearman", "kendall", "spearman_at_limit", "kendall_at_limit", "passes", "cpu_s")
        ]
        ratios = [mean_ratio(mine, "kl_over_best"), mean_ratio(mine, "kl_over_uniform")]
        lines.append((model, ratios[0], [model, name, *(f"{value:.3g}" for value in (*ratios, *averages))]))
    lines.sort(key=lambda line: line[:2])
    header = ["network", "estimator", "KL/best", "KL/uniform", "Spearman", "Kendall"]
    header += ["Spearman at equal size", "Kendall at equal size", "passes", "CPU seconds"]
    return report.table(header, [cells for *_, cells in lines])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet20", "vit", "decoder"])
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), default=list(ESTIMATORS))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="calibration sets")
    parser.add_argument("--plans", type=int, default=240, metavar="N", help="random plans")
    parser.add_argument("--missing", action="store_true", help="leave out what the CSV holds already")
    parser.add_argument("--out", type=Path, default=RESULTS / "sensitivity.csv", metavar="FILE.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)  # comparable times, and the same weights on every machine
    for name in options.models:
        trained = MODELS[name]()
        calibration_samples, batch = SIZES[name]
        judge = Judge(name, trained.model, trained.held_out.batches(batch))
        start, before = time.perf_counter(), len(judge.known)
        for number in range(options.plans):
            judge.kl(random_plan(judge.bits, number)[0])
        judge.save()
        print(f"{name}: {len(judge.known) - before} random plans in {time.perf_counter() - start:.0f} s", flush=True)
        present = {
            (row["model"], row["estimator"], row["seed"])
            for row in (read(options.out) if options.missing else [])
            if row["model_fingerprint"] == judge.fingerprint
        }
        for kind in options.estimators:
            for seed in range(options.seeds):
                if (name, kind, seed) in present:
                    continue
                start = time.perf_counter()
                try:
                    estimator = settings(ESTIMATORS[kind], seed)
                    calibration = trained.pool.sample(calibration_samples, seed)
                    found = measure(judge, trained.model, calibration, estimator, options.plans)
                except mps.MpsearchError as error:
                    print(f"{name} {kind}: left out: {error}", file=sys.stderr)
                    break
                head = {"model": name, "estimator": kind, "seed": seed, "model_fingerprint": judge.fingerprint}
                judge.save()
                merge(options.out, judge, [{**head, **row} for row in found])
                damages = " ".join(f"{row['kl']:.4g}" for row in found)
                print(
                    f"{name} {kind} seed {seed}: {found[0]['passes']:.0f} passes in {found[0]['cpu_s']:.1f} CPU seconds, all "
                    f"{time.perf_counter() - start:.1f} s, KL {damages}",
                    flush=True,
                )
    rows = read(options.out)
    if not rows:
        print("nothing to draw: no estimator ran", file=sys.stderr)
        return 1
    picture(options.out.with_suffix(".png"), rows)
    print(summary(rows))
    print(f"wrote {options.out} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
