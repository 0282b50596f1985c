"""Finished work on disk: what is found again, what is refused, and runs that are killed."""

import functools
import os
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpsearch as mps
from mpsearch.checkpoints.counting import CountingStore
from mpsearch.checkpoints.keys import BatchKey
from mpsearch.checkpoints.sqlite import SQLiteStore
from mpsearch.quantizers.rounding import RoundToNearest
from mpsearch.sensitivity import DeltaLoss, Fisher, HessianTrace, KLDivergence, PathShapley

# ------------------------------------------------------------------------------------------------ the file


def key(name):
    return BatchKey(name, 0)


def test_what_was_put_is_found_again(tmp_path):
    value = {"sums": torch.arange(3.0), "parts": [1.5, (2, "a")], "flag": True}
    with SQLiteStore(tmp_path / "run.db", {"weights": "a"}) as file:
        assert file.get(key("one")) is None
        file.put(key("one"), value)
        file.put(key("two"), 1)
        file.put(key("two"), 2)
        file.put(key("three"), 3)
        file.delete([key("three"), key("four")])
    with SQLiteStore(tmp_path / "run.db", {"weights": "a"}) as file:
        found = file.get(key("one"))
        assert torch.equal(found["sums"], value["sums"])
        assert (found["parts"], found["flag"]) == (value["parts"], True)
        assert file.get(key("two")) == 2
        assert file.get(key("three")) is None


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weights": "a", "data": "c"}, "other data: it has b, this run has c"),
        ({"weights": "a"}, "other data: it has b, this run has None"),
        ({"weights": "a", "data": "b", "loss": "kl"}, "other loss: it has None, this run has kl"),
    ],
)
def test_another_run_is_refused_with_the_reason(tmp_path, other, words):
    SQLiteStore(tmp_path / "run.db", {"weights": "a", "data": "b"}).close()
    with pytest.raises(mps.EstimatorError, match=f"run.db was written for {words}; give another file"):
        SQLiteStore(tmp_path / "run.db", other)


def refused(path):
    with pytest.raises(mps.EstimatorError) as caught:
        SQLiteStore(path, {"weights": "a"})
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_checkpoints(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("# mpsearch_table: 1\n" * 100)
    assert "no checkpoint" in refused(table)
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE birds (name TEXT)")
    other.close()
    assert "the table 'birds'" in refused(tmp_path / "other.db")
    assert "cannot be opened" in refused(tmp_path)
    assert "cannot be opened" in refused(tmp_path / "missing" / "run.db")
    assert table.read_text() == "# mpsearch_table: 1\n" * 100


@pytest.mark.parametrize("left", [0, 1, 100, 3000, 4096, 10_000, 20_000])
def test_a_file_cut_off_goes_on_or_is_refused(tmp_path, left):
    path = tmp_path / "run.db"
    with SQLiteStore(path, {"weights": "a"}) as file:
        for i in range(20):
            file.put(key(f"cell {i}"), torch.full((200,), float(i)))
    assert path.stat().st_size > 20_000
    with open(path, "r+b") as cut:
        cut.truncate(left)
    said = None
    try:
        with SQLiteStore(path, {"weights": "a"}) as file:
            for i in range(20):
                found = file.get(key(f"cell {i}"))
                assert found is None or torch.equal(found, torch.full((200,), float(i)))
            file.put(key("cell 0"), 1)
            assert file.get(key("cell 0")) == 1
    except mps.EstimatorError as error:
        said = str(error)
    if left < 2:  # to SQLite an empty file
        assert said is None
    else:
        assert "damaged" in said
        assert "\n" not in said


def damaged(path, statement):
    file = sqlite3.connect(path)
    with file:
        file.execute(statement)
    file.close()


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (
            "UPDATE result SET value = cast(x'00' || substr(value, 2) AS BLOB) WHERE key LIKE '%,_b_,%'",
            "b.* does not fit its checksum",
        ),
        (
            "UPDATE result SET value = (SELECT value FROM result WHERE key LIKE '%,_a_,%')",
            "b.* does not fit its checksum",
        ),
        ("UPDATE result SET value = NULL WHERE key LIKE '%,_b_,%'", "b.* does not fit its checksum"),
        ("UPDATE result SET checksum = 5 WHERE key LIKE '%,_b_,%'", "b.* does not fit its checksum"),
        (
            "UPDATE result SET key = replace(key, char(34, 99, 34), char(34, 98, 34)) WHERE key LIKE '%,_c_,%'",
            "b.* does not fit its checksum",
        ),
        ("UPDATE identity SET value = '2' WHERE name = 'checkpoint version'", "of version 2 of the checkpoints, .* 4"),
        ("UPDATE identity SET value = '9' WHERE name = 'checkpoint version'", "of version 9 of the checkpoints, .* 4"),
        ("DELETE FROM identity WHERE name = 'checkpoint version'", "checkpoint version"),
        ("CREATE VIEW extra AS SELECT 1", "a database with the view 'extra'"),
        ("DROP TABLE result", None),
    ],
)
def test_damage_is_told_in_one_line(tmp_path, statement, words):
    """A result that does not fit its checksum is refused, and so is the file: others may have come of it."""
    path = tmp_path / "run.db"
    with SQLiteStore(path, {"weights": "a"}) as file:
        for name in "ab" if "_c_" not in statement else "ac":
            file.put(key(name), torch.zeros(3) + ord(name))
    damaged(path, statement)
    if words is None:
        with SQLiteStore(path, {"weights": "a"}) as file:
            assert file.get(key("b")) is None
        return
    with pytest.raises(mps.EstimatorError, match=words) as caught, SQLiteStore(path, {"weights": "a"}) as file:
        file.get(key("b"))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_no_checkpoint_where_no_file_can_be(tmp_path):
    for path in ("", "/dev/null", tmp_path):
        with pytest.raises(mps.EstimatorError, match="cannot be opened"):
            SQLiteStore(path, {})


def test_a_result_that_finds_no_room_leaves_those_before(tmp_path, monkeypatch):
    with SQLiteStore(tmp_path / "run.db", {}) as file:
        file.put(key("a"), 1)
        file._file.execute("PRAGMA max_page_count=8")
        with pytest.raises(mps.EstimatorError, match=r"run.db cannot be written or read: database or disk is full"):
            file.put(key("b"), torch.zeros(100_000))
    with SQLiteStore(tmp_path / "run.db", {}) as file:
        assert (file.get(key("a")), file.get(key("b"))) == (1, None)


def test_two_runs_at_once_are_told_apart(tmp_path):
    """The second sees what the first has finished; both may write."""
    first, second = (SQLiteStore(tmp_path / "run.db", {"weights": "a"}) for _ in range(2))
    first.put(key("one"), 1)
    assert second.get(key("one")) == 1
    second.put(key("two"), 2)
    assert first.get(key("two")) == 2
    first.close()
    second.close()


# ------------------------------------------------------------------------------------------------ runs


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(5, 6, generator=generator), torch.arange(5) % 3) for _ in range(count)]


OPTIONS = mps.precisions("w2 w4a8")
FAMILY = [KLDivergence(), Fisher(), HessianTrace(2), DeltaLoss(), PathShapley(1)]


def own(model, batch, weight=1.0):
    return weight * F.cross_entropy(model(batch[0]), batch[1])


def test_a_finished_run_is_read_back(tmp_path):
    run = functools.partial(mps.profile, net(), batches(), FAMILY, OPTIONS, checkpoint=tmp_path / "run.db")
    first, second = run(), run()
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.sensitivity, other.sensitivity)
        np.testing.assert_array_equal(one.sensitivity_se, other.sensitivity_se)
        now, whole = (other.origin[name] for name in ("passes_in_this_run", "passes"))
        assert now["backward"] == 0
        assert now["forward"] <= 1 + 1  # noise of inputs, the record of calls, references
        for kind, most in one.origin["passes"].items():  # but what ran after the last result, which runs again
            assert most - 1 <= whole[kind] - now[kind] <= most + 1e-9
        assert one.origin["passes_in_this_run"] == one.origin["passes"]
    plain = mps.profile(net(), batches(), FAMILY, OPTIONS)
    for one, other in zip(first, plain, strict=True):
        np.testing.assert_array_equal(one.sensitivity, other.sensitivity)


def test_more_estimators_in_the_same_file(tmp_path):
    path = tmp_path / "run.db"
    alone = mps.profile(net(), batches(), KLDivergence(), OPTIONS, checkpoint=path)
    both = mps.profile(net(), batches(), [KLDivergence(), Fisher(), Fisher(seed=1)], OPTIONS, checkpoint=path)
    np.testing.assert_array_equal(alone.sensitivity, both[0].sensitivity)
    assert both[0].origin["passes_in_this_run"]["forward"] < 1
    assert both[0].origin["passes"]["forward"] > alone.origin["passes"]["forward"] > 5.9
    assert both[1].origin["passes"]["backward"] == pytest.approx(2)
    for table, seed in zip(both[1:], (0, 1), strict=True):
        plain = mps.profile(net(), batches(), Fisher(seed=seed), OPTIONS)
        np.testing.assert_array_equal(table.sensitivity, plain.sensitivity)


@pytest.mark.parametrize("what", ["weights", "data", "quantizer", "layers", "precisions", "loss"])
def test_a_run_of_something_else_is_refused(tmp_path, what):
    model, data, options, settings = net(), batches(), OPTIONS, {"checkpoint": tmp_path / "run.db", "loss": own}
    mps.profile(model, data, KLDivergence(), options, **settings)
    if what == "weights":
        model[2].bias.data[0] += 1e-6
    elif what == "data":
        data[1][0][0, 0] += 1e-6
    elif what == "quantizer":
        settings["quantizer"] = RoundToNearest(scale="max")
    elif what == "layers":
        settings["exclude"] = ["2"]
    elif what == "precisions":
        options = mps.precisions("w2 w3")
    else:
        settings["loss"] = functools.partial(own, weight=2.0)
    with pytest.raises(mps.EstimatorError, match=rf"run.db was written for other {what}: it has .*; give another file"):
        mps.profile(model, data, KLDivergence(), options, **settings)


class Net(nn.Sequential):
    """A model with an attribute that its forward reads."""

    scale = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


def other_code(model):
    model.forward = lambda x: model[2](torch.relu(model[0](x)))


FORWARDS = {
    "a module": lambda model: model.__setitem__(1, nn.Tanh()),
    "an attribute": lambda model: setattr(model, "scale", 1.01),
    "a setting": lambda model: setattr(model[1], "negative_slope", 0.5),
    "code": other_code,
    "a hook": lambda model: model[1].register_forward_hook(lambda module, inputs, output: output + 1),
}


def forward_net():
    torch.manual_seed(0)
    return Net(nn.Linear(6, 8), nn.LeakyReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("what", FORWARDS)
def test_another_forward_with_the_same_weights_is_refused(tmp_path, what):
    run = functools.partial(mps.profile, precisions=OPTIONS, checkpoint=tmp_path / "run.db")
    model = forward_net()
    layers = mps.layers(model, batches()[0])
    run(model, batches(), KLDivergence(), layers=layers)
    run(model, batches(), Fisher(), layers=layers)
    FORWARDS[what](model)
    words = r"run.db was written for another output: unquantized, on the first samples, the two differ by "
    with pytest.raises(mps.EstimatorError, match=words):
        run(model, batches(), KLDivergence(), layers=layers)


def test_rounding_of_another_machine_is_told_and_taken(tmp_path, recwarn):
    run = functools.partial(mps.profile, precisions=OPTIONS, checkpoint=tmp_path / "run.db")
    model = forward_net()
    first = run(model, batches(), KLDivergence())
    assert not recwarn
    model.scale = 1 + 2e-6
    with pytest.warns(UserWarning, match=r"differs by [0-9.]+e-06 of its size .* within rounding, not bit for bit"):
        second = run(model, batches(), KLDivergence())
    np.testing.assert_array_equal(first.sensitivity, second.sensitivity)


@pytest.mark.parametrize("estimator", [KLDivergence(), Fisher(2), HessianTrace(2), DeltaLoss()], ids=repr)
@pytest.mark.parametrize("after", [1, 2, 5])
def test_passes_of_an_interrupted_run_are_told_once_and_as_run(tmp_path, monkeypatch, estimator, after):
    """Against the model's own count: all that was run until the last result that was stored, and all of the second run."""
    run = functools.partial(mps.profile, net(), batches(), estimator, mps.precisions("w2 w4"), loss="cross-entropy")
    run = functools.partial(run, checkpoint=tmp_path / "run.db")
    puts, passes, put = [], [], CountingStore.put

    def counted(self, key, value):
        if len(puts) == after:
            raise KeyboardInterrupt
        puts.append(key)
        put(self, key, value)
        passes.append(self._passes())

    monkeypatch.setattr(CountingStore, "put", counted)
    try:
        run()
    except KeyboardInterrupt:
        monkeypatch.setattr(CountingStore, "put", put)
        second = run().origin
        now, told = second["passes_in_this_run"], second["passes"]
        assert passes[-1] != (0.0, 0.0)
        assert (told["forward"] - now["forward"], told["backward"] - now["backward"]) == pytest.approx(passes[-1])
        assert run().origin["passes_in_this_run"]["backward"] == 0
    else:
        assert len(puts) <= after


# Runs that are killed: children forked from a process of one thread, which spares them loading torch.
KILLED = """
import os, pathlib, random, signal, sys, time
import numpy as np, torch
from torch import nn
import mpsearch as mps
from mpsearch.sensitivity import Fisher, HessianTrace, KLDivergence

torch.set_num_threads(1)
folder, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def work(path, out):
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(6, 6), nn.Tanh())), nn.Linear(6, 3))
    batches = [torch.randn(5, 6) for _ in range(4)]
    family = [KLDivergence(), Fisher(), HessianTrace(2)]
    tables = mps.profile(model, batches, family, mps.precisions("w2 w3 w4a8"), checkpoint=path, progress=False)
    values = [getattr(table, name) for table in tables for name in ("sensitivity", "sensitivity_se")]
    np.save(out, np.stack(values))

work(None, folder / "whole.npy")  # loads what is loaded late

def child(path, out):
    pid = os.fork()
    if not pid:
        try:
            work(path, out)
        finally:
            os._exit(0)
    return pid

start = time.monotonic()
os.waitpid(child(folder / "timed.db", folder / "timed.npy"), 0)
seconds = time.monotonic() - start
whole = np.load(folder / "whole.npy")
moments = random.Random(int(sys.argv[3]))
killed = finished = resumed = 0
while killed < kills or killed and not (folder / f"{finished - 1}.npy").exists():
    path, out = folder / f"{finished}.db", folder / f"{finished}.npy"
    while not out.exists():
        started = path.exists()
        pid = child(path, out)
        if killed < kills:
            time.sleep(moments.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            out.unlink(missing_ok=True)
        elif started:
            resumed += 1
    assert np.array_equal(np.load(out), whole), (np.load(out) != whole).sum(axis=(1, 2))
    finished += 1
print(killed, resumed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    """However often the run is killed, the table is that of a run in one piece, bit for bit."""
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(kills), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    killed, resumed = map(int, done.stdout.split())
    assert killed >= kills
    assert resumed >= 1
