"""What plans are worth on a real language model, and what they take: SmolLM2-135M-Instruct at 2.25 to 4 bits a weight.

    python benchmarks/language_model.py [--quick] [--only METHOD ...] [--efforts fast default] [--modes resident streamed]

Every method gets the same calibration text and a limit of effective bits (scales counted), and gives each of 210 linear layers one of
w2g64, w3g64, w4g64 and w8g64 (round to nearest, scales of least squared error; 2.25, 3.25, 4.25 and 8.25 bits with their scales). One judge
measures all plans on held-out text: KL to the unquantized model and perplexity, with standard errors over windows. The model and the
text are told in `smollm2.py`, with their licences, and what its weights' 4-bit grid means. Compared are

- uniform precision: the widest that fits;
- llama.cpp's mixes (`llama-quantize` Q2_K, Q3_K_M, ..., as its `src/llama-quant.cpp` gives types to the layers of a Llama without
  experts and importance matrix): each type becomes the option nearest to its bits, and the mix is compared at the bits that it then has;
- first and last blocks higher: uniform, and then block by block from both ends the next wider option, as far as the limit goes;
- the exact plan of a single table, for each of several signals;
- `mpsearch.search`, by effort, resident and streamed from the folder.

Each table, search and measured plan is a file in `benchmarks/cache/language_model/` once it is finished, a search writes its checkpoint
there too: a killed run goes on. Searches and tables run in processes of their own, whose peak memory is taken (`rows.py`). What a `fast`
search takes beyond rounding each cell once is told in forward passes over the same tokens.
Writes benchmarks/results/language_model.csv, .md and .png.
"""

import argparse
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import smollm2
import torch
import transformers
from models import cache
from rows import end_rows_too, keep, kept, measured, run

import mpsearch as mps
from mpsearch.core import printing
from mpsearch.display.figures import BLUE, GREEN, GREY, ORANGE, save
from mpsearch.display.figures.figure import empty
from mpsearch.files.writing import write_atomically
from mpsearch.models.fingerprints import digest
from mpsearch.models.hugging_face import model_of
from mpsearch.quantizers.ggml import TYPES
from mpsearch.quantizers.registry import QUANTIZERS
from mpsearch.sensitivity import (
    Estimator,
    Fisher,
    FisherProjection,
    KLDivergence,
    LayerOutputError,
    OutputGradient,
    RelativeWeightError,
)

RESULTS = Path(__file__).resolve().parent / "results"
PRECISIONS = mps.precisions("w2g64 w3g64 w4g64 w8g64")
LIMITS = (2.5, 3.0, 3.5)
LAYERS = mps.LayerOptions(exclude=smollm2.EXCLUDED)
#: Signal -> its estimator, and the share of the calibration windows that it is given.
SIGNALS: Mapping[str, tuple[Callable[[int], Estimator], float]] = {
    "relative-weight-error": (lambda _: RelativeWeightError(), 1.0),
    "layer-output-error": (lambda _: LayerOutputError(), 1.0),
    "fisher-projection": (lambda seed: FisherProjection(seed=seed), 1.0),
    "output-gradient": (lambda seed: OutputGradient(seed=seed), 1.0),
    "fisher": (lambda _: Fisher(), 1.0),
    "kl-divergence": (lambda _: KLDivergence(), 0.125),  # 840 runs: a table of ratios needs fewer tokens than a plan
}
QUICK = ("relative-weight-error", "fisher-projection")
EFFORTS = ("fast", "default")
MODES = ("resident", "streamed")
RULE = "first and last blocks higher"
TIE = 1e-9  # effective bits are sums of floats


@dataclass(frozen=True)
class Setting:
    """What all rows have in common.

    Attributes:
        windows: of calibration.
        held_out: windows that the judge measures on.
        tokens: of a window.
        seed: of the text and of what methods draw.
        quantizer: what rounds.
    """

    windows: int = 32
    held_out: int = 32
    tokens: int = 256
    seed: int = 0
    quantizer: str = "rtn"

    @property
    def folder(self) -> Path:
        """Of finished work: other text, another model or another version of Python have one of their own."""
        source = Path(smollm2.__file__).read_bytes().hex()
        key = digest(f"{self} {PRECISIONS} {platform.python_version()} {torch.__version__} {source}")
        return cache() / "language_model" / key[:12]

    @property
    def arguments(self) -> list[str]:
        """The same on the command line."""
        return [f"--{name.replace('_', '-')}={value}" for name, value in asdict(self).items()]

    def calibration(self, share: float = 1.0) -> list[dict[str, torch.Tensor]]:
        """Calibration batches, or the first of them."""
        batches = smollm2.batches("calibration", self.windows, self.tokens, self.seed)
        return batches[: max(math.ceil(share * len(batches)), 1)]


class Space:
    """Layers and sizes of plans, by a table."""

    def __init__(self, table: mps.CostTable) -> None:
        self.names = [layer.name for layer in table.layers]
        weights = np.array([math.prod(layer.weight_shape) for layer in table.layers])
        self.bits = 8 * table.usage["memory_bytes"] / weights.sum()  # (layers, options), of the whole model

    def effective_bits(self, plan: mps.Plan) -> float:
        """Bits a weight, scales counted."""
        return float(sum(row[PRECISIONS.index(plan[name])] for name, row in zip(self.names, self.bits, strict=True)))

    def uniform(self, option: int) -> mps.Plan:
        """The same option everywhere."""
        return mps.Plan(dict.fromkeys(self.names, PRECISIONS[option]))

    def widest(self, limit: float) -> int:
        """The widest option that fits everywhere."""
        return max(p for p in range(len(PRECISIONS)) if self.bits[:, p].sum() <= limit + TIE)


def block_of(name: str) -> int:
    """Number of the block that a layer is in.

    >>> block_of("model.layers.12.mlp.down_proj")
    12
    """
    return int(name.split(".")[2])


def ends_higher(space: Space, limit: float) -> mps.Plan:
    """Uniform, and block by block from both ends the next wider option, as far as the limit goes."""
    base = space.widest(limit)
    plan = dict(space.uniform(base))
    count = 1 + max(map(block_of, space.names))
    order = [end for step in range((count + 1) // 2) for end in (step, count - 1 - step)]
    for block in dict.fromkeys(order):
        raised = plan | {name: PRECISIONS[base + 1] for name in space.names if block_of(name) == block}
        if space.effective_bits(mps.Plan(raised)) > limit + TIE:
            break
        plan = raised
    return mps.Plan(plan)


def llama_cpp_type(mix: str, layer: str, blocks: int) -> str:
    """The type that `llama-quantize` gives a layer in a mix: Llama, no experts, no importance matrix, heads in groups of less than four.

    >>> [llama_cpp_type("Q3_K_M", f"model.layers.{block}.mlp.down_proj", 32) for block in (0, 2)]
    ['q5_k', 'q4_k']
    """
    block, kind = block_of(layer), layer.rpartition(".")[2]
    ends = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    raised: dict[str, dict[str, str]] = {
        "Q2_K": dict.fromkeys(("v_proj", "o_proj", "down_proj"), "q3_k"),
        "Q2_K_S": {"down_proj": "q4_k" if block < blocks // 8 else "q2_k"},
        "Q3_K_S": {},
        "Q3_K_M": {
            "v_proj": "q5_k" if block < 2 else "q4_k",
            "o_proj": "q4_k",
            "down_proj": "q5_k" if block < blocks // 16 else "q4_k",
        },
        "Q3_K_L": dict.fromkeys(("v_proj", "o_proj", "down_proj"), "q5_k"),
        "Q4_K_S": {
            "v_proj": "q5_k" if block < 4 else "q4_k",
            "down_proj": "q5_k" if block < blocks // 8 else "q4_k",
        },
        "Q4_K_M": dict.fromkeys(("v_proj", "down_proj"), "q6_k" if ends else "q4_k"),
    }
    return raised[mix].get(kind, mix[:4].lower())


MIXES = ("Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M")


def llama_cpp_mix(mix: str, space: Space) -> mps.Plan:
    """A mix in the options here: each type as the option nearest to it in bits, scales counted."""
    blocks = 1 + max(map(block_of, space.names))
    own = [precision.weight_bits + 16 / 64 for precision in PRECISIONS]  # of an option, with a scale of 16 bits a group

    def option(name: str) -> mps.Precision:
        block_type = TYPES[llama_cpp_type(mix, name, blocks)]
        bits = 8 * block_type.nbytes / block_type.size
        return PRECISIONS[min(range(len(own)), key=lambda p: abs(own[p] - bits))]

    return mps.Plan({name: option(name) for name in space.names})


# What runs in a process of its own.


def fill_table(setting: Setting, signal: str, out: Path) -> None:
    """Score all cells by one signal."""
    estimator, share = SIGNALS[signal]
    batches = setting.calibration(share)
    with measured() as usage:
        model = model_of(str(smollm2.folder()))
        table = mps.profile(
            model,
            batches,
            estimator(setting.seed),
            PRECISIONS,
            layers=LAYERS,
            quantizer=setting.quantizer,
            checkpoint=out.with_suffix(".db"),
            progress=False,
        )
    passes, now = (
        share * (one["forward"] + 2 * one["backward"])
        for one in (table.origin["passes"], table.origin["passes_in_this_run"])
    )
    table.save(out.with_suffix(".npz"))
    keep(out, took(usage, passes, now))


def find_plan(setting: Setting, effort: str, limit: float, mode: str, out: Path) -> None:
    """Search a plan."""
    batches = setting.calibration()
    with measured() as usage:
        model = model_of(str(smollm2.folder()), streamed=mode == "streamed")
        result = mps.search(
            model,
            batches,
            mps.Budget(effective_bits=limit),
            PRECISIONS,
            effort=effort,  # type: ignore[arg-type]
            layers=LAYERS,
            quantizer=setting.quantizer,
            seed=setting.seed,
            checkpoint=out.with_suffix(".db"),
            progress=False,
        )
    now = result.passes if result.passes_in_this_run is None else result.passes_in_this_run
    result.plan.save(out.with_suffix(".plan.json"))
    keep(out, {**took(usage, result.passes, now), "verdict": result.verdict})


def took(usage: Any, passes: float, now: float) -> dict[str, Any]:
    """Passes, time and memory of a row; a run that went on after it was killed does not know the time of all of it."""
    whole = now >= passes - 1e-3
    return {
        "passes": passes,
        "seconds": usage.seconds if whole else None,
        "cpu_seconds": usage.cpu_seconds if whole else None,
        "peak_memory_bytes": usage.peak_bytes,
        "peak_anonymous_bytes": usage.peak_anonymous_bytes,
    }


def judge(setting: Setting, folder: Path) -> None:
    """Measure all plans in a folder on the held-out text, each kept as soon as it is measured."""
    batches = smollm2.batches("held_out", setting.held_out, setting.tokens, setting.seed)
    model = model_of(str(smollm2.folder()))
    with mps.Calibration(
        model, batches, PRECISIONS, layers=LAYERS, quantizer=setting.quantizer, progress=False
    ) as calibration:
        for path in sorted(folder.glob("*.plan.json")):
            out = path.with_name(path.name.replace(".plan.json", ".json"))
            if not out.exists():
                found = calibration.evaluate(mps.Plan.load(path))
                row = {name: getattr(found, name) for name in ("kl", "kl_se", "loss", "loss_se")}
                reference = found.reference
                assert reference is not None
                keep(out, {**row, "reference_loss": reference.loss, "reference_loss_se": reference.loss_se})
                print(
                    f"  {len(list(folder.glob('*.json')))} files, KL {printing.damage(found.kl, found.kl_se)}",
                    flush=True,
                )


def measure_bar(setting: Setting, out: Path) -> None:
    """A `fast` search, a forward pass over the same tokens and one rounding of each cell, in CPU seconds of one process."""
    batches = setting.calibration()
    model = model_of(str(smollm2.folder()))
    layers = mps.layers(model, batches[0], exclude=smollm2.EXCLUDED)
    quantizer = QUANTIZERS[setting.quantizer]()
    stages = {}

    def timed(name: str, work: Callable[[], Any]) -> None:
        start, wall = time.process_time(), time.perf_counter()
        work()
        stages[f"{name}_cpu_seconds"] = time.process_time() - start
        stages[f"{name}_seconds"] = time.perf_counter() - wall

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    def rounding() -> None:
        for layer in layers:
            for precision in PRECISIONS:
                quantizer(model.get_submodule(layer.name).weight.detach(), precision)

    def search() -> None:
        budget = mps.Budget(effective_bits=LIMITS[0])
        mps.search(model, batches, budget, PRECISIONS, effort="fast", layers=LAYERS, seed=setting.seed, progress=False)

    model(**{name: rows[:1] for name, rows in batches[0].items()})
    timed("forward", forward)
    timed("rounding", rounding)
    timed("search", search)
    timed("forward_again", forward)
    pass_seconds = (stages["forward_cpu_seconds"] + stages["forward_again_cpu_seconds"]) / 2
    ratio = (stages["search_cpu_seconds"] - stages["rounding_cpu_seconds"]) / pass_seconds
    keep(out, {**stages, "passes_worth": ratio, "tokens": setting.windows * setting.tokens})


# What brings them together.


def file_name(*parts: Any) -> str:
    return "_".join(str(part).replace(" ", "-") for part in parts)


def plan_rows(setting: Setting, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Find the plans of all methods: rows without what the judge measures."""
    folder = setting.folder

    def row_of(job: Sequence[Any]) -> dict[str, Any] | None:
        out = folder / f"{file_name(*job)}.json"
        start = time.perf_counter()
        problem = run(__file__, [*setting.arguments, "--job", *job], out, options.timeout)
        if problem:
            print(f"{' '.join(map(str, job))}: left out: {problem}", file=sys.stderr)
        elif time.perf_counter() - start > 1:
            print(f"{' '.join(map(str, job))}: {time.perf_counter() - start:.0f} s", flush=True)
        return None if problem else kept(out)

    free = {"passes": 0.0, "seconds": 0.0}
    first = row_of(["table", "relative-weight-error"])
    if first is None:
        raise SystemExit("no table to count the bytes of plans by")
    space = Space(mps.CostTable.load(folder / file_name("table", "relative-weight-error.npz")))
    mixes = {mix: llama_cpp_mix(mix, space) for mix in MIXES}
    own = {mix: space.effective_bits(plan) for mix, plan in mixes.items()}
    within = [bits for bits in own.values() if bits <= options.limits[-1] + 0.5]
    limits = sorted({*options.limits, *([] if options.quick else [round(bits + TIE, 6) for bits in within])})
    rows: list[dict[str, Any]] = []

    def add(method: str, limit: float, plan: mps.Plan | None, mode: str = "", took: Mapping[str, Any] = free) -> None:
        if plan is not None:
            rows.append({"limit": limit, "method": method, "mode": mode, "plan": plan, **took})

    for mix, plan in mixes.items():
        if not options.quick or mix in ("Q2_K", "Q3_K_M"):
            add(f"llama.cpp {mix}", round(own[mix] + TIE, 6), plan)
    for limit in limits:
        add("uniform", limit, space.uniform(space.widest(limit)))
        add(RULE, limit, ends_higher(space, limit))
    for signal in QUICK if options.quick else SIGNALS:
        row = row_of(["table", signal])
        if row is not None:
            table = mps.CostTable.load(folder / file_name("table", f"{signal}.npz"))
            for limit in limits:
                add(signal, limit, mps.solve(table, mps.Budget(effective_bits=limit)).plan, "resident", row)
    for effort in options.efforts:
        for mode in options.modes:
            for limit in limits if (effort, mode) == ("fast", "resident") else options.limits:
                row = row_of(["search", effort, limit, mode])
                if row is not None:
                    path = folder / f"{file_name('search', effort, limit, mode)}.plan.json"
                    add(f"mpsearch {effort}", limit, mps.Plan.load(path), mode, row)
    if options.only:
        rows = [row for row in rows if any(name in row["method"] for name in options.only)]
    judged = folder / "judged"
    judged.mkdir(parents=True, exist_ok=True)
    for row in rows:
        row["effective_bits"] = space.effective_bits(row["plan"])
        key = digest(" ".join(str(row["plan"][name]) for name in space.names))[:16]
        row["judged"] = judged / f"{key}.json"
        row.pop("plan").save(judged / f"{key}.plan.json")
    return rows


def with_damage(rows: Sequence[Mapping[str, Any]], setting: Setting) -> pd.DataFrame:
    """The rows with what the judge measured."""
    lines = []
    for row in rows:
        found = kept(row["judged"])
        if found is None:
            continue
        perplexity = {
            "perplexity": math.exp(found["loss"]),
            "perplexity_se": math.exp(found["loss"]) * found["loss_se"],  # the delta method
            "reference_perplexity": math.exp(found["reference_loss"]),
            "reference_perplexity_se": math.exp(found["reference_loss"]) * found["reference_loss_se"],
        }
        plain = {name: value for name, value in row.items() if name not in ("judged", "verdict")}
        lines.append({**plain, "kl": found["kl"], "kl_se": found["kl_se"], **perplexity, **asdict(setting)})
    return pd.DataFrame(lines).sort_values(["limit", "kl"], kind="stable")


def markdown(found: pd.DataFrame, bar: Mapping[str, Any] | None) -> str:
    """A table for each limit, least damage first."""
    first = found.iloc[0]
    lines = [
        f"Unquantized: perplexity {printing.damage(first['reference_perplexity'], first['reference_perplexity_se'])}. "
        f"Held-out: {first['held_out']:.0f} windows of {first['tokens']:.0f} tokens; calibration: {first['windows']:.0f} windows.",
    ]
    if bar is not None:
        lines += [
            "",
            f"`fast` took {bar['search_cpu_seconds']:.0f} CPU seconds: {bar['rounding_cpu_seconds']:.0f} to round each cell once, and the "
            f"rest is worth {bar['passes_worth']:.1f} forward passes over the same {bar['tokens']} tokens.",
        ]
    head = ["method", "bits", "KL [nats]", "perplexity", "passes", "seconds", "peak memory"]
    for limit, rows in found.groupby("limit"):
        lines += ["", f"At most {limit:.4g} effective bits:", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        for _, row in rows.iterrows():
            name = f"`{row['method']}`" if row["method"] in SIGNALS else row["method"]
            name = f"{name}, streamed" if row["mode"] == "streamed" else name
            peak = row.get("peak_memory_bytes")
            known = [f"{row['passes']:.3g}", "-" if pd.isna(row["seconds"]) else f"{row['seconds']:.0f}"]
            cells = [
                name,
                f"{row['effective_bits']:.2f}",
                printing.damage(row["kl"], row["kl_se"]),
                printing.damage(row["perplexity"], row["perplexity_se"]),
                *known,
                "" if peak is None or pd.isna(peak) else f"{peak / 1e9:.2f} GB",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def picture(found: pd.DataFrame, path: Path) -> None:
    """Damage against effective bits."""
    figure = empty(9.5, 6)
    axes = figure.subplots()
    axes.set_yscale("log")
    resident = found[found["mode"] != "streamed"]
    for method, rows in resident.groupby("method", sort=False):
        rows = rows.drop_duplicates("effective_bits").sort_values("effective_bits")
        mix = str(method).startswith("llama.cpp")
        colour = BLUE if str(method).startswith("mpsearch") else ORANGE if mix else GREEN if method in SIGNALS else GREY
        axes.errorbar(
            rows["effective_bits"],
            rows["kl"],
            rows["kl_se"],
            color=colour,
            marker={BLUE: "s", ORANGE: "D", GREEN: "o"}.get(colour, "x"),
            linestyle="none" if mix else "--" if colour == GREY else "-",
            linewidth=1.8 if colour == BLUE else 0.8,
            markersize=5,
            capsize=2,
        )
        last = rows.iloc[-1]
        axes.annotate(
            str(method).removeprefix("llama.cpp "),
            (last["effective_bits"], last["kl"]),
            xytext=(6, 0),
            textcoords="offset points",
            color=colour,
            fontsize=8,
            va="center",
        )
    axes.set_xlabel("bits a weight, scales counted")
    axes.set_ylabel("held-out KL to the unquantized model [nats]")
    axes.set_title("SmolLM2-135M-Instruct; orange: llama.cpp's mixes, green: single tables", loc="left", fontsize=10)
    axes.margins(x=0.18)
    axes.grid(True, which="major", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save(figure, path)


def job(setting: Setting, kind: str, *arguments: str) -> None:
    """What `--job` asks for, in this process."""
    transformers.logging.disable_progress_bar()
    if kind == "model":
        smollm2.folder()
        return
    out = setting.folder / f"{file_name(kind, *arguments)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == "table":
        fill_table(setting, arguments[0], out)
    elif kind == "search":
        find_plan(setting, arguments[0], float(arguments[1]), arguments[2], out)
    elif kind == "bar":
        measure_bar(setting, out)
    else:
        judge(setting, setting.folder / "judged")
        keep(out, {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="a small run of all parts: one limit, 24 windows of 64 tokens, rtn-max"
    )
    parser.add_argument("--limits", nargs="+", type=float, default=LIMITS, help="effective bits")
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="METHOD", help="judge these methods alone, by a part of the name"
    )
    parser.add_argument("--efforts", nargs="*", choices=(*EFFORTS, "thorough"), default=EFFORTS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of searches (default: both)")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="of a table or search; it goes on at the next run"
    )
    parser.add_argument("--no-bar", action="store_true", help="leave out the time of `fast` in forward passes")
    parser.add_argument("--job", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="default: benchmarks/results/language_model.csv")
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s")
    options = parser.parse_args()
    setting = Setting(**{name: getattr(options, name) for name in asdict(Setting())})
    if options.job:
        job(setting, *options.job)
        return 0
    if options.quick:
        setting = Setting(24, 8, 64, options.seed, "rtn-max")
        options.limits, options.efforts = (3.0,), [effort for effort in options.efforts if effort == "fast"]
    options.limits = sorted(options.limits)
    end_rows_too()
    out = options.out or (cache() / "language_model_quick.csv" if options.quick else RESULTS / "language_model.csv")
    problem = run(__file__, ["--job", "model"], smollm2.cached())
    if problem:
        raise SystemExit(f"no model: {problem}")
    rows = plan_rows(setting, options)
    problem = run(__file__, [*setting.arguments, "--job", "judge"], setting.folder / "judge.json")
    (setting.folder / "judge.json").unlink(missing_ok=True)  # it measures what is not measured yet
    if problem:
        print(f"judge: {problem}", file=sys.stderr)
    bar = None
    if not options.no_bar:
        problem = run(__file__, [*setting.arguments, "--job", "bar"], setting.folder / "bar.json", options.timeout)
        if problem:
            print(f"bar: left out: {problem}", file=sys.stderr)
        bar = kept(setting.folder / "bar.json")
    found = with_damage(rows, setting)
    write_atomically(out, found.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    write_atomically(out.with_suffix(".md"), markdown(found, bar))
    picture(found, out.with_suffix(".png"))
    print(markdown(found, bar))
    print(f"wrote {out}, a table and a picture")
    return 0


if __name__ == "__main__":
    sys.exit(main())
