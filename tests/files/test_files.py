"""Files are written whole or not at all, and nothing but a file is replaced by one."""

import csv
import io
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import example, given, seed, settings
from hypothesis import strategies as st

import mpsearch as mps
from mpsearch.cli import main
from mpsearch.files.writing import check_folder, check_writable, csv_rows, csv_text, replacing, write_atomically

PLAN = mps.Plan({"a": mps.Precision("4")})


def nothing_else(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_file_is_replaced_whole_and_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o640)
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    nothing_else(tmp_path, "file")


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing yet"])
def test_a_link_is_followed(tmp_path, there):
    (tmp_path / "far").mkdir()
    target, link, second = tmp_path / "far" / "plan.json", tmp_path / "link", tmp_path / "second"
    if there:
        target.write_text("old")
    link.symlink_to(Path("far") / "plan.json")
    second.symlink_to(link)
    PLAN.save(second)
    assert link.is_symlink()
    assert second.is_symlink()
    assert mps.Plan.load(target) == PLAN
    nothing_else(tmp_path / "far", "plan.json")


def test_a_pipe_is_written_to(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write_atomically(path, b"all of it")
    reader.join()
    assert read == [b"all of it"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    nothing_else(tmp_path, "pipe")


def test_devices_are_written_to():
    write_atomically("/dev/null", "gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically("/dev/full", "no room")
    assert caught.value.filename == "/dev/full"


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"])
@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_output_is_written_to_in_its_turn(tmp_path, name, kind):
    code = f"from mpsearch.files.writing import write_atomically as w; print('1'); w({name!r}, '2\\n'); print('3')"
    if kind == "pipe":
        told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    else:
        with open(tmp_path / "out", "w") as out:
            subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
        told = (tmp_path / "out").read_text()
    assert told == "1\n2\n3\n"


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("old")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "plan.json")
    cases = {
        "": (FileNotFoundError, "''"),
        str(tmp_path / "folder"): (IsADirectoryError, "folder"),
        str(tmp_path / "new") + "/": (IsADirectoryError, "new/"),
        str(tmp_path / "missing" / "plan.json"): (FileNotFoundError, "missing"),
        str(tmp_path / "file" / "plan.json"): (NotADirectoryError, "plan.json"),
        str(tmp_path / "ring"): (OSError, "ring"),
        str(tmp_path / "nowhere"): (FileNotFoundError, "gone"),
    }
    for path, (kind, name) in cases.items():
        for write in (check_writable, lambda path: write_atomically(path, "new")):
            with pytest.raises(kind) as caught:
                write(path)
            assert str(caught.value.filename).endswith(name), path
    assert (tmp_path / "file").read_text() == "old"
    nothing_else(tmp_path, "folder", "file", "ring", "nowhere")


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for path in ("", tmp_path / "file", tmp_path / "file" / "deep", tmp_path / "nowhere"):
        with pytest.raises(OSError, match=r".") as caught:
            check_folder(path)
        assert caught.value.filename
    check_folder(tmp_path / "a" / "b")
    nothing_else(tmp_path, "file", "nowhere")


@pytest.fixture
def least_room():
    """Files of 1,000 bytes at most, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, least_room):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(OSError, match="too large") as caught:
        write_atomically(path, "x" * 5000)
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    nothing_else(tmp_path, "plan.json")


def test_a_writer_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("old")
    with pytest.raises(KeyError), replacing(path) as part:
        part.write_text({}["half"])
    with pytest.raises(FileNotFoundError) as caught, replacing(path):
        (tmp_path / "other").read_text()
    assert caught.value.filename == str(tmp_path / "other")
    assert path.read_text() == "old"
    nothing_else(tmp_path, "model.gguf")


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("layer,precision,sensitivity,memory_bytes\na,w4,0.5,4\na,w8,0.1,8\n")
    return str(path)


@pytest.mark.parametrize(
    "words",
    [
        ["solve", "{table}", "--budget", "memory_bytes=8", "-o"],
        ["pareto", "{table}", "-o"],
        ["profile", "missing.py:net", "--data", "missing.py:data", "--precisions", "w4", "-o"],
        ["export", "missing.json", "--to", "torchao", "-o"],
        ["import", "missing.json", "--from", "gptqmodel", "-o"],
        ["report", "missing", "-o"],
    ],
    ids=lambda words: words[0],
)
def test_commands_refuse_before_any_work(words, table, tmp_path, capsys):
    for out, told in (
        ("", "''"),
        (str(tmp_path), str(tmp_path)),
        (str(tmp_path / "no" / "t.csv"), str(tmp_path / "no")),
    ):
        if words[0] == "export" and out == str(tmp_path):
            continue  # which may write into a folder
        assert main([word.format(table=table) for word in words] + [out]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"error: {told}: " in error
    assert main(["search", "missing.py:net", "--data", "missing.py:data", "--precisions", "w4", "-o", ""]) == 2
    assert "error: '': an empty name" in capsys.readouterr().err


def test_the_command_writes_to_a_device(table, capsys):
    assert main(["solve", table, "--budget", "memory_bytes=8", "-o", "/dev/null"]) == 0
    assert main(["solve", table, "--budget", "memory_bytes=8", "-o", "/dev/full"]) == 2
    assert capsys.readouterr().err.endswith("error: /dev/full: No space left on device\n")


BREAKS = "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
CELLS = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(BREAKS + " \t,;\"'=#")), max_size=8)


@seed(0)
@settings(database=None, deadline=None, max_examples=200)
@given(st.lists(st.lists(CELLS, min_size=2, max_size=3), min_size=1, max_size=4))
@example([["a\rb", "c\x85"], [" =1 ", '"']])
def test_cells_of_any_text_survive(rows):
    text = csv_text(rows)
    assert [row for _, row in csv_rows(text)] == rows
    assert list(csv.reader(io.StringIO(text, newline=""))) == rows
    unbroken = [[cell.translate(dict.fromkeys(map(ord, BREAKS))) for cell in row] for row in rows]
    assert csv_text(unbroken).count("\n") == len(rows)
