"""Damaged and hostile files: what reads one takes it, or tells one line; never a traceback.

Each test draws files near to valid ones, from fixed seeds. `guided.py` drives the same tests by the branches that they reach.
"""

import contextlib
import functools
import io
import json
import os
import shutil
import sqlite3
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import mpsearch as mps
from mpsearch import cli, export
from mpsearch.checkpoints.keys import BatchKey
from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.checkpoints.values import checksum, pack
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.imports import IMPORTERS, TABLE_IMPORTERS, import_plan, import_table
from mpsearch.resources import LatencyTable
from mpsearch.sensitivity import EvolvedProxy

torch.set_num_threads(1)
PRECISIONS = mps.precisions("w2 w4 w8a8")
NUMBERS = [0, -1, 1.5, 2**53, 2**63, 10**30, 10**400, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")]
TEXTS = [
    "",
    " ",
    "x",
    "w4",
    "w99",
    "w4g0",
    "re:(",
    "a.b",
    "=1+1",
    "@x",
    "../../x",
    "/x",
    "a\nb",
    "a\x85b",
    "a\0b",
    "\x1b[2J",
    "\ud800",
    "é" * 99,
]


def nested(depth, value):
    for _ in range(depth):
        value = [value]
    return value


VALUES = [
    None,
    True,
    *NUMBERS,
    *TEXTS,
    [],
    {},
    [None],
    {"a": None},
    {"": ""},
    nested(150, 1),
    nested(700, {}),
    [[1, 2], [3]],
]
ANY = st.sampled_from(VALUES).map(lambda value: json.loads(json.dumps(value)))  # a copy
TOKENS = [
    b"",
    b'"',
    b"'",
    b",",
    b"\n",
    b"\r",
    b"\0",
    b"#",
    b"{",
    b"}",
    b"[",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"nan",
    b"1e999",
    b"9" * 5000,
]
TOKENS += [
    b"-",
    b"=",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"null",
    b"w4",
    b'"x',
    b"true",
    b"\x1b[31m",
    b"\\ud800",
]


def told(function, *args, **keywords):
    """What a function returns; None where it tells one line instead. Whatever else it raises is a bug."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **keywords)
        except (mps.MpsearchError, OSError) as error:
            line = str(error)
    assert line
    assert line.isprintable(), line
    assert len(line) < 3000, line
    return None


def run(*arguments):
    """Exit status of a command line: 0 with one JSON object alone on stdout, or one line on stderr."""
    out, err = io.StringIO(), io.StringIO()
    show = warnings.showwarning
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status = cli.main([*map(str, arguments), "--json"])
    warnings.showwarning = show
    errors = [line for line in err.getvalue().split("\n") if line.startswith("mpsearch: error:")]
    assert status in (0, 1, 2, 3), status
    assert "Traceback" not in err.getvalue()
    assert "\x1b" not in err.getvalue()
    assert len(errors) == (status != 0), err.getvalue()
    if status == 0:
        assert isinstance(json.loads(out.getvalue()), dict)
    else:
        assert not out.getvalue()
    return status


# what is damaged


@functools.cache
def table():
    layers = tuple(
        mps.Layer(name, "linear", (4, 8), macs=32, group=group) for name, group in (("a", ""), ("b.1", "g"), ("c", "g"))
    )
    rng = np.random.default_rng(0)
    return mps.CostTable(
        layers,
        PRECISIONS,
        rng.random((3, 3)).round(3) + np.array([2, 1, 0]),
        rng.random((3, 3)).round(3),
        {"memory_bytes": [[8, 16, 32]] * 3, "bitops": [[512, 1024, 2048]] * 3},
        {"memory_bytes": 12},
        {"memory_bytes": 396, "bitops": 8192},
        "nats",
        {"estimator": "KLDivergence()"},
        mps.Interactions([[0, 0], [0, 1]], [[1, 1], [2, 2]], [0.5, -0.25]),
        {"activation_peak_bytes": mps.Peak(np.ones((2, 3, 3)), [1, 2])},
    )


KEPT = tempfile.TemporaryDirectory()  # gone when the process ends


@functools.cache
def folder():
    """Everything that is read, once and valid."""
    path = Path(KEPT.name)
    table().save(path / "table.csv")
    table().save(path / "table.npz")
    plan = mps.solve(table(), mps.Budget(memory_bytes=90)).plan
    plan.save(path / "plan.json")
    uniform = tuple(mps.Plan(dict.fromkeys(plan, precision)) for precision in PRECISIONS)
    measured = MeasuredPlans(uniform, [0.5, 0.25, 0], [0.1, 0.2, 0], "nats", {"samples": 8})
    measured.save(path / "plans.csv")
    path.joinpath("latency.csv").write_text("layer,precision,latency_s\na,w2,0.5\na,w4,0.5\na,w8a8,nan\n")
    path.joinpath("proxy.json").write_text(json.dumps(PROXY))
    torch.manual_seed(0)
    batches = [(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(12)]
    result = mps.search(model(), batches, mps.Budget(average_bits=3), PRECISIONS[:2], max_passes=12, progress=False)
    result.save(path / "result")
    tools = path / "tools"
    tools.mkdir()
    chosen = mps.Plan(
        {"first": mps.Precision("3", "16", 32), "second": mps.Precision("8"), "lm_head": mps.Precision("16")}
    )
    for tool, content in {
        "compressed-tensors": export.llm_compressor(chosen)["quant_stage"]["quant_modifiers"]["QuantizationModifier"],
        "gptqmodel": export.gptqmodel(chosen),
        "modelopt": export.modelopt(chosen),
        "exllamav2": {"measurement": {"model.0.mlp": [OPTION]}},
    }.items():
        tools.joinpath(tool).write_text(json.dumps(content))
    constants = [("first", "u4", "64,2,32"), ("second", "i8", "64,64"), ("lm_head", "f32", "64,64")]
    layers = [
        f'<layer id="0" name="self.{name}.weight" type="Const"><data element_type="{kind}" shape="{shape}"/></layer>'
        for name, kind, shape in constants
    ]
    tools.joinpath("nncf").write_text(f"<net><layers>{''.join(layers)}</layers></net>")
    gguf_file(tools / "gguf")
    return path


PROXY = {"mpsearch_proxy": 1, "formula": "mean(relu(weight))", "num_samples": 8, "seed": 0, "origin": {"fitness": 0.5}}
OPTION = {"accuracy": 0.9, "total_bits": 16384, "first": {"bits": [4, 3], "bits_prop": [0.1, 0.9]}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.lm_head = (nn.Linear(64, 64) for _ in range(3))


@functools.cache
def net(tool):
    if tool == "exllamav2":
        return nn.ModuleDict({"model": nn.ModuleList([nn.ModuleDict({"mlp": Net()})])})
    return nn.ModuleDict({"output": nn.Linear(32, 4)}) if tool == "gguf" else Net()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def gguf_file(path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("output.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# how it is damaged


@st.composite
def damaged_bytes(draw, data):
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 64, len(data)])))
        middle = draw(st.sampled_from([*TOKENS, data[start:end] * 2, data[:40]]) | st.binary(max_size=8))
        data = data[:start] + middle + data[end:]
    return data


def places(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


@st.composite
def damaged_tree(draw, content):
    """JSON content with a part gone, renamed, copied, or of another kind."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 2))):
        *path, last = draw(st.sampled_from([p for p in places(content) if p] or [None])) or [None]
        if last is None:
            return draw(ANY)
        place = content
        for key in path:
            place = place[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "wrap", "add"]))
        if how == "remove":
            del place[last]
        elif how == "rename" and isinstance(place, dict):
            place[draw(st.sampled_from(TEXTS))] = place.pop(last)
        elif how == "wrap":
            place[last] = [place[last]]
        elif how == "add" and isinstance(place[last], dict):
            place[last][draw(st.sampled_from(TEXTS))] = draw(ANY)
        else:
            place[last] = draw(ANY)
    return content


def json_bytes(content):
    return json.dumps(content).encode()


def damaged_json(data):
    return damaged_tree(json.loads(data)).map(json_bytes) | damaged_bytes(data)


@st.composite
def damaged_csv(draw, data):
    """Comment lines, cells, rows and columns."""
    lines = data.decode().rstrip("\n").split("\n")
    heads = [line for line in lines if line.startswith("#")]
    rows = [line.split(",") for line in lines[len(heads) :]]
    how = draw(st.sampled_from(["head", "cell", "cell", "row", "column", "bytes"]))
    if how == "bytes":
        return draw(damaged_bytes(data))
    if how == "head" and heads:
        heads[1] = f"# {json.dumps(draw(damaged_tree(json.loads(heads[1][1:]))))}"
    row, column = draw(st.integers(0, len(rows) - 1)), draw(st.integers(0, len(rows[0]) - 1))
    if how == "cell":
        rows[row][column] = draw(st.sampled_from([*map(str, NUMBERS), *TEXTS, '"', '"x', 'x"y']))
    elif how == "row":
        rows[row : row + 1] = [rows[row]] * draw(st.sampled_from([0, 2]))
    elif how == "column":
        rows = [
            row[:column] + row[column : column + 1] * draw(st.just(0) | st.just(2)) + row[column + 1 :] for row in rows
        ]
    return "\n".join([*heads, *map(",".join, rows), ""]).encode("utf-8", "surrogatepass")


@st.composite
def damaged_npz(draw, data):
    if draw(st.booleans()):
        return draw(damaged_bytes(data))
    with np.load(io.BytesIO(data)) as archive:
        arrays = dict(archive)
    name = draw(st.sampled_from(sorted(arrays)))
    values = arrays[name]
    how = draw(st.sampled_from(["gone", "header", "kind", "shape", "value", "renamed"]))
    if how == "header":
        arrays["header"] = np.array(json.dumps(draw(damaged_tree(json.loads(str(arrays["header"]))))))
    elif how == "gone":
        del arrays[name]
    elif how == "renamed":
        arrays[draw(st.sampled_from(["x", "usage:", "usage:x", "peak:x", "interactions:x", "peak_fixed:y"]))] = (
            arrays.pop(name)
        )
    elif how == "kind":
        kind = draw(st.sampled_from(["U8", "S8", "f4", "i1", "c16", "O", "M8[s]", "?", "V4", "i4,f8"]))
        arrays[name] = np.zeros(values.shape, kind)
    elif how == "shape":
        arrays[name] = draw(
            st.sampled_from([values[None], values.reshape(-1), values.reshape(-1)[:0], values.reshape(-1)[0]])
        )
    elif values.size:
        values = values.copy().reshape(-1)
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            values[draw(st.integers(0, values.size - 1))] = draw(st.sampled_from([*NUMBERS, "", "x", "-1x4", "1e3"]))
        arrays[name] = values.reshape(arrays[name].shape)
    file = io.BytesIO()
    (np.savez_compressed if draw(st.booleans()) else np.savez)(file, **arrays)
    return file.getvalue()


@st.composite
def damaged_xml(draw, data):
    if draw(st.booleans()):
        return draw(damaged_bytes(data))
    root = ElementTree.fromstring(data)
    part = draw(st.sampled_from(list(root.iter())))
    key = draw(st.sampled_from(sorted(part.attrib) or ["x"]))
    part.attrib.pop(key, None)
    if draw(st.booleans()):
        part.set(key, draw(st.sampled_from([t for t in TEXTS if t.isprintable()] + ["1,2", "1,2,x", "1,2,-3", "i3"])))
    return ElementTree.tostring(root)


@st.composite
def damaged_database(draw, data):
    """SQL and rows that mpsearch would never write."""
    if draw(st.booleans()):
        return draw(damaged_bytes(data))
    path = Path(tempfile.mkdtemp()) / "x.db"
    path.write_bytes(data)
    file = sqlite3.connect(path)
    names = [name for (name,) in file.execute("SELECT key FROM result ORDER BY key")]
    name = draw(st.sampled_from(names))
    with file:
        how = draw(st.sampled_from(["value", "value", "sql", "identity"]))
        if how == "value":
            value = draw(
                st.sampled_from(
                    [
                        1,
                        -1.5,
                        "x",
                        None,
                        [],
                        {},
                        [1],
                        {"a": 1},
                        torch.zeros(0),
                        torch.zeros(2, 2),
                        torch.ones(3) * float("nan"),
                    ]
                )
            )
            rows = [pack(value), pack((value, {})), pack((value, value)), pack((value, {name: (1.0, 2.0)}))]
            blob = draw(st.sampled_from([b"", b"x", None, "text", 7, 1.5, *rows]))
            file.execute("UPDATE result SET value = ? WHERE key = ?", (blob, name))
            if isinstance(blob, bytes):  # the value is of another type, its checksum in order
                file.execute("UPDATE result SET checksum = ? WHERE key = ?", (checksum(name, blob), name))
        elif how == "identity":
            file.execute(
                f"UPDATE identity SET value = {draw(st.sampled_from(['1', 'NULL', 'zeroblob(9)', 'value', 'char(27)']))}"
            )
        else:
            file.executescript(draw(st.sampled_from(SQL)))
    file.close()
    changed = path.read_bytes()
    shutil.rmtree(path.parent)
    return changed


SQL = [
    "CREATE VIEW v AS SELECT * FROM result",
    "CREATE TRIGGER t AFTER INSERT ON result BEGIN DELETE FROM result; END",
    "ALTER TABLE result RENAME TO r2; CREATE VIEW result AS SELECT * FROM r2",
    "ALTER TABLE result ADD COLUMN extra TEXT",
    "CREATE INDEX i ON result (upper(key))",
    "DROP TABLE result",
    "DROP TABLE identity",
    "DELETE FROM result",
    "DELETE FROM identity",
    "INSERT INTO result (key, value) VALUES (zeroblob(4), zeroblob(4))",
    "CREATE TABLE other (x)",
    "PRAGMA user_version = 9; CREATE VIRTUAL TABLE f USING fts5(x)",
]


# who reads it


def fuzzed(examples):
    """Examples of a fixed seed, no clock, nothing kept on disk."""
    quiet = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ]
    return settings(derandomize=True, max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)


@contextlib.contextmanager
def file_of(data, name):
    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / name
        path.write_bytes(data)
        yield path


def use_table(path, command):
    found = told(mps.CostTable.load, path)
    commands = [("show", path), ("solve", path, "--budget", "memory_bytes=90", "-o", path.parent / "plan.json")]
    commands += [("pareto", path), ("compare", path, folder() / "table.csv"), ("compare", folder() / "table.csv", path)]
    if found is None:
        assert run("show", path) == 2
        return
    for name in ("again.csv", "again.npz"):
        found.save(path.parent / name)
        assert mps.CostTable.load(path.parent / name) == found
    run(*command(commands))


@fuzzed(300)
@given(st.data())
def test_tables_as_csv(data):
    with file_of(data.draw(damaged_csv((folder() / "table.csv").read_bytes())), "x.csv") as path:
        use_table(path, lambda commands: data.draw(st.sampled_from(commands)))


@fuzzed(300)
@given(st.data())
def test_tables_as_npz(data):
    with file_of(data.draw(damaged_npz((folder() / "table.npz").read_bytes())), "x.npz") as path:
        use_table(path, lambda commands: data.draw(st.sampled_from(commands)))


@fuzzed(250)
@given(st.data())
def test_plans(data):
    with file_of(data.draw(damaged_json((folder() / "plan.json").read_bytes())), "x.json") as path:
        plan = told(mps.Plan.load, path)
        assert run("show", path) == (2 if plan is None else 0)
        if plan is not None:
            plan.save(path.parent / "again.json")
            assert repr(mps.Plan.load(path.parent / "again.json")) == repr(plan)  # nan is not nan
            told(export.gptqmodel, plan)
            plan._repr_html_()


@fuzzed(200)
@given(st.data())
def test_measured_plans(data):
    with file_of(data.draw(damaged_csv((folder() / "plans.csv").read_bytes())), "x.csv") as path:
        plans = told(MeasuredPlans.load, path)
        run("compare", folder() / "table.csv", path)
        run("show", path)
        if plans is not None:
            plans.save(path.parent / "again.csv")
            assert MeasuredPlans.load(path.parent / "again.csv").plans == plans.plans


@fuzzed(100)
@given(st.data())
def test_latency_tables(data):
    with file_of(data.draw(damaged_csv((folder() / "latency.csv").read_bytes())), "x.csv") as path:
        told(LatencyTable(path), model(), [mps.Layer("a", "linear", (4, 8), 32)], PRECISIONS)


@fuzzed(60)
@given(st.data())
def test_evolved_proxies(data):
    with file_of(data.draw(damaged_json((folder() / "proxy.json").read_bytes())), "x.json") as path:
        told(EvolvedProxy.load, path)


RESULT = {
    "summary.json": damaged_json,
    "plan.json": damaged_json,
    "plans.csv": damaged_csv,
    "passes.db": damaged_database,
}
RESULT |= {"tables/posterior.csv": damaged_csv}


@fuzzed(250)
@given(st.data(), st.sampled_from(sorted(RESULT)))
def test_results(data, name):
    valid = folder() / "result"
    with tempfile.TemporaryDirectory() as where:
        path = Path(where) / "result"
        path.mkdir()
        for file in valid.rglob("*"):  # links: only one file is another
            target = path / file.relative_to(valid)
            target.mkdir() if file.is_dir() else os.link(file, target)
        (path / name).unlink()
        (path / name).write_bytes(data.draw(RESULT[name]((valid / name).read_bytes())))
        result = told(mps.SearchResult.load, path)
        if result is None:
            assert run("report", path, "-o", Path(where) / "report.html") == 2
        else:
            assert run("report", path, "-o", Path(where) / "report.html") == 0
            str(result)
            json.dumps(result.summary())
            told(result.save, Path(where) / "again")


@fuzzed(150)
@given(st.data())
def test_checkpoints(data):
    data_ = (folder() / "result" / "passes.db").read_bytes()
    with file_of(data.draw(damaged_database(data_)), "x.db") as path:
        file = sqlite3.connect(folder() / "result" / "passes.db")
        identity = {
            name: value
            for name, value in file.execute("SELECT name, value FROM identity")
            if name != "checkpoint version"
        }
        file.close()
        store = told(SQLiteStore, path, identity)
        if store is not None:
            with store:
                for key in told(store.rows) or ():
                    told(store.get, key)
                told(store.put, BatchKey("x", 0), [1.0])


TOOLS = {
    "compressed-tensors": damaged_json,
    "gptqmodel": damaged_json,
    "modelopt": damaged_json,
    "exllamav2": damaged_json,
}
TOOLS |= {"nncf": damaged_xml, "gguf": damaged_bytes}


@fuzzed(400)
@given(st.data(), st.sampled_from(sorted(TOOLS)), st.booleans())
def test_files_of_other_tools(data, tool, with_model):
    with file_of(data.draw(TOOLS[tool]((folder() / "tools" / tool).read_bytes())), "file") as path:
        read = import_plan if tool in IMPORTERS and tool not in ("exllamav2",) else import_table
        found = told(read, path, tool, net(tool) if with_model else None)
        if found is not None:
            told(found.save, path.parent / ("out.json" if read is import_plan else "out.csv"))


def test_valid_files_are_taken():
    """Else the tests above would see refusals only."""
    assert all(run("show", folder() / name) == 0 for name in ("table.csv", "table.npz", "plan.json"))
    assert run("compare", folder() / "table.csv", folder() / "plans.csv") == 0
    mps.SearchResult.load(folder() / "result")
    for tool in TOOLS:
        read = import_plan if tool in IMPORTERS else import_table
        assert read(folder() / "tools" / tool, tool, net(tool))
    assert set(TOOLS) == set(IMPORTERS) | set(TABLE_IMPORTERS)
