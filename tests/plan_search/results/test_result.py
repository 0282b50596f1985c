"""The folder that keeps a result: all of it comes back, and damage is told."""

import contextlib
import dataclasses
import io
import json
import math
import os
import resource
import shutil
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch as mps
from mpsearch.checkpoints.keys import PlanKey, ReferenceKey, ShiftIndexKey, ShiftKey
from mpsearch.checkpoints.memory import MemoryStore
from mpsearch.checkpoints.values import checksum
from mpsearch.core.measured_plans import MeasuredPlans
from mpsearch.plan_search.results.measured_front import measured_front


@pytest.fixture(scope="module")
def result():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    generator = torch.Generator().manual_seed(0)
    data = [
        (torch.randn(20, 5, generator=generator), torch.randint(0, 3, (20,), generator=generator)) for _ in range(4)
    ]
    return mps.search(
        model, data, mps.Budget(average_bits=3), mps.precisions("w2 w3 w4"), max_passes=20, progress=False
    )


def test_all_comes_back(result, tmp_path):
    result.save(tmp_path)
    found = mps.SearchResult.load(tmp_path)
    assert found.plan == result.plan
    assert found.plan.predicted == result.predicted == found.predicted
    for name in ("verdict", "wins", "measured", "uniform", "passes", "seconds", "settings", "identity"):
        assert getattr(found, name) == getattr(result, name), name
    assert found.finished.rows() == result.finished.rows()
    assert list(found.comparison) == list(result.comparison)
    for name, table in result.tables.items():
        assert np.array_equal(found.tables[name].sensitivity, table.sensitivity)
        assert found.tables[name].unit == table.unit
    assert [plan.usage for plan in found.plans.plans] == [plan.usage for plan in result.plans.plans]
    assert np.array_equal(found.plans.damage, result.plans.damage)
    assert np.array_equal(found.plans.damage_se, result.plans.damage_se)
    assert found.front.over == result.front.over
    assert found.front.to_frame().equals(result.front.to_frame())
    assert str(found) == str(result)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "plan.json", "plans.csv", "front.csv", "passes.db", "summary.json",
        *(f"tables/{name}.csv" for name in result.tables),
    }  # fmt: skip
    found.save(tmp_path)  # over itself
    assert str(mps.SearchResult.load(tmp_path)) == str(result)


@pytest.mark.parametrize("name", ["plan.json", "plans.csv", "passes.db", "summary.json", "tables/posterior.csv"])
def test_a_missing_file_is_named(result, tmp_path, name):
    result.save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        mps.SearchResult.load(tmp_path)
    assert str(caught.value.filename).endswith(name)
    assert not (tmp_path / name).exists()


def summary(change):
    def damage(path):
        content = json.loads((path / "summary.json").read_text())
        change(content)
        (path / "summary.json").write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "summary.json").write_text("{"), "not JSON"),
        (lambda path: (path / "summary.json").write_bytes(b"\xff\xfe"), "not JSON"),
        (lambda path: (path / "summary.json").write_text("[]"), "the key 'mpsearch_search' is missing"),
        (
            summary(lambda content: content.update(mpsearch_search=3)),
            "version 3 of 'mpsearch_search', this mpsearch reads 1 and 2",
        ),
        (summary(lambda content: content.update(verdikt="")), "unknown key 'verdikt'; did you mean 'verdict'"),
        (summary(lambda content: content.pop("wins")), "the key 'wins' is missing"),
        (summary(lambda content: content["comparison"][0].pop("damage")), "'damage' is missing at $.comparison[0]"),
        (summary(lambda content: content["comparison"][0].update(role="plna")), "comparison does not fit"),
        (summary(lambda content: content.update(comparison=3)), "expected a list at $.comparison, got 3"),
        (summary(lambda content: content["comparison"][0]["evaluation"].update(more=1)), "unknown key 'more'"),
        (lambda path: (path / "passes.db").write_text("nothing" * 999), "passes.db was not saved with "),
        (lambda path: (path / "passes.db").write_text(""), "passes.db was not saved with "),
        (summary(lambda content: content["identity"].update(weights="other")), "other weights"),
        (summary(lambda content: content["files"].pop("plans.csv")), "plans.csv was not saved with "),
    ],
)
def test_damage_is_told_in_one_line(result, tmp_path, damage, words):
    result.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(mps.MpsearchError) as caught:
        mps.SearchResult.load(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_front_keeps_what_nothing_beats():
    rows = [(2, 0.9), (3, 0.5), (3, 0.6), (4, 0.5), (5, 0.1), (2, 1.0)]
    plans = tuple(
        mps.Plan({"a": mps.Precision("2"), "b": mps.Precision(str(i + 2))}, usage={"memory_bytes": float(use)})
        for i, (use, _) in enumerate(rows)
    )
    measured = MeasuredPlans(plans, np.array([d for _, d in rows]), np.zeros(len(rows)))
    front = measured_front(measured, "memory_bytes")
    kept = [
        row for row in rows
        if not any(o[0] <= row[0] and o[1] <= row[1] and o != row for o in rows)
    ]  # fmt: skip
    assert list(zip(front.usage.tolist(), front.plans.damage.tolist(), strict=True)) == sorted(kept)
    assert len(front.uniforms) == 1


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_a_picture(result, tmp_path, kind):
    path = tmp_path / f"front.{kind}"
    result.front.plot(path, mark=result.plan, title="A net")
    assert path.stat().st_size > 5000


def test_a_folder_that_may_only_be_read(result, tmp_path, monkeypatch):
    """Such as a colleague's; root may write everywhere, so what is opened is looked at too."""
    folder = tmp_path / "result"
    result.save(folder)
    opened = []
    connect = sqlite3.connect

    def recorded(path, *args, **options):
        opened.append(str(path))
        return connect(path, *args, **options)

    monkeypatch.setattr(sqlite3, "connect", recorded)
    folder.chmod(0o555)
    try:
        assert mps.SearchResult.load(folder).finished.rows() == result.finished.rows()
    finally:
        folder.chmod(0o755)
    assert set(opened) == {":memory:"}


# ------------------------------------------------------------------------------------------------ whole or not at all


@pytest.fixture(scope="module")
def other(result):
    """A result with another table, other plans and another verdict."""
    tables = {name: table for name, table in result.tables.items() if name != "output-gradient"}
    plans = dataclasses.replace(result.plans, damage=result.plans.damage + 1)
    return dataclasses.replace(
        result, verdict="another", tables=tables, plans=plans, front=measured_front(plans, result.front.over)
    )


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["plan.json", "plans.csv", "passes.db", "summary.json", "tables/posterior.csv"])
def test_a_mix_of_two_results_is_refused(result, other, tmp_path, name):
    other = dataclasses.replace(
        other, plan=dataclasses.replace(other.plan, origin={"other": 1}), finished=MemoryStore(other.identity)
    )
    tables = {**other.tables, "posterior": dataclasses.replace(other.tables["posterior"], origin={"other": 1})}
    dataclasses.replace(other, tables=tables).save(tmp_path / "b")
    result.save(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(mps.PlanError, match="the files of two results are mixed, or this one was changed") as caught:
        mps.SearchResult.load(tmp_path / "a")
    assert "\n" not in str(caught.value)
    if name != "summary.json":
        assert str(tmp_path / "a" / name) in str(caught.value)


def test_a_result_over_another_one_leaves_nothing_of_it(result, other, tmp_path):
    result.save(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    other.save(tmp_path / "a")
    other.save(tmp_path / "b")
    assert contents(tmp_path / "a") == {**contents(tmp_path / "b"), "notes.txt": b"mine"}


class Killed(BaseException):
    """Ends a run as a signal does: nothing on the disk changes afterwards."""


class Calls:
    """Calls that change a disk: the chosen one and all that follow do not happen."""

    def __init__(self):
        self.number, self.last = None, None
        sys.addaudithook(self.called)

    def called(self, event, arguments):
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
        if self.number is not None and (changes or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))):
            self.number += 1
            if self.last is not None and self.number > self.last:
                raise Killed

    @contextlib.contextmanager
    def until(self, last):
        self.number, self.last = 0, last
        try:
            yield
        finally:
            self.number, self.last = None, None


@pytest.fixture(scope="module")
def calls():
    return Calls()


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_save_that_is_killed_anywhere_leaves_the_old_result_or_the_new_one(result, other, tmp_path, calls, step):
    with calls.until(None):
        other.save(tmp_path / "new")
        count = calls.number
    result.save(tmp_path / "old")
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    loaded = []
    for last in range(0, count + 20, step):  # over an old one there is more to do
        folder = tmp_path / str(last)
        shutil.copytree(tmp_path / "old", folder)
        with contextlib.suppress(Killed), calls.until(last):
            other.save(folder)
            break
        verdict = mps.SearchResult.load(folder).verdict
        loaded.append(verdict)
        if verdict == result.verdict:
            assert {name: data for name, data in contents(folder).items() if not name.startswith(".")} == old
        with contextlib.suppress(Killed), calls.until(last // 2):  # killed again, while it clears up
            other.save(folder)
        again = mps.SearchResult.load(folder).verdict
        assert again == "another" or verdict == result.verdict
        other.save(folder)
        assert contents(folder) == new
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert loaded == [result.verdict] * loaded.count(result.verdict) + ["another"] * loaded.count("another")
    assert loaded.count(result.verdict) > 10 / step
    assert loaded.count("another") > 5 / step


@contextlib.contextmanager
def room(size):
    """Files of so many bytes at most."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("count", [8, pytest.param(30, marks=pytest.mark.slow)])
def test_a_save_without_room_fails_and_leaves_the_old_result(result, other, tmp_path, count):
    result.save(tmp_path)
    old = contents(tmp_path)
    most = max(map(len, old.values()))
    for size in np.linspace(0, most - 1, count).astype(int).tolist():
        with pytest.raises(OSError, match=r"File too large") as caught, room(size):
            other.save(tmp_path)
        assert str(caught.value.filename).removeprefix(f"{tmp_path}/") in {
            *old,
            *(f"tables/{name}.csv" for name in other.tables),
        }
        assert contents(tmp_path) == old
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["tables"]
        assert mps.SearchResult.load(tmp_path).verdict == result.verdict


def test_a_disk_that_loses_what_it_took_is_told(result, other, tmp_path, monkeypatch):
    result.save(tmp_path)
    monkeypatch.setattr("mpsearch.files.file_set.sync", lambda path: path.is_file() and os.truncate(path, 100))
    with pytest.raises(OSError, match="not whole on the disk: 100 bytes of ") as caught:
        other.save(tmp_path)
    assert caught.value.filename == str(tmp_path / "plan.json")
    monkeypatch.undo()
    assert mps.SearchResult.load(tmp_path).verdict == result.verdict


def test_what_a_killed_save_of_an_older_version_left_is_cleared(result, tmp_path):
    (tmp_path / ".passes.abc").mkdir()
    (tmp_path / ".passes.abc" / "passes.db").write_text("half")
    result.save(tmp_path)
    assert not (tmp_path / ".passes.abc").exists()


def test_nothing_outside_the_folder_is_removed(result, tmp_path):
    result.save(tmp_path / "a")
    (tmp_path / "mine").write_text("mine")
    summary(lambda content: content["files"].update({"../mine": "", str(tmp_path / "mine"): ""}))(tmp_path / "a")
    result.save(tmp_path / "a")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_replaced(result, other, tmp_path):
    result.save(tmp_path)
    (tmp_path / "front.csv").unlink()
    (tmp_path / "front.csv").mkdir()
    old = contents(tmp_path)
    with pytest.raises(IsADirectoryError) as caught:
        other.save(tmp_path)
    assert caught.value.filename == str(tmp_path / "front.csv")
    assert contents(tmp_path) == old


def sentences(store):
    """Finished work as versions 2 and 3 named it."""
    results = {"hessian trace | 0a | 0": ([1.0], [2.0])}  # known by code of then: nobody asks for it
    for key, runs in store.items(PlanKey):
        results[f"plan | {key.part} | {' '.join(key.precisions)}"] = dataclasses.asdict(runs)
    for _, index in store.items(ShiftIndexKey):
        results |= {"logit shift | index": index.rows, "logit shift | squares": index.squares}
    for key, output in store.items(ReferenceKey):
        results[f"logit shift | {key.rows}"] = output
    for key, shift in store.items(ShiftKey):
        results[f"logit shift | {key.rows} | {key.decision} {key.precision}"] = shift
    return results


@pytest.mark.parametrize("version", ["2", "3"])
def test_a_folder_of_a_version_before_is_read(result, tmp_path, version):
    """It has no hashes of files, and its passes are sentences; those of version 2 have neither checksums nor the output of the model."""
    result.save(tmp_path)

    def older(content):
        del content["files"], content["identity"]["output"]
        content["mpsearch_search"] = 1

    summary(older)(tmp_path)
    identity = {name: value for name, value in result.identity.items() if name != "output"}
    (tmp_path / "passes.db").unlink()
    with contextlib.closing(sqlite3.connect(tmp_path / "passes.db", isolation_level=None)) as file:
        file.execute("PRAGMA journal_mode=WAL")
        file.execute("CREATE TABLE identity (name TEXT PRIMARY KEY, value TEXT)")
        columns = "name TEXT PRIMARY KEY, value BLOB" + (", checksum BLOB" if version == "3" else "")
        file.execute(f"CREATE TABLE result ({columns})")
        file.executemany("INSERT INTO identity VALUES (?, ?)", {"checkpoint version": version, **identity}.items())
        for name, value in sentences(result.finished).items():
            data = io.BytesIO()
            torch.save((value, {}) if version == "3" else value, data)
            row = (name, data.getvalue(), checksum(name, data.getvalue()))[: 2 if version == "2" else 3]
            file.execute(f"INSERT INTO result VALUES (?, ?{', ?' * (len(row) - 2)})", row)
    loaded = mps.SearchResult.load(tmp_path)
    assert (loaded.verdict, loaded.plan) == (result.verdict, result.plan)
    plans = dict(result.finished.items(PlanKey))
    assert plans
    for key, runs in loaded.finished.items(PlanKey):
        expected = plans.pop(key)
        assert torch.equal(runs.sums, expected.sums)
        assert torch.equal(runs.counts, expected.counts)
        assert (runs.runs, runs.again) == (expected.runs, expected.again)
    assert not plans
    if result.surrogate is not None:
        np.testing.assert_array_equal(loaded.surrogate.shifts, result.surrogate.shifts)
    loaded.save(tmp_path / "new")
    assert mps.SearchResult.load(tmp_path / "new").finished.rows() == loaded.finished.rows()


@pytest.mark.parametrize(
    ("over", "settings", "header", "above"),
    [
        ("average_bits", {"budget": {"average_bits": 3}}, "bits  memory  ", "w4 (over budget)"),
        ("bitops", {"budget": {"bitops": "50%"}}, "bits  memory  bitops  ", "w4 (over budget)"),
        ("memory_bytes", {"budget": {}}, "bits  memory  ", "w4 (larger)"),
    ],
)
def test_the_text_tells_what_was_limited(result, over, settings, header, above):
    shown = dataclasses.replace(result, front=dataclasses.replace(result.front, over=over), settings=settings)
    assert header in str(shown)
    assert above in str(shown)
    assert "metric" not in str(shown)
    table, _, facts = shown.text(80).rpartition("\n\n")
    assert max(map(len, table.splitlines())) <= 100
    assert (
        "memory_bytes: codes packed without padding, a scale in the weight's dtype for each group or channel; " in facts
    )


def test_the_text_tells_a_metric_of_ones_own_and_leaves_out_what_there_is_not(result):
    def own(found):
        rest = None if found.reference is None else own(found.reference)
        return dataclasses.replace(
            found, kl=math.nan, kl_se=math.nan, loss=None, accuracy=None, metric=0.125, metric_se=0.5, reference=rest
        )

    rows = [dataclasses.replace(one, evaluation=own(one.evaluation)) for one in result.comparison]
    lines = dataclasses.replace(result, measured=own(result.measured), comparison=rows).text().splitlines()
    header = next(line for line in lines if line.startswith("held-out"))
    assert header.split()[-1] == "metric"
    assert "loss" not in header
    assert "KL" not in header
    assert [line.split()[-1] for line in lines if line.startswith("unquantized")] == ["0.125"]


def test_the_text_fits_narrow_terminals(result):
    """Columns go where there is no room, from the loss on; bits and KL stay."""
    left = []
    for width in (80, 70, 60, 50, 40):
        table = result.text(width).split("\n\n")[1].splitlines()
        assert max(map(len, table)) <= width
        assert len(table) == 2 + len(result.comparison) + 1
        left.append(table[0].split()[2:])
    assert left[0] == ["bits", "memory", "KL", "[nats]", "loss", "right"]
    assert left[-1] == ["bits", "KL", "[nats]"]
    assert [len(one) for one in left] == sorted((len(one) for one in left), reverse=True)


KILLED = """
import os, pathlib, random, signal, sys, time
import mpsearch as mps

folder, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
results = [mps.SearchResult.load(folder / name) for name in ("old", "new")]
moments = random.Random(0)
place = folder / "place"
results[0].save(place)
start = time.monotonic()
results[1].save(place)
seconds = time.monotonic() - start
seen, killed, turn = set(), 0, 0
while killed < kills:
    pid = os.fork()
    if not pid:
        try:
            results[turn % 2].save(place)
        finally:
            os._exit(0)
    time.sleep(moments.uniform(0, 1.2 * seconds))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    killed += os.WIFSIGNALED(status)
    found = mps.SearchResult.load(place)
    assert found.verdict in [one.verdict for one in results]
    seen.add(found.verdict)
    turn += 1
results[0].save(place)
assert sorted(path.name for path in place.iterdir()) == sorted(path.name for path in (folder / "old").iterdir())
print(len(seen))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_at_random_moments_of_saving(result, other, tmp_path, kills):
    result.save(tmp_path / "old")
    other.save(tmp_path / "new")
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
