"""Files made to do harm: to take memory, run SQL, reach other files, steer a terminal; refused in one line, with the place."""

import io
import json
import shutil
import sqlite3
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.checkpoints.keys import BatchKey
from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.errors import FileError, one_line
from mpsearch.files.schema import checked, parse_json
from mpsearch.files.writing import csv_text

TABLE = mps.CostTable(
    (mps.Layer("a", "linear", (4, 8)), mps.Layer("b", "linear", (4, 8))), mps.precisions("w2 w4"), [[2, 1], [2, 1]]
)


def npz(tmp_path, change):
    """A table with one member of the archive changed: name -> bytes, compressed."""
    TABLE.save(tmp_path / "valid.npz")
    with zipfile.ZipFile(tmp_path / "valid.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return tmp_path / "x.npz"


def array(shape, dtype="<f8", data=b""):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


BOMBS = {
    "a header of a shape that is not there": array((10**6, 10**6)),
    "a negative shape": array((-1, -8), data=bytes(64)),
    "objects": array((1,), "|O", b"cos\nsystem\n(S'true'\ntR."),
    "zeros that compress": array((10**5, 10**4), "|u1", bytes(10**9)),
}


@pytest.mark.parametrize("what", BOMBS)
def test_npz_that_takes_more_than_it_holds(tmp_path, what):
    path = npz(tmp_path, lambda members: members.update({"sensitivity.npy": BOMBS[what]}))
    tracemalloc.start()
    with pytest.raises(mps.TableError, match=r"x\.npz") as error:
        mps.CostTable.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24
    assert "\n" not in str(error.value)


def test_npz_without_compression_still_loads(tmp_path):
    assert mps.CostTable.load(npz(tmp_path, lambda members: None)) == TABLE


@pytest.mark.parametrize(
    "sql",
    [
        "CREATE VIEW v AS SELECT * FROM result",
        "CREATE TRIGGER t AFTER INSERT ON result BEGIN DELETE FROM result; END",
        "ALTER TABLE result RENAME TO other; CREATE VIEW result AS SELECT * FROM other",
        "CREATE INDEX i ON result (upper(key))",
        "ALTER TABLE result ADD COLUMN more TEXT AS (upper(key))",
    ],
)
@pytest.mark.parametrize("copied", [True, False])
def test_sql_of_others_is_never_run(tmp_path, sql, copied):
    path = tmp_path / "run.db"
    with SQLiteStore(path, {"weights": "a"}) as store:
        store.put(BatchKey("x", 0), [1.0])
    file = sqlite3.connect(path)
    file.executescript(sql)
    file.close()
    before = path.read_bytes()
    read = (
        (lambda: SQLiteStore.read(path, before, {"weights": "a"}))
        if copied
        else lambda: SQLiteStore(path, {"weights": "a"})
    )
    with pytest.raises(mps.EstimatorError, match="no checkpoint of mpsearch") as error:
        read()
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    torch.manual_seed(0)
    batches = [(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(12)]
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    path = tmp_path_factory.mktemp("result")
    mps.search(model, batches, mps.Budget(average_bits=3), mps.precisions("w2 w4"), max_passes=12, progress=False).save(
        path
    )
    mps.SearchResult.load(path)
    return path


@pytest.mark.parametrize("name", ["../posterior", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "posterior\0"])
def test_tables_stay_inside_the_folder(result, tmp_path, name):
    shutil.copytree(result, tmp_path / "result")
    shutil.copy(result / "tables" / "posterior.csv", tmp_path / "posterior.csv")
    summary = json.loads((result / "summary.json").read_text())
    summary["tables"].append(name)
    (tmp_path / "result" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(mps.PlanError, match="no name of a file in the folder"):
        mps.SearchResult.load(tmp_path / "result")


@pytest.mark.parametrize("depth", [150, 5000, 200_000])
@pytest.mark.parametrize("pair", ["[]", ('{"a":', "}")])
def test_nested_json(tmp_path, depth, pair):
    text = pair[0] * depth + "1" + pair[1] * depth
    path = tmp_path / "plan.json"
    path.write_text(f'{{"mpsearch_plan": 1, "layers": {{"a": "w4"}}, "origin": {{"x": {text}}}}}')
    with pytest.raises(mps.PlanError, match="nested in more than 100 levels"):
        mps.Plan.load(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 99 + "]" * 99, None),
        ('{"a[[[[": "%s"}' % ("[" * 500), None),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ("1" * 5000, "not JSON"),
        (r'"\ud800"', "half of a character"),
        (r'"😀"', None),
        (b"\xff", "byte 0 is not UTF-8"),
        (b"\xef\xbb\xbf[1]", None),
        ("", "not JSON"),
    ],
)  # fmt: skip
def test_json_that_is_read_or_refused(text, words):
    if words is None:
        parse_json(text)
        return
    with pytest.raises(FileError, match=words):
        parse_json(text)


@pytest.mark.parametrize(
    ("value", "shape", "words"),
    [
        (True, int, "expected a whole number at $, got True"),
        (True, float, "expected a number at $, got True"),
        (10**400, float, "expected a number at $, got 1000"),
        ([1], tuple[int, str], "expected a list of 2 (a whole number, text) at $, got list"),
        ({"a": None}, dict[str, str | None], None),
        ({"a": 1}, dict[str, str | None], "expected text or null at $['a'], got 1"),
        ([[1, 2], [3]], list[list[int]], None),
    ],
)
def test_shapes(value, shape, words):
    if words is None:
        assert checked(value, shape) == value
        return
    with pytest.raises(FileError) as error:
        checked(value, shape)
    assert str(error.value).startswith(words)


def test_messages_are_one_line_without_control_characters_and_not_endless():
    error = mps.PlanError("no layer 'a\x1b[2J\nb\0\x9b' " + "x" * 10**6)
    assert str(error).isprintable()
    assert len(str(error)) < 2000
    assert one_line("é — 😀") == "é — 😀"


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@x", "\t=x"])
def test_names_that_spreadsheets_take_for_formulas_are_told_and_kept(tmp_path, name):
    table = mps.CostTable((mps.Layer(name),), mps.precisions("w2 w4"), [[2, -1]])
    with pytest.warns(UserWarning, match="a spreadsheet takes it for a formula"):
        table.save(tmp_path / "x.csv")
    assert mps.CostTable.load(tmp_path / "x.csv") == table


def test_numbers_are_no_formulas(recwarn):
    csv_text([["a", -1, -1.5, "w4"]])
    assert not recwarn
