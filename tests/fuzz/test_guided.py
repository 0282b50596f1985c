"""Minutes of coverage-guided fuzzing, each reader from a seed of its own."""

import importlib.util
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = re.findall(r"^def (test_\w+)\(data", HERE.joinpath("test_files.py").read_text(), re.M)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
@pytest.mark.parametrize("name", TESTS)
def test_no_input_that_coverage_leads_to_ends_in_a_traceback(name, tmp_path):
    corpus, generator = tmp_path / "corpus", random.Random(1)
    corpus.mkdir()
    for number in range(64):  # hypothesis draws its choices from these bytes: short ones end before anything is damaged
        corpus.joinpath(str(number)).write_bytes(generator.randbytes(2048))
    options = ["-runs=3000", "-seed=1", "-max_len=4096", "-len_control=0", "-close_fd_mask=1"]
    command = [sys.executable, HERE / "guided.py", name, corpus, *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_reader_is_driven():
    assert len(TESTS) == 9
