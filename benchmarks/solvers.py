"""Exact against the solvers that today's tools call, on the same tables in the same run.

    python benchmarks/solvers.py [--quick]

Tables are generated here: `lognormal` layer sizes, and `llama`, the few distinct sizes of a Llama-3-8B repeated. Damage falls by 4 a bit
with spread. Each solver has a time limit; the value of its plan is recomputed, and "regret" is how much worse it is than the
best plan of all. Writes benchmarks/results/solvers.csv and solvers.png.
"""

import argparse
import csv
import io
import math
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mpsearch.core import printing
from mpsearch.core.table import Interactions
from mpsearch.display.figures import BLUE, GREEN, GREY, ORANGE, RED, save
from mpsearch.files.writing import write_atomically
from mpsearch.solvers import ILP, Annealing, Exact
from mpsearch.solvers.frontier import exact_front, hull_front

RESULTS = Path(__file__).resolve().parent / "results"
BITS = np.array([2, 3, 4, 5, 6, 8, 10, 16])
LLAMA = np.array([4096 * 4096, 1024 * 4096, 1024 * 4096, 4096 * 4096, 14336 * 4096, 14336 * 4096, 14336 * 4096])
LIMIT_S = 20.0

Table = tuple[np.ndarray, np.ndarray, np.ndarray]
Outcome = tuple[np.ndarray | None, float, str]  # options, proven bound, status


def table(kind: str, rows: int, options: int, resources: int, seed: int) -> Table:
    g = np.random.default_rng(seed)
    bits = BITS[:options] if options > 4 else np.array([2, 3, 4, 8])
    numel = np.exp(g.normal(11, 1.5, rows)).astype(np.int64) + 1 if kind == "lognormal" else LLAMA[np.arange(rows) % 7]
    usage = np.empty((resources, rows, len(bits)))
    usage[0] = numel[:, None] * bits // 8 + 2 * (numel[:, None] // 128)
    if resources > 1:
        macs = numel * np.exp(g.normal(3, 1, rows)).astype(np.int64)
        usage[1] = macs[:, None] * bits**2
        usage[2] = macs[:, None] * 1e-12 * (1 + g.random((rows, len(bits))))  # not monotone in bits
    sensitivity = np.exp(g.normal(-5, 2, rows))[:, None] * 4.0**-bits * np.exp(g.normal(0, 0.2, (rows, len(bits))))
    low, high = usage.min(axis=2).sum(axis=1), usage.max(axis=2).sum(axis=1)
    limits = low + (0.35 if resources == 1 else 0.4) * (high - low)
    return sensitivity, usage, limits


def exact(c: np.ndarray, w: np.ndarray, b: np.ndarray) -> Outcome:
    choice = Exact(time_limit_s=LIMIT_S, gap=0.0 if len(c) < 100_000 else 1e-6).choose(c, w, b)
    return choice.options, choice.bound, str(choice.status)


def ours(backend: Any) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Outcome]:
    def run(c: np.ndarray, w: np.ndarray, b: np.ndarray) -> Outcome:
        choice = ILP(backend, LIMIT_S).choose(c, w, b)
        return choice.options, choice.bound, str(choice.status)

    return run


def pulp_plain(backend: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Outcome]:
    """The way today's tools write it: costs as they come, default gaps, status trusted."""

    def run(c: np.ndarray, w: np.ndarray, b: np.ndarray) -> Outcome:
        import warnings

        import pulp

        warnings.simplefilter("ignore")
        problem = pulp.LpProblem("bits", pulp.LpMinimize)
        x = [[pulp.LpVariable(f"x{i}_{j}", cat="Binary") for j in range(c.shape[1])] for i in range(len(c))]
        problem += pulp.lpSum(c[i, j] * x[i][j] for i in range(len(c)) for j in range(c.shape[1]))
        for row in x:
            problem += pulp.lpSum(row) == 1
        for use, limit in zip(w, b, strict=True):
            problem += pulp.lpSum(use[i, j] * x[i][j] for i in range(len(c)) for j in range(c.shape[1])) <= limit
        made = pulp.PULP_CBC_CMD if backend == "cbc" else pulp.HiGHS
        problem.solve(made(msg=False, timeLimit=LIMIT_S))
        values = np.array([[v.value() or 0.0 for v in row] for row in x])
        return values.argmax(axis=1), math.nan, pulp.LpStatus[problem.status].lower()

    return run


def highs_arrays(c: np.ndarray, w: np.ndarray, b: np.ndarray) -> Outcome:
    import highspy

    rows, options = c.shape
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = c.size, rows + len(w)
    model.col_cost_ = c.ravel()
    model.col_lower_, model.col_upper_ = np.zeros(c.size), np.ones(c.size)
    model.integrality_ = [highspy.HighsVarType.kInteger] * c.size
    model.row_lower_ = np.append(np.ones(rows), np.full(len(w), -highspy.kHighsInf))
    model.row_upper_ = np.append(np.ones(rows), b)
    stride = 1 + len(w)
    index, value = np.empty((c.size, stride), np.int32), np.empty((c.size, stride))
    index[:, 0], value[:, 0] = np.repeat(np.arange(rows), options), 1.0
    index[:, 1:], value[:, 1:] = rows + np.arange(len(w)), w.reshape(len(w), -1).T
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.arange(0, c.size * stride + 1, stride, dtype=np.int32)
    model.a_matrix_.index_, model.a_matrix_.value_ = index.ravel(), value.ravel()
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("time_limit", LIMIT_S)
    solver.passModel(model)
    solver.run()
    found = np.array(solver.getSolution().col_value)
    status = solver.modelStatusToString(solver.getModelStatus()).lower()
    return found.reshape(rows, options).argmax(axis=1) if len(found) else None, math.nan, status


def scipy_milp(c: np.ndarray, w: np.ndarray, b: np.ndarray) -> Outcome:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    rows, options = c.shape
    one = csr_matrix((np.ones(c.size), (np.repeat(np.arange(rows), options), np.arange(c.size))))
    limits = [LinearConstraint(one, 1, 1), LinearConstraint(w.reshape(len(w), -1), -np.inf, b)]
    found = milp(
        c.ravel(), constraints=limits, integrality=np.ones(c.size), bounds=Bounds(0, 1), options={"time_limit": LIMIT_S}
    )
    return (
        None if found.x is None else found.x.reshape(rows, options).argmax(axis=1),
        math.nan,
        str(found.message)[:40].lower(),
    )


SOLVERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Outcome]] = {
    "Exact": exact,
    "ILP(highs)": ours("highs"),
    "ILP(cbc)": ours("cbc"),
    "PuLP+CBC plain": pulp_plain("cbc"),
    "PuLP+HiGHS plain": pulp_plain("highs"),
    "highspy": highs_arrays,
    "scipy.milp": scipy_milp,
}


def measure(case: tuple[str, int, int, int, int], names: list[str]) -> list[dict[str, Any]]:
    kind, rows, options, resources, seed = case
    c, w, b = table(*case)
    found = []
    at = np.arange(rows)
    for name in names:
        seconds = math.inf
        for _ in range(5 if name == "Exact" and rows <= 1000 else 1):
            start = time.perf_counter()
            chosen, bound, status = SOLVERS[name](c, w, b)
            seconds = min(seconds, time.perf_counter() - start)
        value, broken = math.nan, ""
        if chosen is not None:
            value = math.fsum(c[at, chosen].tolist())
            over = [math.fsum(use[at, chosen].tolist()) / limit - 1 for use, limit in zip(w, b, strict=True)]
            broken = f"{max(over):.1e}" if max(over) > 0 else ""
        found.append(
            {
                "table": kind, "layers": rows, "options": options, "budgets": resources, "seed": seed, "solver": name,
                "seconds": seconds, "status": status, "value": value, "bound": bound,
                "over_budget": broken,
            }
        )  # fmt: skip
    best = min((r["value"] for r in found if math.isfinite(r["value"]) and not r["over_budget"]), default=math.nan)
    for row in found:
        ours_proven = row["status"] == "optimal" and row["solver"] in ("Exact", "ILP(highs)", "ILP(cbc)")
        row["gap"] = 0.0 if ours_proven else (row["value"] - row["bound"]) / row["value"]
    own = next(r["seconds"] for r in found if r["solver"] == "Exact")
    for row in found:
        row["regret"] = row["value"] / best - 1
        row["times_exact"] = row["seconds"] / own
    return found


def giant(rows: int) -> dict[str, Any]:
    """One large table in a process of its own, so that its memory can be read."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import solvers; solvers.giant_run({rows})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    seconds, gap, status, extra = float(out[0]), float(out[1]), out[2], float(out[3])
    return {
        "table": "lognormal", "layers": rows, "options": 4, "budgets": 1, "seed": 0, "solver": "Exact", "seconds": seconds,
        "status": status, "gap": gap, "memory_above_table_bytes": extra,
    }  # fmt: skip


def giant_run(rows: int) -> None:
    c, w, b = table("lognormal", rows, 4, 1, 0)
    held = _resident_bytes()
    peak, done = [held], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    choice = Exact(gap=1e-7, time_limit_s=30).choose(c, w, b)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    assert choice.options is not None
    value = float(np.take_along_axis(c, choice.options[:, None], 1).sum())
    print(seconds, max(0.0, (value - choice.bound) / value), choice.status, peak[0] - held)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def fronts() -> list[dict[str, Any]]:
    found = []
    for kind, rows, options, make in (
        ("lognormal", 54, 4, exact_front),
        ("llama", 224, 8, exact_front),
        ("lognormal", 1_000_000, 4, hull_front),
    ):
        c, w, _ = table(kind, rows, options, 1, 0)
        seconds = math.inf
        for _ in range(3 if rows < 1000 else 1):
            start = time.perf_counter()
            front = make(c, w[0])
            seconds = min(seconds, time.perf_counter() - start)
        found.append(
            {
                "table": kind, "layers": rows, "options": options, "budgets": 1, "seed": 0, "solver": f"front, {front.method}",
                "seconds": seconds, "status": f"{len(front.usage)} points", "gap": 0.0,
            }
        )  # fmt: skip
    return found


def pairwise() -> list[dict[str, Any]]:
    """54 layers x 4 with dense interactions of both signs: Annealing against the best of three seeds at five times the sweeps."""
    found = []
    for strength, scale in (("moderate", 0.03), ("strong", 0.3)):
        c, w, b = table("lognormal", 54, 4, 1, 0)
        c = c / c.max()
        g = np.random.default_rng(1)
        pairs = np.array(
            [(i, p, j, q) for i in range(54) for j in range(i + 1, 54) for p in range(4) for q in range(4)]
        )
        size = np.sqrt(c[pairs[:, 0], pairs[:, 1]] * c[pairs[:, 2], pairs[:, 3]])
        interactions = Interactions(pairs[:, :2], pairs[:, 2:], scale * size * g.normal(size=len(pairs)))

        def value(options: np.ndarray | None, c: np.ndarray = c, interactions: Interactions = interactions) -> float:
            assert options is not None
            return math.fsum(c[np.arange(54), options].tolist()) + interactions.total(options)

        start = time.perf_counter()
        mine = value(Annealing(seed=0).choose(c, w, b, interactions=interactions).options)
        seconds = time.perf_counter() - start
        long = Annealing(sweeps=5 * Annealing().sweeps)
        others = [value(replace(long, seed=s).choose(c, w, b, interactions=interactions).options) for s in range(1, 4)]
        best = min(mine, *others)
        found.append(
            {
                "table": f"pairwise, {strength}", "layers": 54, "options": 4, "budgets": 1, "seed": 0, "solver": "Annealing",
                "seconds": seconds, "status": "feasible", "value": mine, "regret": (mine - best) / abs(best),
            }
        )  # fmt: skip
    return found


def picture(rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colors = dict(zip(SOLVERS, (BLUE, GREEN, "#CC79A7", RED, ORANGE, "black", GREY), strict=True))
    for name, color in colors.items():
        mine = [r for r in rows if r["solver"] == name and r["budgets"] == 1]
        sizes = sorted({r["layers"] * r["options"] for r in mine})
        medians = [float(np.median([r["seconds"] for r in mine if r["layers"] * r["options"] == s])) for s in sizes]
        axes.plot(sizes, medians, "o-", color=color, label=name, markersize=5, linewidth=2 if name == "Exact" else 1.2)
    axes.axhline(LIMIT_S, color=GREY, linestyle=":", linewidth=1)
    axes.annotate(
        "time limit of the others", (250, LIMIT_S), xytext=(0, 4), textcoords="offset points", fontsize=8, color=GREY
    )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("cells of the table (layers x options)")
    axes.set_ylabel("time [s], median over tables")
    axes.set_title("One budget: time to the plan", loc="left", fontsize=11)
    axes.grid(True, which="major", alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    save(figure, RESULTS / "solvers.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, no tables above 10,000 layers")
    options = parser.parse_args()
    everyone = list(SOLVERS)
    cases = []
    for seed in range(1 if options.quick else 3):
        cases += [(("lognormal", 54, 4, 1, seed), everyone), (("llama", 224, 8, 1, seed), everyone)]
        cases += [(("lognormal", 224, 8, 1, seed), everyone), (("lognormal", 224, 8, 3, seed), everyone)]
    cases.append((("lognormal", 10_000, 8, 1, 0), ["Exact", "PuLP+CBC plain", "highspy"]))
    if not options.quick:
        cases += [(("lognormal", 10_000, 8, 1, s), ["Exact"]) for s in (1, 2)]
        cases += [(("lognormal", 100_000, 8, 1, 0), ["Exact"]), (("lognormal", 100_000, 8, 3, 0), ["Exact"])]
    rows: list[dict[str, Any]] = []
    for case, names in cases:
        rows += measure(case, names)
        for row in rows[-len(names) :]:
            print(
                f"{case} {row['solver']:18s} {row['seconds']:9.4f} s  {row['status']:12s} regret {row['regret']:.1e}",
                flush=True,
            )
    rows += fronts()
    rows += pairwise()
    if not options.quick:
        rows += [giant(1_000_000), giant(10_000_000)]
    fields = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / "solvers.csv", text.getvalue())
    picture(rows)
    shown = [
        [
            f"{r['table']} {r['layers']} x {r['options']}, {r['budgets']} budgets", r["solver"], f"{r['seconds']:.4f}", r["status"],
            f"{r['gap']:.1e}" if "gap" in r else "-", f"{r['regret']:.1e}" if "regret" in r else "-",
            f"{r['times_exact']:.1f}" if "times_exact" in r else "-",
        ]
        for r in rows
    ]  # fmt: skip
    print(printing.table(["table", "solver", "seconds", "status", "gap", "regret", "times Exact"], shown, width=None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
