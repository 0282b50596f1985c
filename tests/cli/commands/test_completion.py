"""What Tab completes, asked of the shells themselves."""

import json
import shutil
import subprocess

import pytest

from mpsearch.cli import main
from mpsearch.export import EXPORTERS
from mpsearch.sensitivity import ESTIMATORS
from mpsearch.solvers import SOLVERS

LINES = [
    ("prof", {"profile"}),
    ("solve t.csv --mini", {"--minimize"}),
    ("profile --estimator fisher", {name for name in ESTIMATORS if name.startswith("fisher")}),
    ("solve --solver ", set(SOLVERS)),
    ("export --to onnx", {name for name in EXPORTERS if name.startswith("onnx")}),
    ("search --effort ", {"fast", "default", "thorough"}),
    ("solve tab", {"table.csv"}),
]


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Shell -> file of its script, in a folder with one table."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").touch()

    def written(shell):
        if not shutil.which(shell):
            pytest.skip(f"no {shell} here")
        assert main(["completion", shell]) == 0
        (tmp_path / "script").write_text(capsys.readouterr().out)
        return tmp_path / "script"

    return written


def answer(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_bash(script, line, expected):
    words = ["mpsearch", *line.split(" ")]
    quoted = " ".join(f"'{word}'" for word in words)
    code = f"""
source {script("bash")}
COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
function_name=$(complete -p mpsearch | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function_name" mpsearch '{words[-1]}' '{words[-2]}'
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    assert set(answer("bash", "--norc", "-c", code).split()) == expected


@pytest.mark.parametrize(("line", "expected"), LINES)
def test_fish(script, line, expected):
    code = f"source {script('fish')}; complete --do-complete 'mpsearch {line}'"
    found = {row.split("\t")[0] for row in answer("fish", "--no-config", "-c", code).splitlines()}
    assert found == expected


def test_zsh_loads_it(script):
    code = f'autoload -U compinit; compinit -u -D; eval "$(<{script("zsh")})"; echo $_comps[mpsearch]'
    assert "_shtab_mpsearch" in answer("zsh", "-f", "-c", code)


def test_for_machines_and_for_an_unknown_shell(capsys):
    assert main(["completion", "bash", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shell"] == "bash"
    assert "_shtab_mpsearch" in found["script"]
    assert main(["completion", "bahs"]) == 2
    assert "invalid choice: 'bahs'" in capsys.readouterr().err
