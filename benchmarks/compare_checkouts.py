"""Two checkouts of mpsearch do the same seeded work on ten models; every result is compared bit for bit.

    python benchmarks/compare_checkouts.py OLD NEW [--only PATTERN] [--json FILE]
    python benchmarks/compare_checkouts.py CHECKOUT --json FILE        # only writes down what it finds

OLD and NEW are checkouts, or files that `--json` wrote; with two of them `--json` writes the results of NEW. `--only` names models
by a pattern. For changes that must not change a number: moved modules, new names, other ways to the same result. Prints a row for every
kind of result of every model, with the first difference; the exit status is 1 where anything differs.

Each checkout runs in a process of its own, by the same interpreter on one thread, about four minutes. Only what users import is used,
so that modules may move between the two: `mpsearch`, its `sensitivity`, `solvers`, `resources`, `export`, `imports`, and the command
line. What has to differ from run to run is left out: seconds, versions, paths, module names, hashes of code. An exception is a result
like any other.
"""

import argparse
import copy
import dataclasses
import enum
import fnmatch
import functools
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch import export, imports, resources, sensitivity, solvers
from mpsearch.estimation.passes import Passes

#: Numbers of an array, and lines of a text, that are kept as they are; of longer ones the first few beside a hash.
KEPT, HEAD = 256, 16
#: Fields that differ from run to run, or from machine to machine.
PASSING = {"seconds", "peak_memory_bytes", "environment", "version", "producer_version"}
#: Settings of estimators that keep them short.
SHORT: Mapping[str, Mapping[str, Any]] = {
    "hessian-trace": {"num_samples": 3},
    "hessian-top-eigenvalue": {"iterations": 6},
    "hawq-proxy": {"num_iterations": 3},
    "hawq-v2-proxy": {"num_samples": 3},
    "linearity-coefficients": {"levels": 3},
    "salience-groups": {"group_size": 16},
}
#: Estimators by what they do; the first case takes all that are registered.
MEASURED = (
    "kl-divergence", "output-damage", "output-mse", "sqnr", "cosine-distance", "prediction-difference", "task-metric",
    "layer-output-error", "masked-kl", "metric-decoupled", "linearity-coefficients", "path-shapley",
)  # fmt: skip
SWEPT = (
    "fisher-projection", "fisher", "gauss-newton-trace", "kfac-diagonal", "hessian-augmented", "empirical-fisher",
    "output-gradient", "delta-loss", "taylor", "gradient-importance",
)  # fmt: skip
CURVED = ("hessian-trace", "hessian-top-eigenvalue", "hawq-proxy", "hawq-v2-proxy")
RELEVANT = ("lrp", "lrp-qvit", "mix-qvit", "activation-entropy")
OF_WEIGHTS = (
    "relative-weight-error",
    "kurtosis",
    "weight-entropy",
    "orthogonality",
    "adapt-divergence",
    "salience-groups",
)
PROXIES = ("snip", "synflow", "grasp", "channel-fisher", "gradient-weight", "qe", "emq")


# --- results as JSON ----------------------------------------------------------------------------------------------------------------------


def canonical(value: Any) -> Any:
    """A result as JSON that is equal where the result is, to the last bit; classes are known by their own name alone."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, enum.Enum | Path | type | torch.dtype | mps.Precision):
        return plain(getattr(value, "__name__", str(value)))
    if isinstance(value, bytes):
        return {"bytes": len(value), "hash": hashed(value)}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return array(value)
    if isinstance(value, mps.SearchResult):
        return search_result(value)
    if isinstance(value, mps.Front):
        return front(value)
    if isinstance(value, nn.Module):
        return {"class": type(value).__name__, "state": canonical(dict(value.state_dict()))}
    if dataclasses.is_dataclass(value):
        return {"class": type(value).__name__, **fields(value)}
    if isinstance(value, Mapping):
        return {plain(str(key)): canonical(one) for key, one in value.items() if key not in PASSING}
    if isinstance(value, Sequence):
        return [canonical(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return of_a_tool(value)


def of_a_tool(value: Any) -> Any:
    """An object of another tool's: by what it writes, else by its text."""
    if hasattr(value, "SerializeToString"):
        return onnx_bytes(value)
    if hasattr(value, "model_dump"):
        return canonical(value.model_dump(mode="json"))
    if hasattr(value, "to_dict"):
        return canonical(value.to_dict())
    return plain(repr(value))


def fields(value: Any) -> dict[str, Any]:
    """Fields of a dataclass."""
    named = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    return {name: canonical(one) for name, one in named.items() if name not in PASSING}


def array(value: Any) -> dict[str, Any]:
    """Type, shape and hash of an array, with its numbers where they are few, so that a difference can be told with its size."""
    kind = str(value.dtype)
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.view(torch.int16) if value.dtype is torch.bfloat16 else value
        value = value.resolve_conj().resolve_neg().numpy()
    value = np.ascontiguousarray(value)
    flat = value.reshape(-1)
    shown = flat if flat.size <= KEPT else flat[:HEAD]
    numbers = [canonical(one) for one in shown.tolist()] if value.dtype != object else [repr(one) for one in shown]
    return {"dtype": kind, "shape": list(value.shape), "hash": hashed(value.tobytes()), "values": numbers}


def hashed(data: bytes) -> str:
    """A short name for bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def plain(text: str) -> str:
    """Text without what names a place: modules of mpsearch, addresses, folders."""
    text = re.sub(r"\bmpsearch(?:\.\w+)+\.(\w+)", r"\1", text)
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    for place in (os.environ.get("COMPARED_CHECKOUT", ""), os.getcwd(), os.path.dirname(os.path.abspath(__file__))):
        text = text.replace(place, "<folder>") if place else text
    text = re.sub(r'("(?:seconds|peak_memory_bytes)": )[^,}\n]+', r"\1<passing>", text)
    text = re.sub(r"at most [\d.]+ \w?B above", "at most <passing> above", text)
    text = re.sub(r"\b(mpsearch[ =]*)\d+\.\d+\.\d+\b", r"\1<version>", text)
    return re.sub(r"\b\d+\.\d+ s\b", "<passing>", text)


def front(value: mps.Front) -> dict[str, Any]:
    """A front by its axes, its CSV, and solutions at its ends and in its middle."""
    names = ("over", "usage", "sensitivity", "gap", "method", "also", "also_usage")
    ends = [value[0], value[len(value) // 2], value[-1]]
    value.save("front.csv")
    return {
        **{name: canonical(getattr(value, name)) for name in names},
        "csv": file("front.csv"),
        "solutions": canonical(ends),
    }


def search_result(value: mps.SearchResult) -> dict[str, Any]:
    """All of a result but times; what it ran is known by names without the hashes of code in them."""
    known = fields(dataclasses.replace(value, finished={}, identity={}))
    kept = ("weights", "data", "layers", "precisions", "parts")
    return {
        **known,
        "identity": {name: value.identity[name] for name in kept} | {"names": sorted(value.identity)},
        "finished": finished(value.finished),
        "text": plain(dataclasses.replace(value, seconds=0.0).text()).split("\n"),
    }


def finished(work: Any) -> list[Any]:
    """What a search ran: (name, value), without what names the code; of a store of records by the names that work had as text."""
    if isinstance(work, Mapping):
        rows = [(name, *torch.load(io.BytesIO(data), weights_only=False)) for name, data in work.items()]
    else:
        entries = [(key, work.entry(key)) for key in work.rows()]
        rows = [(name, value, entry.passes) for key, entry in entries for name, value in named(key, entry.value)]
    found = []
    for name, value, works in rows:
        passes = sorted(float(one).hex() for pair in works.values() for one in pair)
        found.append([without_digests(name), canonical(value), passes])
    return sorted(found, key=json.dumps)


def named(key: Any, value: Any) -> list[tuple[str, Any]]:
    """Finished work by the names that it had before keys were records."""
    digest = "0" * 24
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    match key.kind:
        case "plan":
            return [(f"plan | {key.part} | {' '.join(key.precisions)}", value)]
        case "tables":
            return [(f"search | tables | {key.estimators}", value)]
        case "turn":
            return [(f"one at a time | confirmed | {key.turn}", value)]
        case "cell":
            return [(f"one at a time | {digest} | {key.turn}", value)]
        case "sweep":
            return [(f"sweep | {key.estimators} | {key.decisions} units", value)]
        case "trace":
            return [(f"hessian trace | {key.estimator} | {key.batch}", value)]
        case "delta loss":
            return [(f"delta loss | {key.precision} | {key.batch}", value)]
        case "path":
            return [(f"path | {key.nodes} | {key.precision} | {key.batch}", value)]
        case "shift index":
            return [("logit shift | index", value["rows"]), ("logit shift | squares", value["squares"])]
        case "reference":
            return [(f"logit shift | {key.rows}", value)]
        case "shift":
            return [(f"logit shift | {key.rows} | {key.decision} {key.precision}", value)]
    return [(repr(key), value)]


def without_digests(text: str) -> str:
    """Text without the hashes that depend on code."""
    return re.sub(r"\b[0-9a-f]{24}\b", "<digest>", plain(text))


# --- files --------------------------------------------------------------------------------------------------------------------------------


def file(path: str | Path) -> Any:
    """A file by its lines or its tensors, else by its bytes; a folder by its files."""
    path = Path(path)
    if path.is_dir():
        return {str(one.relative_to(path)): file(one) for one in sorted(path.rglob("*")) if one.is_file()}
    data = path.read_bytes()
    if path.suffix == ".onnx":
        import onnx

        return onnx_bytes(onnx.load(path))
    if path.suffix == ".pt":
        return canonical(torch.load(path, weights_only=False))
    if path.suffix in (".npz", ".pt2"):
        with zipfile.ZipFile(path) as archive:
            return {name: canonical(archive.read(name)) for name in archive.namelist() if told(name)}
    try:
        lines = plain(data.decode()).split("\n")
    except UnicodeDecodeError:
        return canonical(data)
    if len(lines) <= KEPT and max(map(len, lines)) < 4000:
        return lines
    return {
        "lines": len(lines),
        "hash": hashed("\n".join(lines).encode()),
        "first": [one[:200] for one in lines[:HEAD]],
    }


def told(member: str) -> bool:
    """False for the part of an exported program that holds places in the source."""
    return (
        not member.endswith((".json", "archive_version", ".data/serialization_id")) and "weights_config" not in member
    )


def onnx_bytes(model: Any) -> Any:
    """An ONNX graph without the places in the source that it came from."""
    model.ClearField("metadata_props")
    model.ClearField("producer_version")
    for graph in [model.graph, *model.functions]:
        for node in [graph, *graph.node, *getattr(graph, "value_info", ())]:
            for name in ("metadata_props", "doc_string"):
                node.ClearField(name)
    for one in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        one.ClearField("metadata_props")
        one.ClearField("doc_string")
    nodes = [f"{node.op_type} {node.name}" for node in model.graph.node]
    tensors = {one.name: hashed(one.SerializeToString(deterministic=True)) for one in model.graph.initializer}
    return {"nodes": nodes, "tensors": tensors, **canonical(model.SerializeToString(deterministic=True))}


def without_times(table: mps.CostTable) -> mps.CostTable:
    """A table whose files are the same in every run."""
    return dataclasses.replace(table, origin={name: one for name, one in table.origin.items() if name not in PASSING})


def clean(result: mps.SearchResult) -> mps.SearchResult:
    """A result whose files are the same in every run."""
    tables = {name: without_times(table) for name, table in result.tables.items()}
    settings = {name: one for name, one in result.settings.items() if name not in PASSING}
    return dataclasses.replace(result, seconds=0.0, tables=tables, settings=settings)


def saved_search(result: mps.SearchResult, folder: str) -> Any:
    """The folder of a result, and what is loaded from it."""
    clean(result).save(folder)
    found = file(folder)
    del found["passes.db"]  # named by hashes of code; `finished` has what is in it
    summary = json.loads(Path(folder, "summary.json").read_text())
    found["summary.json"] = canonical({k: v for k, v in summary.items() if k not in ("files", "identity")})
    return {"files": found, "loaded": canonical(mps.SearchResult.load(folder))}


# --- one model's work ---------------------------------------------------------------------------------------------------------------------


class Record:
    """Results of one model by kind."""

    def __init__(self) -> None:
        self.results: dict[str, Any] = {}

    def keep(self, kind: str, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """Call, from one seed, and keep what comes back, what is warned of and where, or what is raised (then None comes back)."""
        seed(0)
        value: Any = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                value = function(*arguments, **keywords)
                found = {"result": canonical(value)}
            except Exception as error:
                found = {"raised": f"{type(error).__name__}: {plain(str(error))}"}
        told = [one for one in caught if issubclass(one.category, UserWarning) and "site-packages" not in one.filename]
        said = [[place_of(one), plain(str(one.message))] for one in told]  # other packages warn when first imported
        self.results[kind] = found | ({"warnings": said} if said else {})
        return value


def place_of(one: warnings.WarningMessage) -> str:
    """Where a warning points: at the one who called, or inside."""
    return "caller" if one.filename == __file__ else "inside"


def seed(number: int) -> None:
    """Every generator at one place."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 (what others draw from)
    random.seed(number)


@dataclass(frozen=True)
class Case:
    """A model with its data, and what is done with it.

    Attributes:
        model: in evaluation mode.
        batches: to calibrate and search on.
        held_out: to measure on.
        options: precisions.
        estimators: names; the first table is solved, calibrated and saved.
        solvers: names.
        bits: average bits of the budget.
        layers: keywords of `mps.layers`.
        searched: keywords of `mps.search`; None: no search.
        exporters: names.
        more: further work.
    """

    model: nn.Module
    batches: list[Any]
    held_out: list[Any]
    estimators: Sequence[str]
    solvers: Sequence[str] = ("exact",)
    options: str = "w2 w3 w4 w8"
    bits: float = 4.0
    layers: Mapping[str, Any] = field(default_factory=dict)
    searched: Mapping[str, Any] | None = field(default_factory=lambda: {"effort": "fast"})
    exporters: Sequence[str] = ()
    more: Callable[["Case", Record, "Found"], None] | None = None

    @property
    def precisions(self) -> Sequence[mps.Precision]:
        """The options."""
        return mps.precisions(self.options)

    @property
    def budget(self) -> mps.Budget:
        """The usual budget."""
        return mps.Budget(average_bits=self.bits)

    def profile(self, estimator: Any, found: Sequence[mps.Layer], **keywords: Any) -> Any:
        """A table of this model."""
        return mps.profile(
            self.model, self.batches, estimator, self.precisions, layers=found, progress=False, **keywords
        )


@dataclass(frozen=True)
class Found:
    """What later work goes on from: decisions, a table, a plan."""

    layers: Sequence[mps.Layer]
    table: mps.CostTable
    plan: mps.Plan


def work(case: Case, record: Record) -> None:
    """All that is done with every model."""
    before = canonical(case.model)
    found = record.keep("layers", mps.layers, case.model, case.batches[0], **case.layers)
    first = profiles(case, record, found)
    files_of_tables(record, first)
    solution = solves(case, record, first)
    fronts(record, first)
    start = Found(found, first, solution.plan)
    measurements(case, record, start)
    if case.searched is not None:
        searches(case, record, found)
    exports(case, record, case.exporters, solution.plan)
    if case.more is not None:
        case.more(case, record, start)
    record.results["model unchanged"] = {"result": before == canonical(case.model)}


def estimator(name: str) -> Any:
    """A short-running estimator by its name."""
    return sensitivity.ESTIMATORS[name](**SHORT.get(name, {}))


def profiles(case: Case, record: Record, found: Sequence[mps.Layer]) -> mps.CostTable:
    """A table of every estimator alone, and the first three in one run; returns the first table."""
    tables = [record.keep(f"profile {name}", case.profile, estimator(name), found) for name in case.estimators]
    together = [estimator(name) for name in case.estimators[:3]]
    record.keep("profile three at once", case.profile, together, found)
    return tables[0]


def files_of_tables(record: Record, table: mps.CostTable) -> None:
    """CSV and NPZ, and what is loaded from them."""
    for ending in ("csv", "npz"):
        path = f"table.{ending}"
        record.keep(f"table {ending}", lambda path=path: (without_times(table).save(path), file(path)))
        record.keep(f"table {ending} loaded", mps.CostTable.load, path)


def solves(case: Case, record: Record, table: mps.CostTable) -> mps.Solution:
    """Every solver of the case at several budgets; returns the optimum, and keeps its plan's file."""
    best = record.keep("solve", mps.solve, table, case.budget)
    amounts = {name: middle(mps.pareto(table, name)) for name in ("memory_bytes", "bitops")}
    budgets = {
        "bits": case.budget,
        "bytes and operations": mps.Budget(**amounts),
        "none fits": mps.Budget(average_bits=0.5),
    }
    for name in case.solvers:
        for title, budget in budgets.items():
            record.keep(f"solve {name}, {title}", mps.solve, table, budget, solvers.SOLVERS[name]())
    band = mps.Budget(average_bits=(case.bits - 0.5, case.bits))
    record.keep("solve, a band, top 3", mps.solve, table, band, top=3)
    least = mps.Budget(sensitivity=2 * best.sensitivity)
    record.keep("solve, least bytes", mps.solve, table, least, minimize="memory_bytes")
    record.keep("tie prices", mps.tie_prices, table, case.budget)
    record.keep("plan file", lambda: (best.plan.save("plan.json"), file("plan.json"), mps.Plan.load("plan.json")))
    return best


def middle(front: mps.Front) -> float:
    """An amount that every second plan of a front keeps."""
    return math.ceil(front.usage[len(front) // 2])


def fronts(record: Record, table: mps.CostTable) -> None:
    """The front in every way, and a point of it."""
    front = record.keep("pareto", mps.pareto, table, "memory_bytes")
    record.keep("pareto at", front.at, middle(front))
    record.keep("pareto epsilon", mps.pareto, table, "memory_bytes", method="epsilon", epsilon=0.05)
    record.keep("pareto hull", mps.pareto, table, "average_bits", method="hull")
    record.keep("pareto sweep", mps.pareto, table, "memory_bytes", solver=solvers.Greedy(), points=6)


def some_plans(start: Found) -> list[mps.Plan]:
    """The plan, uniform precisions, and three that go round the precisions."""
    options = start.table.precisions
    uniform = [in_turn(start.layers, [option]) for option in options]
    return [start.plan, *uniform, *(in_turn(start.layers, options, shift) for shift in range(3))]


def in_turn(layers: Sequence[mps.Layer], options: Sequence[mps.Precision], shift: int = 0) -> mps.Plan:
    """Each layer, or group, at the next precision."""
    titles = dict.fromkeys(one.group or one.name for one in layers)
    chosen = {title: options[(number + shift) % len(options)] for number, title in enumerate(titles)}
    return mps.Plan({one.name: chosen[one.group or one.name] for one in layers})


def measurements(case: Case, record: Record, start: Found) -> None:
    """Damage of one plan and of several, and the table in their unit."""
    quiet = {"progress": False}
    record.keep("evaluate", mps.evaluate, case.model, case.held_out, start.plan, **quiet)
    min_max = export.MinMax()
    record.keep("evaluate, min-max", mps.evaluate, case.model, case.held_out, start.plan, quantizer=min_max, **quiet)
    measured = record.keep("measure plans", mps.measure_plans, case.model, case.held_out, some_plans(start), **quiet)
    record.keep("calibrate", mps.calibrate, start.table, measured)
    record.keep("calibrate per precision", mps.calibrate, start.table, measured, per_precision=True)


def searches(case: Case, record: Record, found: Sequence[mps.Layer]) -> None:
    """A search, its folder, and one that goes on from it."""
    settings = {"layers": found, "progress": False, **(case.searched or {})}
    budget = None if {"tolerance", "front"} & settings.keys() else case.budget
    search = functools.partial(mps.search, case.model, case.batches, budget, case.precisions, **settings)
    result = record.keep("search", search)
    record.keep("search folder", saved_search, result, "search")
    record.keep("search, free", search, previous=result)


def exports(case: Case, record: Record, names: Sequence[str], plan: mps.Plan, **options: Any) -> None:
    """Plans in the hands of tools, moved to what they can; a tool that is not installed is a line."""
    for name in names:
        record.keep(f"export {name}", exported, case, name, plan, **options)
        if name in imports.IMPORTERS and name != "nncf":  # which is read from OpenVINO's files
            record.keep(f"import {name}", imports.import_plan, written(name), name, case.model)


def verifications(case: Case, record: Record, names: Sequence[str], plan: mps.Plan) -> None:
    """Plans carried out by the tools that are there, and read back."""
    for name in names:
        moved = record.keep(f"snapped {name}", export.snapped, plan, case.model, name)
        wants = "example" in inspect.signature(export.EXPORTERS[name]).parameters
        given = {"example": case.batches[0]} if wants else {}
        record.keep(f"verify {name}", export.verify, moved.plan, case.model, name, **given)


def exported(case: Case, name: str, plan: mps.Plan, **options: Any) -> Any:
    """What an exporter returns, and what it writes."""
    exporter = export.EXPORTERS[name]
    accepted = inspect.signature(exporter).parameters
    given = {"example": case.batches[0], "snap": True}
    used = {key: one for key, one in given.items() if key in accepted} | options
    returned = canonical(exporter(plan, case.model, path=written(name), **used))
    return {"returned": returned, "files": file(written(name)) if written(name).exists() else None}


def written(name: str) -> Path:
    """Where an exporter writes."""
    endings = {"hqq": ".pt", "brevitas": ".pt", "onnxruntime": ".onnx", "onnxruntime-static": ".onnx", "pt2e": ".pt2"}
    return Path(f"{name}{endings.get(name, '.json')}")


# --- the models ---------------------------------------------------------------------------------------------------------------------------


def images(count: int, size: int, channels: int = 3, classes: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Batches of 8 noisy images that have their class in their mean, with the labels."""
    labels = torch.arange(count) % classes
    x = torch.randn(count, channels, size, size) + (labels / classes)[:, None, None, None]
    return list(zip(x.split(8), labels.split(8), strict=True))


def tokens(count: int, length: int, vocabulary: int) -> list[Tensor]:
    """Batches of 8 lines of tokens."""
    return list(torch.randint(0, vocabulary, (count, length)).split(8))


def settled(model: nn.Module, batches: Sequence[Any]) -> nn.Module:
    """A model whose batch norms have seen the data."""
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch[0])
    return model.eval()


def mlp() -> Case:
    """The smallest one, on which everything is tried: all estimators and solvers, a search with the default effort, exporters."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).eval()
    labels = torch.arange(96) % 10
    data = list(zip((torch.randn(96, 32) + labels[:, None] / 4).split(16), labels.split(16), strict=True))
    names = list(sensitivity.ESTIMATORS)
    for_language_models = ("gguf", "llama-quantize", "gptqmodel", "auto-round", "quanto")
    tools = [name for name in export.EXPORTERS if name not in for_language_models]
    return Case(
        model,
        data[:4],
        data[4:],
        names,
        list(solvers.SOLVERS),
        options="w2 w3 w4 w8 w16",
        searched={"effort": "default"},
        exporters=tools,
        more=more_of_the_mlp,
    )


def more_of_the_mlp(case: Case, record: Record, start: Found) -> None:
    """Doors that one model is enough for."""
    proxies(case, record, start)
    interactions(case, record, start)
    quantizers(case, record, start)
    metrics(case, record, start)
    numbers(case, record, start)
    pictures(case, record, start)
    refusals(case, record, start)
    commands(record)
    tools = ("torchao", "compressed-tensors", "onnxruntime", "hqq", "mlx", "brevitas")
    verifications(case, record, tools, in_turn(start.layers, mps.precisions("w4g32 w8g32")))
    record.keep("distill data", mps.distill_data, case.model, (32,), num_samples=8, progress=False)
    fisher = sensitivity.Fisher(draws=2)
    record.keep("forecast", told_passes, case, fisher)
    for turn in ("first", "second"):
        kept = sensitivity.KLDivergence()
        record.keep(f"profile with a checkpoint, {turn}", case.profile, kept, start.layers, checkpoint="kept.db")


def told_passes(case: Case, estimator: Any) -> Passes:
    """Of a forecast what is the same in every run."""
    told = mps.forecast(case.model, case.batches, estimator, case.precisions)
    return Passes(told.forward, told.backward)


def proxies(case: Case, record: Record, start: Found) -> None:
    """A tiny evolution, the file of what it finds, and the table of that."""
    measured = mps.measure_plans(case.model, case.held_out, some_plans(start), progress=False)
    truth = mps.ProxyTruth(case.model, case.batches, measured)
    settings = mps.ProxyEvolution(generations=2, population=6)
    proxy = record.keep("evolve proxy", mps.evolve_proxy, truth, settings, num_samples=1, progress=False)
    record.keep("proxy file", lambda: (proxy.save("proxy.json"), file("proxy.json")))
    record.keep("profile evolved proxy", case.profile, proxy, start.layers)


def interactions(case: Case, record: Record, start: Found) -> None:
    """A table with pairs of cells, by the solvers that take them."""
    table = case.profile(sensitivity.HessianAugmented(), start.layers)
    for name in ("ilp", "annealing", "brute-force", "greedy"):
        record.keep(f"solve pairs {name}", mps.solve, table, case.budget, solvers.SOLVERS[name]())
    record.keep("pareto pairs", mps.pareto, table, "memory_bytes", points=4)
    record.keep("table of pairs csv", lambda: (without_times(table).save("pairs.csv"), file("pairs.csv")))


def halves(weight: Tensor, precision: mps.Precision) -> Tensor:
    """A quantizer of one's own."""
    step = weight.abs().amax() / 2 ** (precision.weight_bits - 1)
    return (weight / step).round() * step


def quantizers(case: Case, record: Record, start: Found) -> None:
    """Other ways to round: of one's own, and the default one with its settings changed."""
    default = inspect.signature(export.compressed_tensors).parameters["quantizer"].default
    ways = {
        "own": halves,
        "min-max": export.MinMax(symmetric=True),
        "asymmetric": dataclasses.replace(default, symmetric=False),
        "scale max": dataclasses.replace(default, scale="max"),
    }
    formats = "w3 w4g16 wnf4 wfp8_e4m3 wmxfp4 wnvfp4 wq4_0 wq8_0 wbfp6 w4a8"
    for name, way in ways.items():
        record.keep(f"profile, {name}", case.profile, sensitivity.OutputMSE(), start.layers, quantizer=way)
    for text in formats.split():
        one = mps.Plan(dict.fromkeys(start.plan, mps.Precision.parse(text)))
        record.keep(f"evaluate {text}", mps.evaluate, case.model, case.held_out, one, progress=False)
        symmetric = dataclasses.replace(default, symmetric=False)
        keywords = {"quantizer": symmetric, "progress": False}
        record.keep(f"evaluate {text}, asymmetric", mps.evaluate, case.model, case.held_out, one, **keywords)


def numbers(case: Case, record: Record, start: Found) -> None:
    """Other types of numbers, batches in other forms, and a wrapped model."""
    kinds = [sensitivity.KLDivergence(), sensitivity.FisherProjection(), sensitivity.RelativeWeightError()]
    for dtype in (torch.float64, torch.bfloat16):
        model = copy.deepcopy(case.model).to(dtype)
        data = [(x.to(dtype), labels) for x, labels in case.batches]
        record.keep(f"layers in {dtype}", mps.layers, model, data[0])
        record.keep(f"profile in {dtype}", mps.profile, model, data, kinds, case.precisions, progress=False)
        record.keep(f"evaluate in {dtype}", mps.evaluate, model, data, start.plan, progress=False)
    bare = [x for x, _ in case.batches]
    record.keep("profile without labels", mps.profile, case.model, bare, kinds, case.precisions, progress=False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(bare)), batch_size=24)
    record.keep("evaluate a loader", mps.evaluate, case.model, loader, start.plan, progress=False)
    wrapped = nn.DataParallel(case.model)
    record.keep("layers of a wrapped model", mps.layers, wrapped, bare[0])
    record.keep("evaluate a wrapped model", mps.evaluate, wrapped, case.held_out, start.plan, progress=False)


def refusals(case: Case, record: Record, start: Found) -> None:
    """What is said of mistakes."""
    model, data, plan = case.model, case.batches, start.plan
    record.keep("refused: a layer", mps.evaluate, model, data, mps.Plan({"00": mps.Precision("4")}), progress=False)
    record.keep("refused: a target", mps.layers, model, data[0], target="torchoa")
    record.keep("refused: a pattern", mps.layers, model, data[0], exclude=["encoder.*"])
    record.keep("refused: a metric", mps.evaluate, model, data, plan, metric="kll", progress=False)
    record.keep("refused: a precision", mps.precisions, "w4 w99")
    record.keep("refused: a resource", mps.solve, start.table, mps.Budget(memory=1e6))
    record.keep("refused: a file", mps.CostTable.load, "plan.json")
    record.keep("refused: no data", case.profile, sensitivity.Fisher(), [])
    record.keep("refused: too few samples", mps.search, model, data[0][0][:2], case.budget, case.precisions)


def squares(output: Tensor, reference: Tensor, _batch: Any) -> Tensor:
    """A metric of one's own."""
    return (output - reference).square().mean(1)


def metrics(case: Case, record: Record, start: Found) -> None:
    """Everything that can be measured, and tables that go by it."""
    names = ("kl", "mse", "relative-error", "psnr", "cosine", "loss", "accuracy", squares)
    for name in names:
        title = name if isinstance(name, str) else "a function"
        keywords = {"metric": name, "progress": False}
        record.keep(f"evaluate {title}", mps.evaluate, case.model, case.held_out, start.plan, **keywords)
        if isinstance(name, str) and name != "accuracy":
            for kind in (sensitivity.OutputDamage(), sensitivity.FisherProjection()):
                record.keep(f"profile {type(kind).__name__}, {name}", case.profile, kind, start.layers, metric=name)


def pictures(case: Case, record: Record, start: Found) -> None:
    """Pictures and the page of a search."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "0"
    settings = {"max_passes": 40, "front": True, "layers": start.layers, "progress": False}
    result = mps.search(case.model, case.batches, None, case.precisions, **settings)
    result = clean(result)
    evaluation = mps.evaluate(case.model, case.held_out, start.plan, progress=False)
    pages = {"table": start.table, "plan": start.plan, "result": result, "evaluation": evaluation}
    for name, one in {**pages, "front": mps.pareto(start.table)}.items():
        record.keep(f"page of {name}", one._repr_html_)
    record.keep("report", lambda: (result.report("report.html"), file("report.html"))[1])
    draw = {
        "table": start.table.plot,
        "plan": functools.partial(start.plan.plot, layers=start.layers),
        "front": mps.pareto(start.table).plot,
    }
    for kind in ("front", "plan", "sensitivity", "usage", "agreement", "prediction"):
        draw[f"search, {kind}"] = functools.partial(result.plot, kind=kind)
    for name, function in draw.items():
        record.keep(f"picture of {name}", lambda function=function: (function("picture.png"), file("picture.png"))[1])


def commands(record: Record) -> None:
    """The command line, on the files that are there."""
    here = os.path.abspath(__file__)
    model, data = f"{here}:mlp_model", f"{here}:mlp_batches"
    options = "--precisions 'w2 w4 w8'"
    lines = {
        "solve": "solve table.csv --budget average_bits=4 -o by_command.json",
        "pareto": "pareto table.csv --over memory_bytes --json",
        "show table": "show table.csv",
        "show plan": "show by_command.json",
        "show model": f"show {model} --data {data} --target torchao {options}",
        "compare": "compare table.csv table.npz",
        "export": f"export by_command.json --to torchao --snap --model {model} -o torchao.json",
        "import": f"import gptqmodel.json --from gptqmodel --model {model} -o imported.json",
        "profile": f"profile {model} --data {data} --estimator fisher {options} --option draws=2 -o by_command.csv",
        "evaluate": f"evaluate {model} --data {data} --plan by_command.json --json",
        "search": f"search {model} --data {data} --budget average_bits=4 {options} --effort fast -o found",
        "show result": "show found/plan.json",
        "report": "report found -o found.html",
        "refuses": "solve table.csv --budget average_bits=0.1",
    }
    export.gptqmodel(mps.Plan({"0": mps.Precision("4", "16", 32)}), path="gptqmodel.json")
    for name, line in lines.items():
        record.keep(f"command {name}", command, shlex.split(line))


def command(words: Sequence[str]) -> Any:
    """What a command prints, and how it ends."""
    done = subprocess.run([sys.executable, "-P", "-m", "mpsearch", *words], capture_output=True, text=True, check=False)
    return [done.returncode, done.stdout.split("\n"), done.stderr.split("\n")]


def mlp_model() -> nn.Module:
    """For the command line."""
    seed(0)
    return mlp().model


def mlp_batches() -> list[Any]:
    """For the command line."""
    seed(0)
    return mlp().batches


def convolutions() -> Case:
    """Convolutions and batch norm, with inputs of 8 bits; the least memory within a tolerance."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, 2, 1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 6),
    )
    data = images(64, 10)
    return Case(
        settled(model, data),
        data[:6],
        data[6:],
        [*MEASURED, *RELEVANT, *CURVED, *OF_WEIGHTS],
        ["bisection", "brute-force", "dynamic-programming", "evolutionary", "ilp"],
        options="w2a8 w4a8 w8a8 w4 w8",
        searched={"max_passes": 25, "tolerance": 0.02},
        exporters=["pt2e", "brevitas", "mct", "aimet", "modelopt", "neutral"],
        more=more_of_the_convolutions,
    )


def more_of_the_convolutions(case: Case, record: Record, start: Found) -> None:
    """Data from batch norms, and a table with it."""
    settings = {"num_samples": 16, "batch_size": 16, "iterations": 5, "progress": False}
    made = record.keep("distill data", mps.distill_data, case.model, (3, 10, 10), **settings)
    keywords = {"layers": start.layers, "progress": False}
    kl = sensitivity.KLDivergence()
    record.keep("profile distilled data", mps.profile, case.model, made, kl, case.precisions, **keywords)
    verifications(case, record, ["pt2e", "brevitas"], in_turn(start.layers, mps.precisions("w4a8 w8a8 w8")))


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def residual_net() -> Case:
    """A ResNet in small: a whole measured curve, every resource, tied residuals."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1),
        Residual(8, 8),
        Residual(8, 12),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 6),
    )
    data = images(64, 8)
    return Case(
        settled(model, data),
        data[:6],
        data[6:],
        [*SWEPT, *PROXIES, *CURVED],
        ["bisection", "annealing", "greedy"],
        options="w2 w3 w4 w8 w8a8 w16",
        searched={"max_passes": 20, "front": True},
        more=more_of_the_residual_net,
    )


def more_of_the_residual_net(case: Case, record: Record, start: Found) -> None:
    """Decisions in other groups, and a table of every resource that is the same on each machine."""
    example = case.batches[0]
    record.keep("layers, residuals tied", mps.layers, case.model, example, tie_residuals=True)
    record.keep("layers, groups of one's own", mps.layers, case.model, example, groups={"first": ["0", "1.*"]})
    record.keep(
        "layers, excluded", mps.layers, case.model, example, exclude=["5"], allow={"1.*": "w8"}, fixed={"0": "w8"}
    )
    for target in export.TARGETS:
        record.keep(f"layers, {target}", mps.layers, case.model, example, target=target)
    columns = {
        "memory_bytes": resources.MemoryBytes(),
        "bitops": resources.BitOps(),
        "activation_bytes": resources.ActivationBytes(),
        "energy_j": resources.Energy(),
        **{f"{name.replace('-', '_')}_s": resources.Roofline(name) for name in resources.DEVICES},
    }
    error = sensitivity.RelativeWeightError()
    table = record.keep("profile, every resource", case.profile, error, start.layers, resources=columns)
    budget = mps.Budget(activation_bytes="97%", energy_j="80%")
    record.keep("solve, a peak", mps.solve, table, budget)
    record.keep("pareto, several", mps.pareto, table, ["memory_bytes", "bitops"])
    record.keep("table of every resource", lambda: (without_times(table).save("all.csv"), file("all.csv")))


class Inverted(nn.Module):
    """Widen, filter each channel, narrow."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        width = 3 * inputs
        self.widen = nn.Sequential(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
        filters = nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False)
        self.filter = nn.Sequential(filters, nn.BatchNorm2d(width), nn.Hardswish())
        self.narrow = nn.Sequential(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.squeeze = nn.Sequential(nn.Conv2d(outputs, 4, 1), nn.ReLU(), nn.Conv2d(4, outputs, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(self.filter(self.widen(x)))
        y = y * self.squeeze(y.mean((2, 3), keepdim=True))
        return x + y if x.shape == y.shape else y


def depthwise_net() -> Case:
    """Depthwise convolutions and gates, with 0/1 labels that do not exclude each other."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), Inverted(6, 6), Inverted(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    data = [(x, ((labels[:, None] + torch.arange(5)) % 3 == 0).float()) for x, labels in images(64, 12)]
    return Case(
        settled(model, data),
        data[:6],
        data[6:],
        [*MEASURED[1:5], *OF_WEIGHTS, *PROXIES, "fisher-projection", "empirical-fisher", "hessian-augmented"],
        ["greedy", "evolutionary"],
        searched={"effort": "fast", "quantizer": export.MinMax()},
        options="w3 w4 w6 w8",
        bits=5.0,
    )


class Encoder(nn.Module):
    """A block of a vision transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """Patches, a class token, two blocks."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, 5, width))
        self.blocks = nn.Sequential(Encoder(width), Encoder(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def vision_transformer() -> Case:
    """`nn.MultiheadAttention` taken apart; relevance."""
    data = images(64, 8)
    return Case(
        VisionTransformer().eval(),
        data[:6],
        data[6:],
        [*RELEVANT, *SWEPT, *CURVED, *PROXIES, "kl-divergence"],
        ["annealing", "exact"],
        searched={"max_passes": 20},
        exporters=["neutral"],
        more=more_of_the_vision_transformer,
    )


def more_of_the_vision_transformer(case: Case, record: Record, start: Found) -> None:
    """Attention as one module, as tools see it, and relevance by other rules."""
    for target in export.TARGETS:
        record.keep(f"layers, {target}", mps.layers, case.model, case.batches[0], target=target)
    found = mps.layers(case.model, case.batches[0], target="torchao", exclude=["patch"])
    exports(case, record, ["torchao"], in_turn(found, mps.precisions("w8")))
    for rule in ("gamma", "alpha-beta"):
        record.keep(f"profile lrp, {rule}", case.profile, sensitivity.LRP(linear=rule, convolution=rule), start.layers)


class CausalAttention(nn.Module):
    """Keys and values of one head for two heads of queries, through modules for the cache."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, size, bias=False) for size in (width, width // 2, width // 2, width)
        )
        self.k_cache, self.v_cache = mps.KVCache(), mps.KVCache()

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = self.k_cache(self.k_proj(x)[:, None]), self.v_cache(self.v_proj(x)[:, None])
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        return self.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self, width: int = 16, vocabulary: int = 23) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(CausalAttention(width) for _ in range(2))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


def decoder() -> Case:
    """A language model with a tied head, its keys and values decided on too, fused groups."""
    data = [(ids, ids.roll(-1, 1)) for ids in tokens(48, 9, 23)]
    return Case(
        Decoder().eval(),
        data[:4],
        data[4:],
        [one for one in MEASURED if one not in ("layer-output-error", "masked-kl", "linearity-coefficients")],
        ["dynamic-programming", "ilp"],
        layers={"kv_cache": True, "groups": "fused"},
        more=more_of_the_decoder,
    )


def more_of_the_decoder(case: Case, record: Record, start: Found) -> None:
    """The cache in the same memory as the weights, and decisions without it."""
    cache = resources.KVCacheBytes(context=64, batch=2)
    columns = {"memory_bytes": resources.Total((resources.MemoryBytes(), cache)), "kv_cache_bytes": cache}
    kl = sensitivity.KLDivergence()
    table = record.keep("profile, one memory", case.profile, kl, start.layers, resources=columns)
    record.keep("solve, one memory", mps.solve, table, mps.Budget(memory_bytes="35%"))
    record.keep("pareto, one memory", mps.pareto, table)
    found = record.keep("layers, weights alone", mps.layers, case.model, case.batches[0])
    for name in (*SWEPT[1:], *CURVED, *RELEVANT, *OF_WEIGHTS, *PROXIES):
        record.keep(f"profile {name}, weights alone", case.profile, estimator(name), found)


def transformers() -> Any:
    """The package; a model of it is skipped where it is missing."""
    import transformers as package

    package.logging.set_verbosity_error()
    return package


def sizes() -> dict[str, int]:
    """Of the two models of transformers."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64, **heads}


def llama() -> Case:
    """A Llama of transformers under the groups of vLLM, whose ties have a price; tools for language models."""
    package = transformers()
    model = package.LlamaForCausalLM(package.LlamaConfig(**sizes(), max_position_embeddings=64)).eval()
    data = [{"input_ids": ids, "labels": ids} for ids in tokens(40, 8, 64)]
    return Case(
        model,
        data[:3],
        data[3:],
        [*SWEPT, "kl-divergence", "relative-weight-error", "lrp", "salience-groups", "layer-output-error"],
        ["exact"],
        options="w4 w8 w4g32 w16",
        bits=7.0,
        layers={"target": "compressed-tensors", "exclude": ["model.embed_tokens"]},
        exporters=["compressed-tensors", "torchao", "exllamav3", "hqq", "mlx", "llm-compressor"],
        more=more_of_the_llama,
    )


def more_of_the_llama(case: Case, record: Record, start: Found) -> None:
    """Its caches, a plan of GGUF types in its file, and what it is to each tool."""
    example = case.batches[0]
    record.keep("layers, caches", mps.layers, case.model, example, kv_cache=True, groups="fused")
    for target in ("vllm", *export.TARGETS):
        record.keep(f"layers, {target}", mps.layers, case.model, example, target=target)
    names = [name for name, one in case.model.named_modules() if isinstance(one, nn.Linear | nn.Embedding)]
    types = mps.precisions("wq8_0 wq4_0 wq5_1 wiq4_nl")
    plan = mps.Plan({name: types[place % len(types)] for place, name in enumerate(names)})
    exports(case, record, ["gguf", "llama-quantize"], plan)
    verifications(case, record, ["gguf"], plan)
    grouped = in_turn(start.layers, mps.precisions("w4g32 w8g32"))
    exports(case, record, ["gptqmodel", "modelopt", "nncf"], grouped)
    blocks = [one for one in start.layers if one.name != "lm_head"]
    exports(case, record, ["auto-round"], in_turn(blocks, mps.precisions("w4g32 w8g32")))
    verifications(case, record, ["compressed-tensors", "torchao"], grouped)
    exports(case, record, ["quanto"], in_turn(start.layers, mps.precisions("w8 w16")))
    exports(case, record, ["bitsandbytes"], in_turn(start.layers, mps.precisions("wnf4 w16")))
    record.keep("import exllamav2", exllamav2, case)
    bare = [batch["input_ids"] for batch in case.held_out]
    pairs = [(ids, torch.ones_like(ids)) for ids in bare]
    record.keep("evaluate ids", mps.evaluate, case.model, bare, start.plan, progress=False)
    record.keep("evaluate ids and mask", mps.evaluate, case.model, pairs, start.plan, progress=False)
    record.keep("evaluate loss", mps.evaluate, case.model, case.held_out, start.plan, metric="loss", progress=False)
    record.keep("evaluate gguf", mps.evaluate, case.model, case.held_out, plan, progress=False)


def exllamav2(case: Case) -> mps.CostTable:
    """The table of a measurement such as ExLlamaV2 writes."""
    one = {"group_size": {"4": 32, "3": 32}, "bits": [4, 3], "bits_prop": [0.25, 0.75], "scale_bits": 4}
    parts = {f"{name}_proj": one for name in "qkvo"}
    choices = [{"accuracy": 1 - 0.1 / bits, "total_bits": 900 * bits, **parts} for bits in (3, 4)]
    places = [f"model.layers.{number}.self_attn" for number in range(2)]
    Path("measurement.json").write_text(
        json.dumps({"measurement": dict.fromkeys(places, choices), "last_module_idx": 2})
    )
    return imports.import_table("measurement.json", "exllamav2", case.model)


def experts() -> Case:
    """A Mixtral of transformers: experts in one tensor, each a decision; a router."""
    package = transformers()
    config = package.MixtralConfig(**sizes(), num_local_experts=4, max_position_embeddings=64)
    data = tokens(40, 8, 64)
    return Case(
        package.MixtralForCausalLM(config).eval(),
        data[:3],
        data[3:],
        ["fisher-projection", "kl-divergence", "qe"],
        ["dynamic-programming", "greedy"],
        options="w2 w4 w8",
        layers={"exclude": ["model.embed_tokens"]},
        searched=None,
        exporters=["modelopt", "neutral"],
        more=more_of_the_experts,
    )


def more_of_the_experts(case: Case, record: Record, start: Found) -> None:
    """Whole blocks, routers, and the search by blocks."""
    example = case.batches[0]
    found = record.keep("layers, blocks", mps.layers, case.model, example, experts="block", decide_routers=True)
    record.keep("profile, blocks", case.profile, sensitivity.FisherProjection(), found)
    settings = {"layers": found, "effort": "fast", "progress": False}
    record.keep("search", mps.search, case.model, case.batches, case.budget, case.precisions, **settings)
    for target in ("gguf", "vllm", "compressed-tensors", "torchao"):
        record.keep(f"layers, {target}", mps.layers, case.model, example, target=target)
    tools = ["compressed-tensors", "llm-compressor", "gptqmodel"]
    exports(case, record, tools, in_turn(start.layers, mps.precisions("w8")))
    named = mps.layers(case.model, example, target="gguf")
    exports(case, record, ["gguf"], in_turn(named, mps.precisions("wq8_0")))


class Recurrent(nn.Module):
    """An embedding, an LSTM and a GRU cell, matrices that functions read, and experts in one tensor of its own layout."""

    def __init__(self, width: int = 12, classes: int = 4) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(19, width), nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.cell = nn.GRUCell(2 * width, width)
        self.mix = nn.Parameter(torch.randn(width, width) / math.sqrt(width))
        self.bank = nn.Parameter(torch.randn(3, width, width) / math.sqrt(width))
        self.head = nn.Parameter(torch.randn(classes, width))

    def forward(self, ids: Tensor) -> Tensor:
        x, _ = self.lstm(self.embed(ids))
        state = x.new_zeros(len(x), self.cell.hidden_size)
        for step in x.unbind(1):
            state = self.cell(step, state)
        state = torch.tanh(state @ self.mix)
        state = torch.einsum("bi,kij->bkj", state, self.bank).relu().mean(1)
        return F.linear(state, self.head)


def recurrent() -> Case:
    """Recurrent layers and bare matrices."""
    ids = tokens(48, 6, 19)
    data = [(x, x.sum(1) % 4) for x in ids]
    return Case(
        Recurrent().eval(),
        data[:4],
        data[4:],
        ["kl-divergence", "task-metric", *SWEPT[:3], *SWEPT[4:], *OF_WEIGHTS, "hessian-trace", "snip", "grasp", "emq"],
        ["annealing", "bisection"],
        searched={"effort": "fast", "metric": "loss"},
    )


class UNet(nn.Module):
    """A denoiser: time steps, a skip that is concatenated, a transposed convolution; images in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Embedding(10, 8)
        self.start, self.end = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(8, 3, 3, 1, 1)
        self.time, self.down, self.up = nn.Linear(8, 8), nn.Conv2d(4, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.norm, self.inner = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, 1, 1)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        outer = self.start(images)
        inner = self.down(F.silu(outer)) + self.time(self.steps(time))[:, :, None, None]
        inner = inner + self.inner(F.silu(self.norm(inner)))
        return self.end(torch.cat([outer, self.up(inner)], 1))


def unet() -> Case:
    """Numbers out: damage by the relative error and other metrics."""
    data = [{"images": x, "time": torch.arange(8), "labels": x / 2} for x, _ in images(64, 8)]
    return Case(
        UNet().eval(),
        data[:6],
        data[6:],
        [*MEASURED[1:5], *MEASURED[7:], *SWEPT[:3], *SWEPT[4:], *CURVED],
        ["greedy", "exact"],
        searched={"max_passes": 40, "estimators": [sensitivity.OutputDamage(), sensitivity.Fisher()]},
        more=more_of_the_unet,
    )


def more_of_the_unet(case: Case, record: Record, start: Found) -> None:
    """Other metrics of images."""
    for name in ("mse", "psnr", "cosine"):
        keywords = {"metric": name, "progress": False}
        record.keep(f"evaluate {name}", mps.evaluate, case.model, case.held_out, start.plan, **keywords)
        record.keep(f"profile, {name}", case.profile, sensitivity.OutputDamage(), start.layers, metric=name)


def cases() -> dict[str, Callable[[], Case]]:
    """Name -> the model with its work."""
    return {
        "mlp": mlp,
        "convolutions": convolutions,
        "residual": residual_net,
        "depthwise": depthwise_net,
        "vit": vision_transformer,
        "decoder": decoder,
        "llama": llama,
        "experts": experts,
        "recurrent": recurrent,
        "unet": unet,
    }


# --- one checkout -------------------------------------------------------------------------------------------------------------------------


def run(only: str, path: Path) -> None:
    """Do the work with the mpsearch that is imported, in the current folder, and write the results."""
    torch.set_num_threads(1)
    checkout = Path(os.environ["COMPARED_CHECKOUT"])
    if checkout not in Path(mps.__file__).resolve().parents:
        sys.exit(f"{mps.__file__} was imported, which is not of {checkout}")
    results: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for name, build in cases().items():
        if not fnmatch.fnmatchcase(name, only):
            continue
        start = time.perf_counter()
        folder = Path(name)
        folder.mkdir()
        record = Record()
        try:
            in_folder(folder, build, record)
        except Exception as error:  # what came before may have raised, and returned nothing
            if isinstance(error, ModuleNotFoundError) and error.name == "transformers":
                skipped[name] = str(error)
                print(f"{name}: skipped, {error}", file=sys.stderr)
                continue
            traceback.print_exc()
            record.results["stopped"] = {"raised": f"{type(error).__name__}: {plain(str(error))}"}
        results[name] = record.results
        seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{name}: {len(record.results)} results, {seconds[name]} s", file=sys.stderr)
    path.write_text(json.dumps({"results": results, "skipped": skipped, "seconds": seconds}))


def in_folder(folder: Path, build: Callable[[], Case], record: Record) -> None:
    """The work of a case, where its files do not meet those of another."""
    back = Path.cwd()
    os.chdir(folder)
    try:
        seed(0)
        work(build(), record)
    finally:
        os.chdir(back)


def results_of(place: str, only: str) -> dict[str, Any]:
    """The results of a checkout, run in a process of its own, or those in a file."""
    if Path(place).is_file():
        return json.loads(Path(place).read_text())
    checkout = Path(place).resolve()
    if not (checkout / "mpsearch" / "__init__.py").is_file():
        sys.exit(f"{place}: neither a checkout of mpsearch nor a file of results")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "results.json").resolve()
        copied = Path(folder, "checkout").resolve()  # the checkout may change while this runs
        shutil.copytree(checkout / "mpsearch", copied / "mpsearch", ignore=shutil.ignore_patterns("__pycache__"))
        words = [sys.executable, "-P", os.path.abspath(__file__), "--run", str(path), "--only", only]
        done = subprocess.run(words, cwd=folder, env=environment(copied), check=False)
        if done.returncode:
            sys.exit(f"{place}: the work stopped with exit status {done.returncode}")
        return json.loads(path.read_text())


def environment(checkout: Path) -> dict[str, str]:
    """One thread, one order of hashes, and the checkout first."""
    return {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "PYTHONHASHSEED": "0",
        "COMPARED_CHECKOUT": str(checkout),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "MPLBACKEND": "Agg",
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "HF_HUB_OFFLINE": "1",
    }


# --- differences --------------------------------------------------------------------------------------------------------------------------


def differences(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Places where two results differ, with what is there; hashes come last, since numbers tell more."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({**old, **new}, key=lambda key: key == "hash"):
            yield from differences(old.get(key, MISSING), new.get(key, MISSING), f"{place}.{key}")
        if list(old) != list(new) and old.keys() == new.keys():
            yield f"{place} (order)", list(old), list(new)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{place}[{number}]")
    elif type(old) is not type(new) or old != new:
        yield place, old, new


#: In the place of what only the other one has.
MISSING = "(missing)"


def shown(value: Any, width: int = 60) -> str:
    """A value for the screen; numbers in decimals."""
    number = number_of(value)
    text = repr(number) if number is not None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def number_of(value: Any) -> float | None:
    """The number that a text in hexadecimals is."""
    if isinstance(value, str) and re.fullmatch(r"-?0x[01]\.[0-9a-f]+p[+-]\d+|-?inf|nan", value):
        return float.fromhex(value)
    return None


def told_difference(place: str, old: Any, new: Any) -> str:
    """One difference in words, with its size where both are numbers."""
    if isinstance(old, str) and isinstance(new, str) and number_of(old) is None:
        same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        start = max(0, same - 20)
        old, new = old[start:], new[start:]
    text = f"{place.lstrip('.')}: {shown(old)} -> {shown(new)}"
    before, after = number_of(old), number_of(new)
    if before is None or after is None or not math.isfinite(before) or not math.isfinite(after):
        return text
    return f"{text} ({(after - before) / max(abs(before), abs(after)):+.1e} of it)"


def compared(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of model, kind, `equal` or `different`, first difference."""
    rows = []
    for case in {**old["results"], **new["results"]}:
        before, after = old["results"].get(case, {}), new["results"].get(case, {})
        for kind in {**before, **after}:
            found = list(differences(before.get(kind, MISSING), after.get(kind, MISSING)))
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            rows.append(
                (case, kind, "different" if found else "equal", told_difference(*found[0]) + more if found else "")
            )
    return rows


def report(rows: Sequence[tuple[str, str, str, str]]) -> bool:
    """Print the table and a summary; True where all is equal."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in [("model", "result", "", "first difference: old -> new"), *rows]:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]).rstrip())
    odd = [row for row in rows if row[2] == "different"]
    models = len({row[0] for row in rows})
    print(f"\n{len(rows)} results of {models} models: {len(rows) - len(odd)} equal, {len(odd)} different")
    return not odd


def told_of(place: str, found: Mapping[str, Any]) -> str:
    """How many results there are, how many of them are exceptions, and what was skipped."""
    kept = [one for kinds in found["results"].values() for one in kinds.values()]
    raised = sum("raised" in one for one in kept)
    skipped = "".join(f"; {name} skipped: {reason}" for name, reason in found["skipped"].items())
    return f"{place}: {len(kept)} results, {raised} of them exceptions, {sum(found['seconds'].values()):.0f} s{skipped}"


def part_of(results: dict[str, Any], only: str) -> dict[str, Any]:
    """Results of the models that a pattern names."""
    kept = {name: one for name, one in results["results"].items() if fnmatch.fnmatchcase(name, only)}
    return {**results, "results": kept, "seconds": {name: results["seconds"][name] for name in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD", nargs="?", help="a checkout, or a file that --json wrote")
    parser.add_argument("new", metavar="NEW", nargs="?", help="the same")
    parser.add_argument("--only", metavar="PATTERN", default="*", help=f"models: {', '.join(cases())}")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results of NEW, or of the only checkout")
    parser.add_argument("--run", metavar="FILE", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run is not None:
        run(given.only, given.run)
        return
    if given.old is None or (given.new is None and given.json is None):
        parser.error("expected OLD and NEW, or one checkout and --json FILE")
    if not any(fnmatch.fnmatchcase(name, given.only) for name in cases()):
        parser.error(f"no model is called {given.only!r}; there are {', '.join(cases())}")
    found = [part_of(results_of(place, given.only), given.only) for place in (given.old, given.new) if place]
    if given.json is not None:
        given.json.write_text(json.dumps(found[-1]) + "\n")
    for place, one in zip((given.old, given.new), found, strict=False):
        print(told_of(place, one))
    if len(found) == 2 and not report(compared(*found)):
        sys.exit(1)


if __name__ == "__main__":
    main()
