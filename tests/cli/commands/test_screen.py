"""What a person sees: tables that fit, colours on a terminal alone, words that carry the meaning without them."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from mpsearch.cli import main
from mpsearch.cli.screen import Screen
from mpsearch.core import printing

PARTS = ("self_attention_module.query_projection", "self_attention_module.output_projection", "mlp.down_projection")


def table(layers):
    """Long names, a group for every two layers, eight precisions, some of them not allowed."""
    lines = ["layer,precision,sensitivity,group,numel,memory_bytes,bitops"]
    for n in range(layers):
        name = f"language_model.model.layers.{n // 3}.{PARTS[n % 3]}"
        for bits in (2, 3, 4, 5, 6, 8):
            lines.append(f"{name},w{bits},{(n % 7 + 1) * 4.0**-bits},group_{n // 2},1000,{125 * bits},{1e6 * bits}")
        if n % 3:
            lines.append(f"{name},w8a8,1e-9,group_{n // 2},1000,1000,4e6")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A folder of tables and plans, made once, since a plan of 1000 tied layers takes a while."""
    folder = tmp_path_factory.mktemp("tables")
    for layers in (6, 40, 1000):
        (folder / f"{layers}.csv").write_text(table(layers))
        plan = ["-o", str(folder / f"{layers}.json"), "--quiet"]
        main(["solve", str(folder / f"{layers}.csv"), "--budget", "memory_bytes=40%", *plan])
    plans = "\n".join(f"{n / 7},{','.join(f'w{2 + (n + i) % 3}' for i in range(6))}" for n in range(9))
    names = [line.split(",")[0] for line in table(6).split("\n")[1:]]
    (folder / "plans.csv").write_text(f"damage,{','.join(dict.fromkeys(names))}\n{plans}")
    return folder


@pytest.fixture
def here(solved, monkeypatch):
    monkeypatch.chdir(solved)
    return solved


COMMANDS = [
    "show {n}.json",
    "show {n}.csv",
    "solve {n}.csv --budget average_bits=3.5 --budget memory_bytes=90%",
    "pareto {n}.csv",
    "compare {n}.csv {n}.csv",
]


@pytest.mark.parametrize("layers", [6, 40, 1000])
@pytest.mark.parametrize("command", COMMANDS)
def test_everything_fits_80_columns_and_a_few_pages(here, capsys, command, layers):
    capsys.readouterr()
    assert main(command.format(n=layers).split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 80
    assert "\x1b" not in "".join(lines)


def test_measured_plans_fit(here, capsys):
    capsys.readouterr()
    assert main(["compare", "6.csv", "plans.csv"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_no_layer_is_lost(here, capsys):
    """Blocks hold all layers; in 40 lines every layer has its own, with the number of its block."""
    capsys.readouterr()
    main(["show", "1000.json"])
    out = capsys.readouterr().out
    blocks = re.findall(r"^\S.*? (\d+)  +\d+ w\d.*[█-▏]$", out, re.MULTILINE)
    assert sum(map(int, blocks)) == 1000
    assert "1000 layers: " in out
    main(["show", "40.json"])
    names = re.findall(r"^(\S+) +w\d +█+$", capsys.readouterr().out, re.MULTILINE)
    assert len(set(names)) == 40


def test_bars_are_as_long_as_the_bits(here, capsys):
    capsys.readouterr()
    main(["show", "6.json"])
    found = re.findall(r"w(\d) +(█+)$", capsys.readouterr().out, re.MULTILINE)
    assert len(found) == 6
    assert all(len(bar) == 3 * int(bits) for bits, bar in found)


def on_terminal(arguments, columns, **environ):
    """What the command writes to a terminal of so many columns."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "mpsearch", *arguments.split()],
        stdin=follower, stdout=follower, stderr=follower, env={**kept, "TERM": "xterm", **environ},
    )  # fmt: skip
    os.close(follower)
    written = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not piece:
            break
        written += piece
    os.close(leader)
    process.wait()
    return written.decode()


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("columns", [50, 120])
def test_a_terminal_is_filled_and_coloured(here, columns):
    out = on_terminal("show 6.json", columns)
    assert "\x1b[36m█" in out
    lines = plain(out).splitlines()
    assert max(map(len, lines)) <= columns
    full = "language_model.model.layers.0.self_attention_module.query_projection"
    assert (full in plain(out)) == (columns == 120)
    assert "\x1b" not in on_terminal("show 6.json", columns, NO_COLOR="1", FORCE_COLOR="1")
    assert plain(out) == on_terminal("show 6.json", columns, NO_COLOR="1")


def test_errors_stand_out_on_a_terminal(here):
    assert "mpsearch: \x1b[1;31merror:\x1b[0m" in on_terminal("show none.json", 80)
    assert "mpsearch: error: none.json: No such file" in on_terminal("show none.json", 80, TERM="dumb")


@pytest.mark.parametrize(
    ("terminal", "environ", "colour"),
    [
        (True, {}, True),
        (True, {"NO_COLOR": ""}, True),  # https://no-color.org: an empty value says nothing
        (True, {"NO_COLOR": "0"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours(terminal, environ, colour):
    class Stream:
        def isatty(self):
            return terminal

    screen = Screen.of(Stream(), environ)
    assert screen.colour == colour
    assert terminal or screen.width == 80


def test_the_verdict_says_it_in_words_and_in_colour():
    text = "mixed precision wins by 0.5 ± 0.1 nats over uniform w3"
    assert Screen().verdict(text, True) == f"verdict: {text}"
    green, yellow = (Screen(colour=True).verdict(text, wins) for wins in (True, None))
    assert plain(green) == plain(yellow) == f"verdict: {text}"
    assert green != yellow
    assert Screen(40, True).verdict(text, True).count("\x1b[1;32m") == 2  # each line by itself


def test_a_stream_without_blocks_gets_question_marks(here):
    environ = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-m", "mpsearch", "show", "6.json"], capture_output=True, env=environ)
    assert done.returncode == 0
    assert b"????" in done.stdout


def test_a_closed_pipe_is_no_error(here):
    command = f"{sys.executable} -m mpsearch show 1000.csv | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_rich_is_loaded_when_something_is_printed_and_not_before(here):
    code = (
        "import sys; import mpsearch as mps; table = mps.CostTable.load('6.csv'); "
        "mps.solve(table, mps.Budget(average_bits=4)); print('rich' in sys.modules); "
        "from mpsearch.cli import main; main(['solve', '6.csv', '--budget', 'average_bits=4', '--json', '--quiet']); "
        "print('rich' in sys.modules); main(['show', '6.json']); print('rich' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.findall("^(?:True|False)$", done.stdout, re.MULTILINE) == ["False", "False", "True"]


@pytest.mark.parametrize("width", [20, 40, 60, None])
def test_a_number_is_never_cut(width):
    """Only names in the first column are: where the others need more room than there is, the table is wider."""
    rows = [[f"model.layers.{n}.self_attention.q_proj", "1234.5678", "0.0123 ± 0.0012"] for n in range(3)]
    lines = printing.table(["layer", "bits", "damage"], rows, width).split("\n")
    assert all(line.endswith("1234.5678  0.0123 ± 0.0012") for line in lines[2:])
    assert max(map(len, lines)) == max(12 + 2 + 9 + 2 + 15, min(width or 99, 36 + 2 + 9 + 2 + 15))
    assert all("q_proj" in line or width for line in lines[2:])


def test_markup_and_colours_of_names_are_text():
    names = ["[bold]x[/bold]", ":smile:", "12.5", "a\x1b[31mb"]
    text = printing.table(["[red]layer"], [[name] for name in names])
    assert text.split("\n") == ["[red]layer", "-" * 14, "[bold]x[/bold]", ":smile:", "12.5", "a�[31mb"]
    assert "31" not in re.sub("a�.31mb", "", printing.table(["layer"], [[name] for name in names], colour=True))


@pytest.mark.parametrize(("value", "blocks"), [(8, "█" * 8), (4, "█" * 4), (2.5, "██▌"), (0, ""), (9, "█" * 8)])
def test_bars_are_exact_to_an_eighth(value, blocks):
    assert printing.table(["a", "bits"], [["x", printing.Bar(value, 8, 8)]]).split("\n")[2] == f"x  {blocks}".rstrip()
